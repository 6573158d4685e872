"""The console command `peft-reft`: subcommands by topic. `python -m peft_reft` is the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import typer
import yaml
from peft import PeftConfig
from transformers import AutoTokenizer

from .conversion import Conversion, convert_adapters, convert_pyreft, export_pyreft
from .evaluation import commands
from .tools.explain import explain_positions
from .tools.formats import TEMPLATES, encode_row, pad_rows, read_rows
from .tuner.config import ReftConfig


YAML = (".yaml", ".yml")

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def peft_reft() -> None:
    """ReFT (Representation Finetuning) as a PEFT tuner: tools around adapters."""


app.command()(commands.prepare)
app.command()(commands.evaluate)


@app.command()
def positions(
    adapter_or_config: Annotated[
        Path,
        typer.Argument(
            help="An adapter's folder or hub name, a JSON file of ReftConfig's fields, or an axolotl YAML."
        ),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer's folder or hub name. Left out: that of the base model.")
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="A prompt to show. May be given several times.")] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="A file of examples to show: JSON lines, or a JSON list.")
    ] = None,
    template: Annotated[
        str,
        typer.Option(
            help="How rows become text: "
            + "; ".join(f"'{name}': {what}" for name, what in TEMPLATES.items())
            + "; or a text of your own, 'Q: {question} A:|> {answer}'."
        ),
    ] = "chat",
    examples: Annotated[int, typer.Option(min=1, help="How many rows of the dataset to show.")] = 3,
) -> None:
    """Show which tokens an adapter edits, or would edit, in texts or in the rows of a dataset."""
    if not text and dataset is None:
        raise ValueError("There is nothing to show. Give --text 'a prompt', or --dataset file.jsonl.")
    config, base = _read_config(adapter_or_config)
    name = tokenizer or config.tokenizer_name_or_path or base
    if not name:
        raise ValueError(f"{adapter_or_config} does not name a base model. Give its tokenizer with --tokenizer.")
    tokens = AutoTokenizer.from_pretrained(name)
    if adapter_or_config.suffix in YAML:
        tokens.chat_template = _chat_template(adapter_or_config, tokens)
    batches = [[{"input_ids": tokens(one)["input_ids"]} for one in text or ()]]
    if dataset is not None:
        batches.append([encode_row(row, template, tokens) for row in read_rows(dataset, examples)])
    for rows in batches:
        if rows:
            explain_positions(config, tokens, pad_rows(rows))


@app.command()
def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint's folder: pyreft's, the adapters library's, or PEFT's.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder to write to.")],
    to: Annotated[str, typer.Option(help="'peft', or 'pyreft' for a PEFT adapter to go out again.")] = "peft",
    base_model: Annotated[
        str | None, typer.Option(help="The base model's folder or hub name, where the checkpoint does not name it.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(help="What pyreft's positions were: 'f7+l7', 'f3', 'l1', 'all'. Its files don't say.")
    ] = None,
    intervention: Annotated[str | None, typer.Option(help="The edit, where the files don't tell.")] = None,
    act_fn: Annotated[str | None, typer.Option(help="pyreft's activation function, if there was one.")] = None,
    dropout: Annotated[float | None, typer.Option(help="pyreft's dropout, to train on with.")] = None,
    task_type: Annotated[
        str | None, typer.Option(help="What the base model was loaded for: 'SEQ_CLS' for a classifier.")
    ] = None,
    head: Annotated[bool, typer.Option(help="Whether to take along the head that was trained.")] = True,
    args_file: Annotated[Path | None, typer.Option(help="The args.json of pyreft's training script.")] = None,
) -> None:
    """Make a PEFT adapter of a checkpoint of pyreft or of the adapters library, or a pyreft checkpoint of a PEFT
    adapter."""
    kind = _kind_of(source)
    only_pyreft = {"positions": positions, "act_fn": act_fn, "dropout": dropout, "args_file": args_file}
    only_in = {**only_pyreft, "intervention": intervention, "task_type": task_type}
    if (kind, to) == ("pyreft", "peft"):
        done = convert_pyreft(
            source, out, base_model, positions, intervention=intervention, act_fn=act_fn, dropout=dropout,
            task_type=task_type, with_head=head, args_file=args_file,
        )  # fmt: skip
    elif (kind, to) == ("adapters", "peft"):
        _refuse_options(only_pyreft, "the adapters library saves what they say")
        done = convert_adapters(
            source, out, base_model, intervention=intervention, task_type=task_type, with_head=head
        )
    elif (kind, to) == ("peft", "pyreft"):
        _refuse_options(only_in, "the adapter's config has what they say")
        done = export_pyreft(source, out, base_model)
    else:
        raise ValueError(
            f"--to {to}: {source} is a checkpoint of {kind}. PEFT adapters are converted with --to pyreft, others "
            "with --to peft."
        )
    _report(done)


def _kind_of(source: Path) -> str:
    """The library whose checkpoint a folder is: "peft", "adapters" or "pyreft"."""
    if (source / "adapter_config.json").exists():
        config = json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))
        return "peft" if isinstance(config, dict) and "peft_type" in config else "adapters"
    if source.is_dir():
        return "pyreft"
    raise ValueError(f"{source} is no folder. Give the folder of a checkpoint.")


def _refuse_options(options: dict[str, Any], reason: str) -> None:
    """Refuse options that this kind of checkpoint does not need: ignored, they would mislead."""
    given = [f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{' '.join(given)} has no meaning here: {reason}. Leave it out.")


def _report(done: Conversion) -> None:
    config = done.config
    typer.echo(
        f"{done.folder}: {config.intervention}, r={config.r}, positions={config.positions!r}, "
        f"share_weights={config.share_weights}, act_fn={config.act_fn!r}"
    )
    for note in done.notes:
        typer.echo(f"- {note}")


def _read_config(path: Path) -> tuple[ReftConfig, str | None]:
    """The ReftConfig in an adapter's folder, a JSON file or an axolotl YAML, and the name of the base model."""
    if path.suffix in YAML:
        return _read_yaml(path)
    if path.suffix == ".json":
        fields = json.loads(path.read_text(encoding="utf-8"))
        written_by_hand = {} if "peft_type" in fields else {"peft_type": "REFT", "response_template": "auto"}
        config: Any = ReftConfig.from_peft_type(**{**written_by_hand, **fields})
    else:
        config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, ReftConfig):
        raise ValueError(f"{path} holds an adapter of kind {config.peft_type.value}, not REFT.")
    return config, config.base_model_name_or_path


def _read_yaml(path: Path) -> tuple[ReftConfig, str | None]:
    """The ReftConfig that the axolotl plugin makes of a YAML, and the name of the tokenizer or base model."""
    try:
        from .integrations.axolotl.args import ReftBlock, is_reft, own_name, reft_config
    except ImportError as error:
        raise ValueError(
            f"{path}: reading an axolotl YAML needs axolotl (pip install 'peft-reft[axolotl]'). {error}"
        ) from error
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    adapter = own_name(keys.get("adapter"))
    if not is_reft(adapter):
        raise ValueError(f"{path} has adapter: {keys.get('adapter')}, which is not a ReFT adapter.")
    block = keys.get("reft")
    cfg = SimpleNamespace(**{**keys, "adapter": adapter, "reft": None if block is None else ReftBlock(**block)})
    return reft_config(cfg, "CAUSAL_LM"), keys.get("tokenizer_config") or keys.get("base_model")


def _chat_template(path: Path, tokenizer: Any) -> str | None:
    """The chat template by which axolotl renders the conversations of a YAML, the first where they differ."""
    from .integrations.axolotl.template import chat_templates

    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    return next(iter(chat_templates(keys, tokenizer).values()), tokenizer.chat_template)


def main() -> None:
    """Run the command. A ValueError or OSError becomes one line and exit status 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.secho(f"peft-reft: {error}", fg="red", err=True)
        raise SystemExit(2) from error
