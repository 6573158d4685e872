#!/usr/bin/env python3
"""Writes the part of docs/cli.md that lists each subcommand's arguments and options, from the command itself.

    python scripts/cli_page.py

What stands above the line `<!-- by scripts/cli_page.py -->` is written by hand. A test compares the rest with the
command.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from peft_reft_cli import app


TARGET = Path(__file__).parents[1] / "docs" / "cli.md"
MARK = "<!-- by scripts/cli_page.py -->\n"


def page(written: str) -> str:
    """The page whose upper part, by hand, is that of `written`."""
    group: Any = typer.main.get_command(app)
    parts = [written.partition(MARK)[0] + MARK]
    for name, command in group.commands.items():
        parts.append("\n".join(_section(name, command)) + "\n")
    return "\n".join(parts)


def _section(name: str, command: Any) -> Iterator[str]:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and one.name != "help"]
    shown = (one.name.upper() + ("..." if one.nargs == -1 else "") for one in arguments)
    words = (word if one.required else f"[{word}]" for word, one in zip(shown, arguments))
    yield f"## `peft-reft {' '.join([name, *words])}`\n"
    yield " ".join(command.help.split()) + "\n"
    yield "| argument or option | default | meaning |\n| --- | --- | --- |"
    for one in arguments:
        yield f"| `{one.name.upper()}` | | {_cell(one.help)} |"
    for one in options:
        names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
        yield f"| {names} | {_default(one)} | {_cell(one.help)} |"


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = getattr(option.default, "value", option.default)
    if value is True:
        return f"`{option.opts[0]}`"
    return "" if value in (None, False, [], ()) else f"`{value}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(TARGET.read_text()))
    print(f"wrote {TARGET}")
