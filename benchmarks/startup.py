"""Measures how long the console command takes to answer what needs no model: `--help`, `--version`, a wrong option.

Processor time is measured, of the process and of those that it starts, so that other work on the machine adds little.
"""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from .report import print_table


PLAIN = ("-c", "pass")
# The arguments of `peft-reft`, and the exit status that they must have.
ASKED: dict[tuple[str, ...], int] = {
    ("--version",): 0,
    ("--help",): 0,
    ("positions", "--help"): 0,
    ("evaluate", "--help"): 0,
    ("positions", "--nosuch"): 2,
    ("evaluate", "nosuch", "--base", "x"): 2,
    ("evaluate", "mawps", "--base", "./nowhere"): 2,
}


def processor_seconds(arguments: Sequence[str], status: int = 0, repeats: int = 3) -> float:
    """The least processor time that a process of this interpreter takes, user's and system's.

    Args:
        arguments (`Sequence[str]`): The interpreter's arguments.
        status (`int`): The exit status that is expected.
        repeats (`int`): How many times the process is started.

    Raises:
        RuntimeError: when the process ends with another status, with its output.
    """
    taken = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode != status:
            raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def beyond_python(arguments: Sequence[str], repeats: int = 3) -> float:
    """Processor time of `peft-reft` with some arguments, less that of an interpreter that does nothing."""
    command = (str(Path(sys.executable).with_name("peft-reft")), *arguments)
    status = ASKED.get(tuple(arguments), 0)
    return processor_seconds(command, status, repeats) - processor_seconds(PLAIN, repeats=repeats)


def cli(repeats: Annotated[int, typer.Option(help="how many times each is run")] = 5) -> None:
    """Processor seconds that `peft-reft --help`, `--version` and wrong options take beyond Python's own start."""
    rows = [[f"peft-reft {' '.join(asked)}", f"{beyond_python(asked, repeats):.2f}"] for asked in ASKED]
    print_table("beyond Python's start", ["command", "processor seconds"], rows)
