"""What is saved is right: every `reft_R` that a state dict holds has orthonormal rows, whatever wrote it.

This module knows how torch collects a state dict. Of the whole model the bases are made orthonormal at once, by a hook on the base
model. A part of it, such as one block, has no such hook, and each of its layers sees to its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from ..parameters.bases import retract_stale


if TYPE_CHECKING:
    from ..layer import ReftLayer
    from .context import ForwardContext


def watch_saving(model: nn.Module, context: ForwardContext) -> list[Any]:
    """See to the state dicts of a model.

    Args:
        model (`torch.nn.Module`): The base model.
        context (`ForwardContext`): Its context.

    Returns:
        `list`: Handles that take the hooks off again.
    """
    return [
        model.register_state_dict_pre_hook(partial(_before_model, context)),
        model.register_state_dict_post_hook(partial(_after_model, context)),
    ]


def _before_model(context: ForwardContext, *_: Any) -> None:
    _settle(context, context.layers)
    context.state.saving = True


def _after_model(context: ForwardContext, *_: Any) -> None:
    context.state.saving = False


def before_layer(layer: Any, *_: Any) -> None:
    """State dict hook of a ReftLayer."""
    if not layer.context.state.saving:
        _settle(layer.context, [layer])


def _settle(context: Any, layers: Sequence[ReftLayer]) -> None:
    """Have the parameters of some layers be what is to be saved, and the next forward read them as they are saved."""
    context.settle_checks()
    context.forget_weights()
    for layer in layers:
        layer.keep_weights()
        layer.bases.doubt_all()
    retract_stale(layers)
