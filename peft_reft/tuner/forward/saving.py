"""Saving: every orthonormal `reft_R` in a state dict has orthonormal rows, whatever wrote to the parameter.

This module knows how torch collects a state dict. When the whole model is saved, a hook on the base model retracts the
R of all layers in one batch. When only a part of the model is saved, such as one block, no hook on the base model
runs, and the hook of each layer retracts its own R.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..parameters.bases import retract_stale
from .plan import Layer, ModelState


class SaveHook:
    """The state dict hooks of a whole model. An object, not closures: it is copied and pickled with the model.

    Args:
        state (`ModelState`): The state that the model's layers share.
        layers (`Callable`): Returns the model's ReftLayers.
    """

    def __init__(self, state: ModelState, layers: Callable[[], Sequence[Layer]]) -> None:
        self.state = state
        self.layers = layers

    def watch(self, model: nn.Module) -> list[Any]:
        """Register the hooks on a model.

        Returns:
            `list`: The handles of the hooks.
        """
        return [
            model.register_state_dict_pre_hook(self.before),
            # partial, because torch sets an attribute on this hook, and a bound method takes none.
            model.register_state_dict_post_hook(partial(self.after)),
        ]

    def before(self, *_: Any) -> None:
        """Runs before the state dict of the model is collected."""
        _prepare(self.state, self.layers())
        self.state.call.saving = True

    def after(self, *_: Any) -> None:
        """Runs when the state dict of the model has been collected."""
        self.state.call.saving = False


def before_layer(layer: Any, *_: Any) -> None:
    """Runs before the state dict of a ReftLayer is collected. Does nothing if the hook of the whole model has run."""
    if not layer.state.call.saving:
        _prepare(layer.state, [layer])


def _prepare(state: ModelState, layers: Sequence[Layer]) -> None:
    """Retract R in some layers, and drop stacked weights, so that the next forward computes with the saved values.

    Raises:
        ValueError: when a batch of an earlier step failed a check that was deferred.
    """
    state.checks.settle()
    state.forget()
    for layer in layers:
        layer.load_offloaded()
        layer.bases.doubt_all()  # the values decide, not the version counters: a write through `data` shows in none
    retract_stale([layer.bases for layer in layers])
