"""Activation checkpointing around edited modules, and the point at which backward stops.

A checkpointed block runs again in backward: a recompute. By then its forward is over, and another forward may have
run. An edited block is safe: ReftLayer wraps the checkpointed block, so its edit is never recomputed. An edited module
inside a block is recomputed with the block, and must edit the tokens of the forward that it belongs to. The arguments
of a recompute do not say which forward that is. So the plan of the forward is bound to the function that sets the
recompute up: `_gradient_checkpointing_func` of transformers' blocks, `checkpoint_fn` of torch's `CheckpointWrapper`.

Backward stops at the first edited layer. Below that layer nothing is trained, so autograd stores no activations there.
But trainers call `enable_input_require_grads` for adapters, which makes the embeddings require grad. Only reentrant
checkpointing needs that. Elsewhere backward would run through the lower blocks, and store their activations, for a
gradient that nobody reads; `BackwardStop` prevents it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .transformers_api import CHECKPOINT_FUNCTIONS


class BoundCheckpoint:
    """A checkpoint function that runs the recompute with the plan of the forward that set it up.

    Args:
        function (`Callable`): The original checkpoint function. It takes a function to run and its arguments.
        remember (`Callable`): Called in the forward. Returns a function that makes a context manager, in which layers
            read the plan of that forward.
    """

    def __init__(self, function: Callable, remember: Callable[[], Callable[[], AbstractContextManager]]) -> None:
        self.function = function
        self.remember = remember

    def __call__(self, run: Callable, *args: Any, **kwargs: Any) -> Any:
        with_this_plan = self.remember()

        def run_again(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with with_this_plan():
                return run(*inner_args, **inner_kwargs)

        return self.function(run_again, *args, **kwargs)


def bind_checkpoints(
    modules: Iterable[nn.Module], remember: Callable[[], Callable[[], AbstractContextManager]]
) -> None:
    """Replace the checkpoint function of every module that has one by a `BoundCheckpoint`, unless it is one already.

    Args:
        modules (`Iterable[torch.nn.Module]`): The modules.
        remember (`Callable`): See `BoundCheckpoint`.
    """
    for module in modules:
        for name in CHECKPOINT_FUNCTIONS:
            function = module.__dict__.get(name)
            if function is not None and not isinstance(function, BoundCheckpoint):
                setattr(module, name, BoundCheckpoint(function, remember))


def unbind_checkpoints(modules: Iterable[nn.Module]) -> None:
    """Put the original checkpoint function of every module back."""
    for module in modules:
        for name in CHECKPOINT_FUNCTIONS:
            function = module.__dict__.get(name)
            if isinstance(function, BoundCheckpoint):
                setattr(module, name, function.function)


def checkpoints_reentrantly(module: nn.Module) -> bool:
    """Whether a module may checkpoint reentrantly, which needs inputs that require grad. It may unless its checkpoint
    function was made with `use_reentrant=False`."""
    for name in CHECKPOINT_FUNCTIONS:
        function = module.__dict__.get(name)
        if isinstance(function, BoundCheckpoint):
            function = function.function
        if function is not None and getattr(function, "keywords", {}).get("use_reentrant") is not False:
            return True
    return False


class BackwardStop:
    """Detaches the embeddings' output, where it requires grad only because of `enable_input_require_grads`."""

    def __init__(self) -> None:
        self._known_handle: Any = None  # transformers' handle of its hook, as `watch` last saw it
        self._own_handle: Any = None
        self._stopping = False

    def watch(self, model: nn.Module) -> None:
        """Follow, before each training forward, whether a caller has switched `enable_input_require_grads` or
        checkpointing on or off.

        Args:
            model (`torch.nn.Module`): The base model.
        """
        handle = getattr(model, "_require_grads_hook", None)
        if handle is not self._known_handle:
            self._known_handle = handle
            self.remove()
            embeddings = model.get_input_embeddings() if handle is not None else None  # type: ignore[operator]
            if isinstance(embeddings, nn.Module):
                # Registered after transformers' hook, so it runs after that.
                self._own_handle = embeddings.register_forward_hook(self._after_embeddings)
        self._stopping = self._own_handle is not None and not any(map(checkpoints_reentrantly, model.modules()))

    def remove(self) -> None:
        """Take the hook off the embeddings."""
        if self._own_handle is not None:
            self._own_handle.remove()
            self._own_handle = None

    def _after_embeddings(self, embeddings: nn.Module, args: tuple, output: Any) -> Tensor | None:
        # A leaf here means that nothing below is trained: it requires grad only because enable_input_require_grads
        # asked for it, so it may be detached.
        only_asked_for = isinstance(output, Tensor) and output.is_leaf and output.requires_grad
        return output.detach() if self._stopping and only_asked_for and torch.is_grad_enabled() else None
