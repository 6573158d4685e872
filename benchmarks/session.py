"""What the commands share: their options, and a session of worker processes and results."""

from __future__ import annotations

import json
import platform
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from .methods import SIZES
from .pairs import Worker, interleave


Pairs = Annotated[int, typer.Option(help="how many times each is run")]
Out = Annotated[Path, typer.Option(help="folder for the JSON and the plots")]
Threads = Annotated[int, typer.Option(help="threads of torch")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Size = Annotated[str, typer.Option(help="of the model: " + " or ".join(SIZES))]
OUT = Path("outputs/benchmarks")


class Session:
    """One command: its worker processes, and the results so far."""

    def __init__(self, out: Path, threads: int, pyreft: str | None = None, adapters: str | None = None) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.threads = out, threads
        self.peers = {name: python for name, python in (("pyreft", pyreft), ("adapters", adapters)) if python}
        self._stack = ExitStack()
        self.results: dict[str, Any] = {
            "command": " ".join(["python -m benchmarks", *sys.argv[1:]]),
            "machine": f"{platform.system()} {platform.machine()}, {_processor()}, {threads} thread(s)",
        }

    def __enter__(self) -> Session:
        self._stack.__enter__()
        self.own = self.worker(None)
        self.results["versions"] = self.own.ask("versions")
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def worker(self, python: str | None) -> Worker:
        """Start a worker process with that interpreter. It ends with the session."""
        return self._stack.enter_context(Worker(python, self.threads, self.out / "workers.log"))

    def save(self, name: str) -> None:
        """Write the results to NAME.json."""
        path = self.out / f"{name}.json"
        path.write_text(json.dumps(self.results, indent=1) + "\n")
        typer.echo(
            f"{self.results['command']}\n{self.results['machine']}, {self.results['versions']}\nWritten: {path}"
        )


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def interleave_shown(runs: dict[str, Any], pairs: int, title: str) -> dict[str, list[float]]:
    """`interleave`, with a progress bar."""
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=pairs)
        return interleave(runs, pairs, tick=lambda: progress.advance(task))
