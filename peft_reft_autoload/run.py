"""`peft-reft run COMMAND ...`: runs a command whose Python processes know ReFT.

For environments where the autoload is switched off, or where there is no .pth file to start it: packages installed by
`pip install --target`, or repackaged. The command is Python code that knows nothing of ReFT, as with
`accelerate launch`: a script, `-m MODULE`, or a console command such as `lm_eval`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import VARIABLE


STARTUP = Path(__file__).parent / "startup"


def command_line(words: list[str]) -> list[str]:
    """The command to execute for the words after `peft-reft run`.

    Args:
        words (`list[str]`): A script's path, `-m` and a module, or a console command, each with its arguments.

    Returns:
        `list[str]`: The program's path and its arguments.

    Raises:
        ValueError: when there is no such script or command.
    """
    first = words[0]
    if first in ("-m", "-c") or (first.endswith(".py") and Path(first).is_file()):
        return [sys.executable, *words]
    # Commands of peft-reft's own environment come first: it may not be activated.
    own = str(Path(sys.executable).parent)
    program = shutil.which(first, path=own) or shutil.which(first)
    if program is None:
        raise ValueError(
            f"There is no script or command {first!r}. Give a script ('train.py'), a module ('-m lm_eval') or a "
            "command ('lm_eval', 'accelerate'), and its arguments."
        )
    return [program, *words[1:]]


def environment() -> dict[str, str]:
    """The environment variables of this process, and what has a Python below it start with the autoload."""
    paths = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, VARIABLE: "1", "PYTHONPATH": os.pathsep.join(paths)}


def run(
    command: Annotated[
        list[str],
        typer.Argument(
            help="A script, '-m' and a module, or a console command, and its arguments.", metavar="COMMAND"
        ),
    ],
) -> None:
    """Run a command whose Python loads ReFT adapters.

    For where `import peft` does not bring ReFT: PEFT_REFT_AUTOLOAD=0 is set, or the .pth file is missing.
    """
    words = command_line(command)
    if os.name == "posix":
        os.execve(words[0], words, environment())  # the command takes this process's place, with its signals
    raise SystemExit(subprocess.run(words, env=environment()).returncode)
