"""Activation checkpointing of the blocks that edited modules lie in, and where backward stops.

A checkpointed block runs again in backward, when the forward that it belonged to is over and another may have run since.
Blocks that are edited whole are not concerned: their edit stands outside. Modules inside a block are run again with it, and
must then read what their own forward read. Nothing that a recompute is given says which forward that was, so it is noted
where the recompute is set up: in the function with which transformers (`_gradient_checkpointing_func`) and torch
(`CheckpointWrapper.checkpoint_fn`) checkpoint.

Backward stops at the first edited layer. Below it there is nothing to train, so autograd stores nothing there, unless the embeddings
are made to need a gradient by `enable_input_require_grads`, as trainers do for adapters. Reentrant checkpointing needs that; without
it, the gradient only sends backward through blocks whose gradients nobody reads, and keeps their activations for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

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


class BackwardStop:
    """Takes the gradient that `enable_input_require_grads` asks for away again, where nothing needs it."""

    def __init__(self) -> None:
        self._asking: Any = None  # transformers' handle, when it was last looked at
        self._own: Any = None
        self._stopping = False

    def watch(self, model: nn.Module) -> None:
        """Look, before a training forward of the base model, at what it has been made to do since the last."""
        asking = getattr(model, "_require_grads_hook", None)
        if asking is not self._asking:
            self._asking = asking
            self.remove()
            embeddings = model.get_input_embeddings() if asking is not None else None  # type: ignore[operator]
            if isinstance(embeddings, nn.Module):
                self._own = embeddings.register_forward_hook(self._after_embeddings)  # after transformers' own
        self._stopping = self._own is not None and not any(map(checkpoints_reentrantly, model.modules()))

    def remove(self) -> None:
        """Let the embeddings be."""
        if self._own is not None:
            self._own.remove()
            self._own = None

    def _after_embeddings(self, embeddings: nn.Module, args: tuple, output: Any) -> Tensor | None:
        # What is trained below would have made it something else than a leaf.
        asked_for = isinstance(output, Tensor) and output.is_leaf and output.requires_grad
        return output.detach() if self._stopping and asked_for and torch.is_grad_enabled() else None
