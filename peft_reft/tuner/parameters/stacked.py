"""The weights of an adapter in all layers, stacked and prepared for a forward in a few batched operations.

This module knows which layers can be prepared together, and for how long the result holds: in training for one forward, whose
graph it is a part of; else until a weight changes. What an edit makes of its parameters is in interventions/apply.py.

Dimensions: L layers, G groups of weights, R rank, D width.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..interventions.apply import Edit, EditWeights, edit_weights
from . import distributed


Parameters = tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]


class LayerAdapter(NamedTuple):
    """An adapter in use in one layer: what the layer answers when it is asked, once a forward.

    Args:
        layer_name (`str`): The layer.
        adapter_name (`str`): The adapter.
        in_encoder (`bool`): Whether the layer lies in the encoder of an encoder-decoder model.
        edit (`Edit`): What the adapter does to each row.
        R, W, b (`torch.nn.Parameter`): Its parameters, [G, R, D], [G, R, D] and [G, R]; None for those that it does not have.
    """

    layer_name: str
    adapter_name: str
    in_encoder: bool
    edit: Edit
    R: nn.Parameter
    W: nn.Parameter | None
    b: nn.Parameter | None

    @property
    def parameters(self) -> Parameters:
        """R, W and b."""
        return self.R, self.W, self.b


class Stacked:
    """The weights of an adapter in some layers, in the dtype of their parameters.

    Args:
        layers (`Sequence[LayerAdapter]`): The adapter in each layer.
    """

    def __init__(self, layers: Sequence[LayerAdapter]) -> None:
        by_kind: dict[tuple, list[LayerAdapter]] = defaultdict(list)
        for layer in layers:
            by_kind[layer.R.shape, layer.R.dtype, layer.R.device].append(layer)
        self._stacks: list[tuple[list[str], EditWeights]] = []
        for alike in by_kind.values():
            R, W, b = (
                None if one[0] is None else torch.stack(one) for one in zip(*(layer.parameters for layer in alike))
            )
            assert R is not None
            self._stacks.append(([layer.layer_name for layer in alike], edit_weights(alike[0].edit, R, W, b)))
        self.by_layer = self._unbind(None)
        self._in_bfloat16: dict[str, EditWeights] | None = None

    def _unbind(self, dtype: torch.dtype | None) -> dict[str, EditWeights]:
        return {
            name: weights
            for names, stacked in self._stacks
            for name, weights in zip(names, (stacked if dtype is None else stacked.to(dtype)).unbind())
        }

    def in_bfloat16(self, layer_name: str) -> EditWeights:
        """Those of one layer in bfloat16, cast for all layers at once when they are first asked for."""
        if self._in_bfloat16 is None:
            self._in_bfloat16 = self._unbind(torch.bfloat16)
        return self._in_bfloat16[layer_name]


class InferenceWeights:
    """What has been stacked of a model's adapters, for forwards that compute no gradients of them.

    It holds until a parameter is replaced or written to, an optimizer has made a step, or `forget` is called. A write through a
    parameter's `data` leaves no trace: `forget` is called where such writes are usual.
    """

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], tuple[int, list[nn.Parameter], list[int], Stacked]] = {}
        self._age = 0  # bumped by forget(); an entry that another thread built before that is discarded

    def __getstate__(self) -> dict:
        return {"_entries": {}, "_age": 0}

    def forget(self) -> None:
        """Let all be stacked anew."""
        self._age += 1
        self._entries.clear()

    def of(self, layers: Sequence[LayerAdapter]) -> Stacked:
        """The weights of an adapter in all the layers of an encoder, or of the rest, that have it."""
        if distributed.is_distributed():  # FSDP2 fills parameters anew without a trace
            return _stack_without_graph(layers)
        parameters = [one for layer in layers for one in layer.parameters if one is not None]
        age, versions = self._age, [0 if one.is_inference() else one._version for one in parameters]
        key = (layers[0].adapter_name, layers[0].layer_name)
        entry = self._entries.get(key)
        if entry is not None:
            known_age, known, known_versions, stacked = entry
            if known_age == age and known_versions == versions and len(known) == len(parameters):
                if all(map(operator.is_, parameters, known)):
                    return stacked
        stacked = _stack_without_graph(layers)
        self._entries[key] = (age, parameters, versions, stacked)
        return stacked


@torch.no_grad()
def _stack_without_graph(layers: Sequence[LayerAdapter]) -> Stacked:
    with torch.inference_mode(False):  # no later graph could use its tensors
        return Stacked(layers)


def can_be_stacked(layers: Sequence[LayerAdapter]) -> bool:
    """Whether the parameters of an adapter hold its weights before the layers run. What an engine owns, it brings into a layer
    when that runs."""
    return not distributed.is_distributed() or not any(distributed.is_kept(layer.R) for layer in layers)


def needs_gradient(layers: Sequence[LayerAdapter]) -> bool:
    """Whether any parameter of an adapter is trained in any of some layers."""
    return any(one is not None and one.requires_grad for layer in layers for one in layer.parameters)
