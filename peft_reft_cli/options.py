"""What several commands share: `--json`, the names that options take, and models that are not where an option says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer


# Names that the help and a shell's completion show. A test compares them with peft_reft.tools.formats.TEMPLATES and
# peft_reft.evaluation.TASKS, whose imports would take seconds.
TEMPLATES = {
    "chat": "`messages` (or `conversations`), by the tokenizer's chat template; the assistant's turns are answers",
    "alpaca": "`instruction`, `input` and `output`, as Alpaca words them",
    "completion": "`prompt` and `completion`, as texts or as messages",
    "text": "`text`, without an answer",
}
TASKS = {
    "commonsense": (
        "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
        "commonsense_170k",
    ),
    "arithmetic": (
        "AQuA", "gsm8k", "mawps", "SVAMP", "MultiArith", "AddSub", "SingleEq", "math_10k", "math_7k", "math_data",
    ),
    "instruct": ("alpaca_eval", "ultrafeedback", "ultrafeedback_1k"),
    "glue": ("cola", "sst2", "mnli", "mrpc", "qnli", "qqp", "rte", "stsb"),
}  # fmt: skip

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else on standard output.")]
# A name on the Hub: NAME or OWNER/NAME. Everything else can be a folder only.
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def version() -> str:
    """The installed version of peft-reft."""
    return metadata.version("peft-reft")


def print_json(result: Any) -> None:
    """Print a result as JSON. Sets become sorted lists, and what JSON has no word for becomes its text."""
    typer.echo(json.dumps(result, indent=2, ensure_ascii=False, default=_as_json))


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)


def describe_tasks() -> str:
    """A sentence with the names of all tasks, by family."""
    return "There are " + "; ".join(f"{family}: {', '.join(names)}" for family, names in TASKS.items()) + "."


def check_tasks(names: list[str]) -> list[str]:
    """Refuse names that no task or family has, in upper or lower case."""
    for name in names:
        if name.lower() not in map(str.lower, complete_task(name)):
            raise typer.BadParameter(f"there is no task {name!r}. {describe_tasks()}")
    return names


def complete_task(begun: str) -> list[str]:
    """The tasks and families whose names begin like that, for a shell."""
    names = [*TASKS, *(name for names in TASKS.values() for name in names)]
    return [name for name in names if name.lower().startswith(begun.lower())]


def complete_template(begun: str) -> list[tuple[str, str]]:
    """The templates whose names begin like that, for a shell."""
    return [(name, what) for name, what in TEMPLATES.items() if name.startswith(begun)]


Template = Annotated[
    str | None,
    typer.Option(
        help="How rows become text. Left out: by their fields. "
        + "; ".join(f"'{name}': {what}" for name, what in TEMPLATES.items())
        + "; or a text of your own, 'Q: {question} A:|> {answer}'.",
        autocompletion=complete_template,
    ),
]


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that is not there."""
    if path is not None and not path.is_file():
        raise ValueError(f"{option} {path}: there is no such file.")


def encode_dataset(
    dataset: Path, examples: int, template: str | None, tokenizer: Any, as_json: bool
) -> tuple[list[dict[str, list[int]]], str]:
    """The first rows of a dataset file as tokens, and the template by which they were read.

    Raises:
        ValueError: when the file has no rows, or they do not fit the template.
    """
    from peft_reft.tools.formats import encode_row, read_rows, template_of

    rows = list(read_rows(dataset, examples))
    if not rows:
        raise ValueError(f"--dataset {dataset} has no rows.")
    if template is None:
        template = template_of(rows[0])
        typer.echo(f"{dataset}: rows read as --template {template}", err=as_json)
    return [encode_row(row, template, tokenizer) for row in rows], template


def check_model(option: str, name: str, file: str = "config.json", required: bool = True) -> None:
    """Refuse a model or an adapter that is neither a folder nor on the Hub, before anything large is loaded.

    Args:
        option (`str`): What the user set, `"--base"` for example.
        name (`str`): The folder or hub name that it was set to.
        file (`str`): A file that the folder or the repository has.
        required (`bool`): Whether to refuse a folder or a repository that lacks the file.

    Raises:
        ValueError: with the option, the value and the reason.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if required and not (folder / file).is_file():
            raise ValueError(f"{option} {name}: the folder has no {file}.")
        return
    if folder.exists():
        raise ValueError(f"{option} {name} is a file. Give the folder that has {file}.")
    if not _HUB_NAME.fullmatch(name):
        raise ValueError(f"{option} {name}: there is no such folder, and no name on the Hub is written like that.")
    reason = _not_on_hub(name, file, required)
    if reason:
        raise ValueError(f"{option} {name}: there is no such folder, and {reason}.")


def _not_on_hub(name: str, file: str, required: bool) -> str:
    """Why a file of a repository is neither in the Hub's cache nor on the Hub. Empty: it is."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, file), str):
        return ""
    try:
        get_hf_file_metadata(hf_hub_url(name, file))
    except errors.GatedRepoError:
        return "the Hub asks you to accept the model's terms there, and to log in (hf auth login)"
    except errors.RepositoryNotFoundError:
        return "the Hub has none of this name, or none that it shows you (hf auth login)"
    except errors.EntryNotFoundError:
        return f"on the Hub it has no {file}" if required else ""
    except errors.OfflineModeIsEnabled:
        return "it is not in the Hub's cache (the Hub itself was not asked: HF_HUB_OFFLINE is set)"
    except Exception as error:  # of the HTTP library, which is not the same in all versions of huggingface_hub
        return f"it is not in the Hub's cache (the Hub itself did not answer: {type(error).__name__})"
    return ""


@contextmanager
def naming(option: str, name: str, what: str) -> Iterator[None]:
    """A context for loading: what a library raises there becomes one sentence that names the option and the value.

    Args:
        option (`str`): What the user set, `"--tokenizer"` for example.
        name (`str`): The value that it was set to.
        what (`str`): What is loaded, `"tokenizer"` for example.

    Raises:
        ValueError: where the library raises a ValueError, an OSError or an ImportError.
    """
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{option} {name}: no {what} could be loaded from there. {first}") from error
