"""The optimizer's steps, after which bases are to be made orthonormal again.

A parameter's version counter does not show every step: fused optimizers (Trainer's default), bitsandbytes' and DeepSpeed's write
past it. So a hook that torch calls after the step of any optimizer marks what the optimizer has changed. A basis that an engine
keeps is retracted there and then (sharding.py has the reason), any other where it is next read.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from . import sharding


if TYPE_CHECKING:
    from .context import ForwardContext


# In the order in which they were made, which is that of all processes: a set would give each its own.
_watching: list[weakref.ref[ForwardContext]] = []


def watch(context: ForwardContext) -> None:
    """Mark what optimizers change of the layers of a context, for as long as it lives."""
    if not _hooked:
        _hooked.append(register_optimizer_step_post_hook(_after_step))
    if not any(known() is context for known in _watching):
        _watching.append(weakref.ref(context))


_hooked: list[Any] = []


@torch.compiler.disable
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Hook of all optimizers."""
    _watching[:] = [known for known in _watching if known() is not None]
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    kept = []
    for context in [known() for known in _watching]:
        for layer in context.layers if context is not None else ():
            for name, basis in layer.orthonormal_bases().items():
                if sharding.is_kept(basis):
                    # DeepSpeed's optimizers step parameters of its own.
                    if id(basis) in stepped or (basis.requires_grad and sharding.is_in_zero(basis)):
                        kept.append(basis)
                elif id(basis) in stepped:
                    layer.mark_stale(name)
    sharding.retract(kept)
