"""Prints results as a table, and writes them as JSON and outputs as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


BASE = "base"


def means(results: list[dict[str, Any]]) -> dict[str, float]:
    """Model to the mean of its tasks' first metrics, as in the paper's tables. A model without a score on some task,
    or with only one task, is left out."""
    scores: dict[str, list[float | None]] = {}
    for result in results:
        first = next(iter(result["scores"].values()), None)
        scores.setdefault(result["model"], []).append(first and first["value"])
    found = {}
    for model, values in scores.items():
        numbers = [value for value in values if value is not None]
        if len(values) > 1 and len(numbers) == len(values):
            found[model] = sum(numbers) / len(numbers)
    return found


def table(report: dict[str, Any]) -> Table:
    """A row for each task and a column for each model: score in percent, its interval, and notes on the result."""
    models = list(report["models"])
    shown = Table(title=f"{report['base']}: score in percent, and its 95 % interval")
    shown.add_column("task")
    shown.add_column("examples", justify="right")
    for model in models:
        shown.add_column(model, justify="right")
    cells = {(result["task"], result["model"]): result for result in report["results"]}
    for task in dict.fromkeys(result["task"] for result in report["results"]):
        row = [cells[task, model] for model in models]
        shown.add_row(task, str(row[0]["examples"]), *map(_cell, row))
    if report["means"]:
        shown.add_section()
        shown.add_row("mean", "", *(_percent(report["means"].get(model)) for model in models))
    shown.add_section()
    shown.add_row("parameters", "", *(_count(report["models"][model]["parameters"]) for model in models))
    shown.add_row("of the base", "", *(_share(report["models"][model]["share"]) for model in models))
    shown.add_row("size", "", *(_size(report["models"][model]["bytes"]) for model in models))
    seconds = {
        model: sum(result["seconds"] for result in report["results"] if result["model"] == model) for model in models
    }
    shown.add_row("seconds", "", *(f"{seconds[model]:.0f}" for model in models))
    return shown


def print_table(report: dict[str, Any]) -> None:
    """Print the table to standard output. If that is a file, the table is as wide as its columns need."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(100, 32 + 30 * len(report["models"])))
    console.print(table(report))


def write_json(report: Any, path: Path) -> None:
    """Write a report, or anything else that JSON can hold."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(rows: Iterable[dict[str, Any]], path: Path) -> int:
    """Write JSON lines, and return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def _cell(result: dict[str, Any]) -> str:
    lines = []
    for metric, score in result["scores"].items():
        name = "" if len(result["scores"]) == 1 and metric == "accuracy" else f"{metric} "
        interval = "" if score["low"] is None else f" [{100 * score['low']:.1f}, {100 * score['high']:.1f}]"
        lines.append(f"{name}{_percent(score['value'])}{interval}".replace("[", r"\["))
    if result.get("note"):
        lines.append(result["note"])
    if result.get("unanswered"):
        lines.append(f"{result['unanswered']} unanswered")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def _count(value: int) -> str:
    return f"{value:,}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.4g} %"


def _size(value: int | None) -> str:
    if value is None:
        return ""
    return f"{value / 1e6:.2f} MB" if value >= 1e5 else f"{value / 1e3:.1f} kB"
