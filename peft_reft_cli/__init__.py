"""The console command `peft-reft`: subcommands by topic. `python -m peft_reft` is the same.

The package lies beside `peft_reft` because importing anything of that imports torch, transformers and PEFT, and
registers ReFT: seconds, and those libraries' own messages. Here no module imports more than Typer. `--help`,
`--version`, a wrong option and a shell that completes a word are answered by that alone, and a command imports what it
needs when it runs.

    positions.py    `positions`: which tokens an adapter edits
    inspect.py      `inspect`: how much an adapter's edits change texts
    convert.py      `convert`: checkpoints of pyreft and adapters, in and out
    evaluation.py   `prepare`, `evaluate`: the paper's tasks
    environment.py  `env`: versions, devices and an adapter's settings, for a report
    peft_reft_autoload/run.py  `run`: another command, whose Python knows ReFT
    options.py      what several commands share: --json, names of tasks, models that are not there
"""

from __future__ import annotations

from typing import Annotated

import typer

from peft_reft_autoload.run import run

from .convert import convert
from .environment import env
from .evaluation import evaluate, prepare
from .inspect import inspect
from .options import version
from .positions import positions


# Without Typer's use of Rich, whose import takes longer than all else that a help needs.
app = typer.Typer(name="peft-reft", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"peft-reft {version()}")
        raise typer.Exit


@app.callback()
def peft_reft(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """ReFT (Representation Finetuning) as a PEFT tuner: tools around adapters."""


for command in (prepare, evaluate, positions, inspect, convert, env):
    app.command()(command)
# What follows COMMAND is the command's own: options, --help included.
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(run)


def main() -> None:
    """Run the command. A ValueError or OSError becomes one line and exit status 2, not a traceback."""
    try:
        app()
    except (ValueError, OSError) as error:
        typer.secho(f"peft-reft: {error}", fg="red", err=True)
        raise SystemExit(2) from error
