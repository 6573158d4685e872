"""Plots of results along what a grid varies: each seed, their mean, and its interval from three seeds on."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

from .grids import Grid
from .records import Records
from .settings import Run
from .tables import half_width, results, varied, written


LOGARITHMIC = ("rate", "rank", "examples")


def curves(grid: Grid, kept: Records) -> dict[str, list[tuple[Any, list[float]]]]:
    """The curves of a grid's plot: by name, the points (value along the axis, the score of each seed in %).

    A curve is a method with the settings that vary beside the one along the axis.
    """
    assert grid.plot is not None
    rows = results(grid, kept)
    names = [name for name in varied([run for run, _ in rows]) if name != grid.plot]
    found: dict[str, list[tuple[Any, list[float]]]] = {}
    for run, records in rows:
        settings = run.described()
        if grid.plot not in settings:
            continue
        point = (settings[grid.plot], [100 * record["score"] for record in records])
        found.setdefault(curve_name(run, names, rows), []).append(point)
    for points in found.values():
        if not isinstance(points[0][0], str):
            points.sort()
    return found


def curve_name(run: Run, names: list[str], rows: list[tuple[Run, Any]]) -> str:
    """A method, with those of the settings in which runs of the same method differ."""
    own = [other.described() for other, _ in rows if other.method == run.method]
    telling = [name for name in names if len({repr(one[name]) for one in own if name in one}) > 1]
    settings = run.described()
    words = {"positions": "{}", "first_token": {True: "", False: "without token 0"}}
    parts = []
    for name in telling:
        word: Any = words.get(name, f"{name} {{}}")
        parts.append(word[settings[name]] if isinstance(word, dict) else word.format(written(settings[name])))
    return " ".join(part for part in (run.method, *parts) if part)


def plot(name: str, grid: Grid, kept: Records, folder: Path) -> Path:
    """Plot a grid that says what its axis is. Needs matplotlib. Returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Texts stay texts, and nothing in the file depends on when it was made: a plot that is drawn again is the same.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9})
    figure, axes = pyplot.subplots(figsize=(5, 3.2))
    ticks = set()
    for curve, points in curves(grid, kept).items():
        xs = [x for x, _ in points]
        ticks.update(xs)
        style = "o" if isinstance(xs[0], str) else "o-"
        # One seed has no interval, and that of two is wider than any plot: not a number draws none.
        errors = [(half_width(scores) or 0.0) if len(scores) > 2 else math.nan for _, scores in points]
        line = axes.errorbar(
            xs, [mean(scores) for _, scores in points], yerr=errors, fmt=style, markersize=5, capsize=3, label=curve
        )
        for x, scores in points:
            axes.plot([x] * len(scores), scores, "_", color=line[0].get_color(), markersize=8)
    if grid.plot in LOGARITHMIC:
        axes.set_xscale("log")
        axes.set_xticks(sorted(ticks), [f"{x:g}" for x in sorted(ticks)])
        axes.minorticks_off()
    metric = next(records[0]["metric"] for _, records in results(grid, kept))
    axes.set_xlabel(str(grid.plot).replace("_", " "))
    axes.set_ylabel(f"{metric}, %")
    axes.legend(fontsize=7)
    figure.tight_layout()
    path = folder / f"sweep-{name.replace('_', '-')}.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
