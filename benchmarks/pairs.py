"""Processes to measure in, and measurements in pairs.

A machine's speed drifts by more than what is to be measured. So the runs of all subjects are interleaved, and what
counts is the ratio of two that ran one after the other, in the same process; its median, and the quartiles around it,
are reported.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any


class WorkerError(RuntimeError):
    """What a worker could not do."""


class Worker:
    """A process of an environment, to be used in a `with` block.

    Args:
        python (`str`, *optional*): Its interpreter. None: that of this process.
        threads (`int`): Threads of torch.
        log (`Path`, *optional*): Where what its libraries print goes.
    """

    def __init__(self, python: str | None = None, threads: int = 1, log: Path | None = None) -> None:
        script = Path(__file__).with_name("worker.py")
        self._log = (log or Path("/dev/null")).open("a")
        self._process = subprocess.Popen(
            [python or sys.executable, str(script), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something.

        Raises:
            WorkerError: with the error, when it can't.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "{}")
        except (BrokenPipeError, json.JSONDecodeError) as error:
            raise WorkerError(f"the worker stopped while it was to {do}") from error
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


@dataclass
class Ratio:
    """How long something takes, as a multiple of what it is compared with.

    Args:
        seconds (`float`): The median of its runs.
        ratio (`float`): The median of the ratios of pairs.
        low, high (`float`): Their quartiles.
        pairs (`int`): How many there were.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, own: Sequence[float], other: Sequence[float]) -> Ratio:
        """That of runs to those that were paired with them."""
        ratios = [a / b for a, b in zip(own, other)]
        low, _, high = quantiles(ratios, n=4)
        return cls(median(own), median(ratios), low, high, len(ratios))

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def interleave(
    runs: dict[str, Callable[[], float]], pairs: int, warmup: int = 3, tick: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """The seconds of every run, each so many times, in turn and back: A B C, C B A, ..."""
    names = list(runs)
    for _ in range(warmup):
        for name in names:
            runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(pairs):
        for name in names if turn % 2 == 0 else reversed(names):
            seconds[name].append(runs[name]())
        if tick is not None:
            tick()
    return seconds
