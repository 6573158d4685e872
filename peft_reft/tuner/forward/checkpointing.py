"""Activation checkpointing of the blocks that edited modules lie in.

A checkpointed block runs again in backward, when the forward that it belonged to is over and another may have run since.
Blocks that are edited whole are not concerned: their edit stands outside. Modules inside a block are run again with it, and
must then read what their own forward read. Nothing that a recompute is given says which forward that was, so it is noted
where the recompute is set up: in the function with which transformers (`_gradient_checkpointing_func`) and torch
(`CheckpointWrapper.checkpoint_fn`) checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from .transformers_api import CHECKPOINT_FUNCTIONS


class BoundCheckpoint:
    """A checkpoint function whose recompute happens as part of the forward that set it up.

    Args:
        function (`Callable`): The checkpoint function: takes what to run, and its arguments.
        remember (`Callable`): Called in the forward; returns a function that gives a context, in which the recompute runs as
            part of that forward.
    """

    def __init__(self, function: Callable, remember: Callable[[], Callable[[], AbstractContextManager]]) -> None:
        self.function = function
        self.remember = remember

    def __call__(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        as_in_this_forward = self.remember()

        def run_again(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with as_in_this_forward():
                return run(*inner_args, **inner_kwargs)

        return self.function(run_again, *args, **kwargs)


def bind_checkpoints(
    modules: Iterable[nn.Module], remember: Callable[[], Callable[[], AbstractContextManager]]
) -> None:
    """Bind the checkpoint function of every module that has one. Those that are bound already stay as they are."""
    for module in modules:
        for name in CHECKPOINT_FUNCTIONS:
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, BoundCheckpoint):
                setattr(module, name, BoundCheckpoint(function, remember))


def unbind_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Give every module its own checkpoint function back."""
    for module in modules:
        for name in CHECKPOINT_FUNCTIONS:
            function = module.__dict__.get(name)
            if isinstance(function, BoundCheckpoint):
                setattr(module, name, function.function)


def checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether a module checkpoints in the way that needs inputs with a gradient, as far as can be told: it is, if not told not to."""
    for name in CHECKPOINT_FUNCTIONS:
        function = module.__dict__.get(name)
        if isinstance(function, BoundCheckpoint):
            function = function.function
        if function is not None and getattr(function, "keywords", {}).get("use_reentrant") is not False:
            return True
    return False
