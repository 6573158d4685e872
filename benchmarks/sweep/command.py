"""The command `python -m benchmarks sweep`."""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from ..report import markdown_table, print_table
from .grids import GRIDS, planned
from .records import Records
from .settings import Run
from .tables import table, written


def sweep(
    grid: Annotated[list[str], typer.Argument(help="grids: " + ", ".join(GRIDS))],
    data: Annotated[Path, typer.Option(help="folder with the tasks' files")] = Path("data"),
    base: Annotated[
        str, typer.Option(help="folder or hub name of the language model")
    ] = "outputs/SmolLM2-135M-Instruct",
    encoder: Annotated[str, typer.Option(help="folder or hub name of the encoder")] = "outputs/MiniLM-L6",
    seed: Annotated[
        list[int] | None, typer.Option(help="a seed; several times for several (default: 1, 2, 3)")
    ] = None,
    where: Annotated[
        list[str] | None,
        typer.Option(help="only runs with this setting, rank=4 for example; several times for several settings"),
    ] = None,
    records: Annotated[Path, typer.Option(help="file of results; runs that are there are not made again")] = Path(
        "outputs/sweep/records.jsonl"
    ),
    out: Annotated[Path, typer.Option(help="folder for tables and plots")] = Path("outputs/sweep"),
    plan: Annotated[
        bool, typer.Option("--plan", help="say how many runs there are and what they take, and stop")
    ] = False,
    show: Annotated[bool, typer.Option("--show", help="show the results that are there, and make no run")] = False,
    limit: Annotated[int | None, typer.Option(help="make this many runs at most, the most important first")] = None,
    threads: Annotated[int, typer.Option(help="threads of torch")] = 1,
) -> None:
    """Which settings to choose: train many of them on two small models, and show how they score."""
    unknown = [name for name in grid if name not in GRIDS]
    if unknown:
        raise typer.BadParameter(f"There is no grid {', '.join(unknown)}. There are {', '.join(GRIDS)}.")
    kept = Records(records)
    runs = [run for run in planned(grid, seed) if all(has(run, setting) for setting in where or [])]
    missing = [run for run in runs if kept.find(run) is None]
    if plan:
        typer.echo(describe_plan(runs, missing, kept))
        return
    if missing and not show:
        make(missing[:limit], kept, data, base, encoder, threads)
    out.mkdir(parents=True, exist_ok=True)
    for name in grid:
        columns, lines = table(GRIDS[name], kept)
        console = Console(width=None if sys.stdout.isatty() else 160)
        print_table(GRIDS[name].question, columns, lines, console=console)
        (out / f"{name}.md").write_text(markdown_table(columns, lines) + "\n", encoding="utf-8")
        if GRIDS[name].plot is not None and lines:
            from .plots import plot

            typer.echo(f"Written: {plot(name, GRIDS[name], kept, out)}")


def has(run: Run, setting: str) -> bool:
    """Whether a run has a setting, written as `name=value`. Runs whose method does not read it have it not."""
    name, _, value = setting.partition("=")
    names = [one.name for one in fields(Run)]
    if name not in names:
        raise typer.BadParameter(f"--where {setting}: write name=value, with one of {', '.join(names)}.")
    return name in run.described() and written(run.described()[name]) == value


def describe_plan(runs: list[Run], missing: list[Run], kept: Records) -> str:
    """What is to do: the number of runs, those that are there, and the processor time of the others."""
    seconds = sum(estimated_seconds(run, kept) for run in missing)
    return (
        f"{len(runs)} runs, of which {len(runs) - len(missing)} are there. "
        f"The other {len(missing)} take about {seconds / 60:.0f} minutes of a core."
    )


def estimated_seconds(run: Run, kept: Records) -> float:
    """What a run takes: the mean of the runs like it that are there, else the task's rough number."""
    from .tasks import TASKS

    def like(settings: dict) -> bool:
        names = ("task", "method", "examples", "epochs")
        return all(settings.get(name) == run.described().get(name) for name in names)

    seconds = [record["cpu_seconds"] for record in kept if like(record["settings"])]
    return mean(seconds) if seconds else TASKS[run.task].seconds


def make(missing: list[Run], kept: Records, data: Path, base: str, encoder: str, threads: int) -> None:
    """Make runs, and keep each result as soon as it is there."""
    import torch

    from .runs import Runner
    from .tasks import Places

    torch.set_num_threads(threads)
    runner = Runner(Places(data, base, encoder))
    with Progress() as progress:
        bar = progress.add_task("runs", total=len(missing))
        for run in missing:
            progress.update(bar, description=f"{run.task} {run.method}, seed {run.seed}")
            result = runner.make(run)
            kept.add(run, result)
            progress.console.print(
                f"{result['score']:.3f} in {result['cpu_seconds']:.0f} s  {run.key}", soft_wrap=True
            )
            progress.advance(bar)
