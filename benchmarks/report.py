"""Prints measurements as tables, and plots them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def ratio_text(measured: dict[str, float]) -> str:
    """A ratio with its quartiles."""
    return f"{measured['ratio']:.3f} ({measured['low']:.3f} to {measured['high']:.3f})"


def print_table(title: str, columns: list[str], rows: list[list[str]], console: Console | None = None) -> None:
    """Print a table to the console."""
    table = Table(title=title)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    (console or Console()).print(table)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def slope(points: list[dict[str, Any]]) -> tuple[float, float]:
    """Fit a straight line to (value, ratio) by least squares: the ratio at 0, and the slope."""
    xs, ys = [point["value"] for point in points], [point["ratio"] for point in points]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    gradient = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys)) / spread
    return mean_y - gradient * mean_x, gradient


def plot_scaling(scaling: dict[str, list[dict[str, Any]]], folder: Path) -> list[Path]:
    """Plot step cost against each varied setting. Needs matplotlib. Returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    paths = []
    for name, points in scaling.items():
        figure, axes = pyplot.subplots(figsize=(5, 3.2))
        for method in sorted({point["method"] for point in points}, reverse=True):
            own = [point for point in points if point["method"] == method]
            xs, ys = [point["value"] for point in own], [point["ratio"] for point in own]
            spread = [[y - p["low"] for y, p in zip(ys, own)], [p["high"] - y for y, p in zip(ys, own)]]
            axes.errorbar(xs, ys, yerr=spread, marker="o", capsize=3, label=method)
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xlabel(name)
        axes.set_ylabel("step / step of the frozen base")
        axes.legend()
        figure.tight_layout()
        path = folder / f"step-by-{name.replace(' ', '-')}.png"
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        paths.append(path)
    return paths
