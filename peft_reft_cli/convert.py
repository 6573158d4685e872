"""`peft-reft convert`: checkpoints of pyreft and of the adapters library become PEFT adapters, and those pyreft's."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, check_model, print_json


class Target(str, Enum):
    """The library whose checkpoint is made."""

    peft = "peft"
    pyreft = "pyreft"


def convert(
    source: Annotated[
        Path, typer.Argument(help="A checkpoint's folder: pyreft's, the adapters library's, or PEFT's.")
    ],
    out: Annotated[Path, typer.Argument(help="A new folder to write to.")],
    to: Annotated[Target, typer.Option(help="'peft', or 'pyreft' for a PEFT adapter to go out again.")] = Target.peft,
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
    as_json: Json = False,
) -> None:
    """Convert checkpoints of pyreft and adapters.

    Makes a PEFT adapter of a checkpoint of pyreft or of the adapters library, or a pyreft checkpoint of a PEFT
    adapter.
    """
    kind = _kind_of(source)
    only_pyreft = {"positions": positions, "act_fn": act_fn, "dropout": dropout, "args_file": args_file}
    only_in = {**only_pyreft, "intervention": intervention, "task_type": task_type}
    if (kind == "peft") == (to is Target.peft):
        raise ValueError(
            f"--to {to.value}: {source} is a checkpoint of {kind}. PEFT adapters are converted with --to pyreft, "
            "others with --to peft."
        )
    if kind == "adapters":
        _refuse_options(only_pyreft, "the adapters library saves what they say")
    if kind == "peft":
        _refuse_options(only_in, "the adapter's config has what they say")
    if base_model is not None:
        check_model("--base-model", base_model)
    from peft_reft.conversion import convert_adapters, convert_pyreft, export_pyreft

    if kind == "pyreft":
        done = convert_pyreft(
            source, out, base_model, positions, intervention=intervention, act_fn=act_fn, dropout=dropout,
            task_type=task_type, with_head=head, args_file=args_file,
        )  # fmt: skip
    elif kind == "adapters":
        done = convert_adapters(
            source, out, base_model, intervention=intervention, task_type=task_type, with_head=head
        )
    else:
        done = export_pyreft(source, out, base_model)
    settings = {
        name: getattr(done.config, name) for name in ("intervention", "r", "positions", "share_weights", "act_fn")
    }
    if as_json:
        print_json({"folder": done.folder, "from": kind, "to": to.value, **settings, "notes": done.notes})
        return
    edit = settings.pop("intervention")
    typer.echo(f"{done.folder}: {edit}, " + ", ".join(f"{name}={value!r}" for name, value in settings.items()))
    for note in done.notes:
        typer.echo(f"- {note}")


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
