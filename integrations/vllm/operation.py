"""The edit of a decoder layer's output, as an operation of torch that a layer runs behind its own forward.

A compiled model is traced once, before any adapter is known. So the operation stands in the graph of every layer, and
asks when it runs whether the layer has something to edit in this step. A CUDA graph records kernels, not the question:
it is recorded with nothing to edit, so it holds no kernel of the plugin. Steps with something to edit run outside of
CUDA graphs (worker_hooks.py), where the operation runs.

Dimensions: F tokens of the step, T tokens to edit, Q directions of all groups of weights, D width of the hidden
state.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_reft.tuner.interventions.apply import Edit, EditWeights, coefficients

from .layers import Layout


SCHEMA = "edit_in_place(Tensor(a!) hidden, Tensor(b!)? residual, Tensor place) -> ()"


@dataclass(frozen=True)
class Job:
    """One adapter's edit of one layer's output in one step.

    Args:
        index_T (`torch.LongTensor`): [T], the tokens to edit, as rows of the step.
        edit (`Edit`): The edit.
        weights (`EditWeights`): Its weights for the layer.
        unused_TQ (`torch.BoolTensor`, *optional*): [T, Q], the directions in which a token is not edited.
        scale_T1 (`torch.FloatTensor`, *optional*): [T, 1], the strength of each token's edit. None: 1.
    """

    index_T: Tensor
    edit: Edit
    weights: EditWeights
    unused_TQ: Tensor | None
    scale_T1: Tensor | None = None


class Place:
    """A decoder layer's place in a model: what is edited there in the step that runs.

    Args:
        device (`torch.device`): That of the layer.

    Attributes:
        jobs (`list[Job]`): The edits of the step.
        done (`bool`): Whether they were made.
        tensor (`torch.Tensor`): [1], stands for the place among the arguments of the operation. A graph takes it as an
            input, where a number would be a constant of the graph: then no two layers could share compiled code.
    """

    of_address: dict[int, Place] = {}

    def __init__(self, device: torch.device) -> None:
        self.jobs: list[Job] = []
        self.done = True
        self.tensor = torch.zeros(1, dtype=torch.uint8, device=device)
        Place.of_address[self.tensor.data_ptr()] = self

    def start(self, jobs: list[Job]) -> None:
        self.jobs, self.done = jobs, not jobs


def edit_in_place(hidden_FD: Tensor, residual_FD: Tensor | None, place: Tensor) -> None:
    """Edit in place what a decoder layer returned.

    Args:
        hidden_FD (`torch.Tensor`): [F, D], the layer's output, or what it adds to `residual_FD`.
        residual_FD (`torch.Tensor`, *optional*): [F, D], where the layer's output is the sum of both.
        place (`torch.Tensor`): `Place.tensor` of the layer.
    """
    here = Place.of_address.get(place.data_ptr())
    if here is None or here.done:
        return
    for job in here.jobs:
        index_T, weights = job.index_T, job.weights
        h_TD = hidden_FD.index_select(0, index_T)
        if residual_FD is not None:
            h_TD += residual_FD.index_select(0, index_T)
        wide_TD = h_TD.to(weights.R_QD.dtype)
        c_TQ = coefficients(job.edit, wide_TD, weights)
        if job.unused_TQ is not None:
            c_TQ = c_TQ.masked_fill(job.unused_TQ, 0.0)
        if job.scale_T1 is not None:
            c_TQ = c_TQ * job.scale_T1.to(c_TQ.dtype)
        edited_TD = wide_TD.addmm_(c_TQ, weights.R_QD).to(h_TD.dtype)
        if job.scale_T1 is not None:
            # A client chose the strength, which may take a state beyond its dtype layer by layer. An infinite state
            # turns to NaN in the cache of keys and values, and vLLM's attention on CPUs multiplies what an earlier
            # request left in a block by a probability of 0: NaN then reaches the request that has the block next.
            limit = torch.finfo(edited_TD.dtype).max ** 0.5
            edited_TD = edited_TD.nan_to_num_(0.0).clamp_(-limit, limit)
        if residual_FD is None:
            hidden_FD.index_copy_(0, index_T, edited_TD)
        else:
            residual_FD.index_copy_(0, index_T, edited_TD)
            hidden_FD.index_fill_(0, index_T, 0)  # the state that the next norm reads is hidden + residual
    here.done = True


_library = torch.library.Library("peft_reft", "DEF")
_library.define(SCHEMA)
_library.impl("edit_in_place", edit_in_place, "CompositeExplicitAutograd")
_library._register_fake("edit_in_place", lambda hidden, residual, place: None)


@functools.cache
def edited_class(block_class: type[nn.Module], layout: Layout, traced: bool) -> type[nn.Module]:
    """A subclass of a decoder layer's class whose output is edited.

    Where the layer does not return what the layout says, nothing is edited, and `EditedModel.finish` finds that out.

    Args:
        block_class (`type`): The layer's class.
        layout (`str`): What the layer returns.
        traced (`bool`): Whether a compiler traces the model, and so must see an operation of torch.
    """
    edit = torch.ops.peft_reft.edit_in_place.default if traced else edit_in_place

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        returned = block_class.forward(self, *args, **kwargs)
        if layout == "alone" and isinstance(returned, Tensor):
            edit(returned, None, self._reft_place)
        elif layout != "alone" and isinstance(returned, tuple) and len(returned) == 2:
            hidden, residual = returned
            edit(hidden, residual if layout == "sum" else None, self._reft_place)
        return returned

    return type(block_class.__name__, (block_class,), {"forward": forward, "__module__": block_class.__module__})
