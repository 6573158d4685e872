"""`peft-reft positions`: which tokens an adapter edits, or would edit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Json, Template, check_file, check_model, encode_dataset, naming, print_json


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from peft_reft import ReftConfig


YAML = (".yaml", ".yml")


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
    template: Template = None,
    examples: Annotated[int, typer.Option(min=1, help="How many rows of the dataset to show.")] = 3,
    as_json: Json = False,
) -> None:
    """Show which tokens an adapter edits.

    Or would edit, before training: in texts, or in the rows of a dataset.
    """
    if not text and dataset is None:
        raise ValueError("There is nothing to show. Give --text 'a prompt', or --dataset file.jsonl.")
    check_file("--dataset", dataset)
    written = adapter_or_config.suffix in (".json", *YAML)
    if written and not adapter_or_config.is_file():
        raise ValueError(f"{adapter_or_config}: there is no such file.")
    if not written:
        check_model("ADAPTER_OR_CONFIG", str(adapter_or_config), "adapter_config.json")
    from transformers import AutoTokenizer

    from peft_reft import explain_positions
    from peft_reft.tools.formats import pad_rows

    config, base = _read_config(adapter_or_config)
    name = tokenizer or config.tokenizer_name_or_path or base
    if not name:
        raise ValueError(f"{adapter_or_config} does not name a base model. Give its tokenizer with --tokenizer.")
    option = "--tokenizer" if tokenizer else f"{adapter_or_config}, without --tokenizer, names"
    check_model(option, name, "tokenizer_config.json", required=False)
    with naming(option, name, "tokenizer"):
        tokens = AutoTokenizer.from_pretrained(name)
    if adapter_or_config.suffix in YAML:
        tokens.chat_template = _chat_template(adapter_or_config, tokens)
    shown = {"text": [{"input_ids": tokens(one)["input_ids"]} for one in text or ()], "dataset": []}
    if dataset is not None:
        shown["dataset"], template = encode_dataset(dataset, examples, template, tokens, as_json)
    explained = {
        source: explain_positions(config, tokens, pad_rows(rows), quiet=as_json)
        for source, rows in shown.items()
        if rows
    }
    if as_json:
        print_json(
            {
                "positions": config.positions,
                "template": template if dataset is not None else None,
                **{
                    source: [{**asdict(one), "warnings": one.warnings} for one in sequences]
                    for source, sequences in explained.items()
                },
            }
        )


def _read_config(path: Path) -> tuple[ReftConfig, str | None]:
    """The ReftConfig in an adapter's folder, a JSON file or an axolotl YAML, and the name of the base model."""
    from peft import PeftConfig

    from peft_reft import ReftConfig

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
    import yaml

    from peft_reft.integrations.axolotl.keys import read_keys, reft_config

    cfg = read_keys(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
    return reft_config(cfg, "CAUSAL_LM"), getattr(cfg, "tokenizer_config", None) or getattr(cfg, "base_model", None)


def _chat_template(path: Path, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The chat template by which axolotl renders the conversations of a YAML, the first where they differ.

    Raises:
        ValueError: when the template is one of axolotl's, and axolotl is not installed.
    """
    import yaml

    from peft_reft.integrations.axolotl.template import chat_templates, names_template

    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not names_template(keys):
        return tokenizer.chat_template
    try:
        return next(iter(chat_templates(keys, tokenizer).values()))
    except ImportError as error:
        raise ValueError(
            f"{path} names a chat_template, which axolotl finds: pip install 'peft-reft[axolotl]'. {error}"
        ) from error
