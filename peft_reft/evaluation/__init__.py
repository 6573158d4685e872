"""Evaluation on the tasks of the ReFT paper: of a base, and of adapters of any of PEFT's kinds on it, side by side.

The console commands are `peft-reft prepare` and `peft-reft evaluate`. docs/evaluation.md has tasks, data, prompts and scoring.
"""

from .data import read_examples
from .evaluate import Settings, evaluate
from .models import Adapter, read_adapters
from .scores import Score, score
from .tasks import TASKS, find_tasks


__all__ = [
    "TASKS",
    "Adapter",
    "Score",
    "Settings",
    "evaluate",
    "find_tasks",
    "read_adapters",
    "read_examples",
    "score",
]
