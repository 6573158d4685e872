"""Worker processes, and measurements in pairs.

A machine's speed drifts by more than the differences to be measured. So the runs of all models are interleaved, in
another order in each turn, and each time is divided by the base's of the same turn, in the same process. The median
and the quartiles of these ratios are reported.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any


class WorkerError(RuntimeError):
    """A worker could not do what it was asked."""


class Worker:
    """A process that runs worker.py, to be used in a `with` block.

    Args:
        python (`str`, *optional*): The interpreter of an environment. None: that of this process.
        threads (`int`): Threads of torch.
        log (`Path`, *optional*): The file that its libraries' output goes to. None: nowhere.
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
        """Have the worker run a method of its `Bench`, and return the answer.

        Raises:
            WorkerError: when the method raises, with its message, or when the process has stopped.
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
    """The time of a run, as a multiple of the time of another.

    Args:
        seconds (`float`): The median of its times.
        ratio (`float`): The median of the ratios of pairs.
        low, high (`float`): The quartiles of these ratios.
        pairs (`int`): How many pairs there were.
    """

    seconds: float
    ratio: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, own: Sequence[float], other: Sequence[float]) -> Ratio:
        """Compare the seconds of runs with the seconds of those that they are paired with."""
        ratios = [a / b for a, b in zip(own, other)]
        low, _, high = quantiles(ratios, n=4)
        return cls(median(own), median(ratios), low, high, len(ratios))

    def as_dict(self) -> dict[str, float]:
        """The fields, for JSON."""
        return asdict(self)


def interleave(
    runs: dict[str, Callable[[], float]], pairs: int, warmup: int = 3, tick: Callable[[], None] | None = None
) -> dict[str, list[float]]:
    """Run all of `runs` `pairs` times, each turn in an order of its own, and return the seconds of each.

    A run is slower after some runs than after others, by what they leave in the processor's caches. So its neighbours
    change."""
    names, chance = list(runs), random.Random(0)
    for _ in range(warmup):
        for name in names:
            runs[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(pairs):
        for name in chance.sample(names, len(names)):
            seconds[name].append(runs[name]())
        if tick is not None:
            tick()
    return seconds
