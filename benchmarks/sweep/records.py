"""Keeps the results of runs in a file of JSON lines, one line a run. An interrupted run leaves no line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .settings import Run, key_of


class Records:
    """The records of a file, by the settings of their runs.

    Args:
        path (`Path`): The file. It need not be there.

    Raises:
        ValueError: when a whole line of the file is no record, naming the line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._by_key: dict[str, dict[str, Any]] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break  # the process ended within this line: the run counts as not made, and `add` removes the line
            try:
                record = json.loads(line)
                self._by_key[key_of(record["settings"])] = record
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is no record of a run: {line.strip()[:80]!r}.") from error

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Any:
        return iter(self._by_key.values())

    def find(self, run: Run) -> dict[str, Any] | None:
        """The record of a run, or None where the run has not been made."""
        return self._by_key.get(run.key)

    def add(self, run: Run, result: dict[str, Any]) -> None:
        """Write the result of a run to the end of the file, on the disk before this returns."""
        record = {"settings": run.described(), **result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            _remove_half_line(file)
            file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._by_key[run.key] = record


def _remove_half_line(file: Any) -> None:
    file.seek(0)
    content = file.read()
    if content and not content.endswith(b"\n"):
        file.truncate(content.rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
