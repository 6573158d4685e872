"""What stays outside the graphs that torch records of a model.

A hook that reads the cache, the batch and the state of the weights is not compiled: torch.compile calls it between two
graphs. torch.export, whose one graph has no such break, is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch


NO_EXPORT = (
    "torch.export can't record a ReFT adapter: which tokens are edited is found anew for each batch, before the first "
    "layer runs. An edit of all tokens (positions='all') of linear layers can be folded into them: export the model "
    "that merge_and_unload() returns. For any other, use torch.compile, or export the base alone (unload())"
)


def outside_graphs(hook: Callable) -> Callable:
    """`torch.compiler.disable`, with a reason for the error of a strict torch.export, where torch takes one."""
    try:
        return torch.compiler.disable(hook, reason=NO_EXPORT)
    except TypeError:  # before torch 2.8
        return torch.compiler.disable(hook)


def refuse_export() -> None:
    """
    Raises:
        NotImplementedError: when torch.export is recording a graph.
    """
    if getattr(torch.compiler, "is_exporting", lambda: False)():  # torch has it from 2.7 on
        raise NotImplementedError(f"{NO_EXPORT}.")
