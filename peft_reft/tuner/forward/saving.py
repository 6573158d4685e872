"""What is saved is right: every `reft_R` that a state dict holds has orthonormal rows, whatever wrote it.

This module knows how torch collects a state dict. Of the whole model the bases are made orthonormal at once, by a hook on the base
model. A part of it, such as one block, has no such hook, and each of its layers sees to its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..parameters.bases import retract_stale
from .plan import Layer, ModelState


class SaveHook:
    """Sees to the state dicts of a whole model. An object rather than closures, to be copied and pickled.

    Args:
        state (`ModelState`): The state of the model.
        layers (`Callable`): Gives its ReftLayers.
    """

    def __init__(self, state: ModelState, layers: Callable[[], Sequence[Layer]]) -> None:
        self.state = state
        self.layers = layers

    def watch(self, model: nn.Module) -> list[Any]:
        """Put the hook on a model. Returns handles that take it off again."""
        return [
            model.register_state_dict_pre_hook(self.before),
            model.register_state_dict_post_hook(partial(self.after)),
        ]

    def before(self, *_: Any) -> None:
        """State dict hook of the model."""
        _settle(self.state, self.layers())
        self.state.call.saving = True

    def after(self, *_: Any) -> None:
        """State dict hook of the model."""
        self.state.call.saving = False


def before_layer(layer: Any, *_: Any) -> None:
    """State dict hook of a ReftLayer."""
    if not layer.state.call.saving:
        _settle(layer.state, [layer])


def _settle(state: ModelState, layers: Sequence[Layer]) -> None:
    """Have the parameters of some layers be what is to be saved, and the next forward read them as they are saved."""
    state.checks.settle()
    state.weights.forget()
    for layer in layers:
        layer.keep_weights()
        layer.bases.doubt_all()
    retract_stale([layer.bases for layer in layers])
