"""Evaluates a base model, and adapters of any PEFT method on it, on the tasks of the ReFT paper, side by side.

The console commands are `peft-reft prepare` and `peft-reft evaluate`. docs/evaluation.md has tasks, data, prompts and
scoring.
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
