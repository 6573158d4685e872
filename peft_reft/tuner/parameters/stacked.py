"""The weights of all the edits of a model, prepared for a forward in a few batched operations.

This module knows which layers can be prepared together, and for how long what is prepared holds: in training for one forward, whose
graph it is a part of; else until a weight changes. What an edit makes of its parameters is in interventions.py.

Dimensions: L layers, G groups of weights, R rank, D width.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..interventions import orthogonal
from ..interventions.formulas import INTERVENTIONS, EditWeights
from . import distributed


if TYPE_CHECKING:
    from ..layer import ReftLayer


Parameters = tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]


def layer_weights(layer: ReftLayer, adapter_name: str) -> EditWeights:
    """Those of one layer, by themselves."""
    return _edit_weights(layer, adapter_name, *layer.weights(adapter_name))


def _edit_weights(layer: ReftLayer, adapter_name: str, R: Tensor, W: Tensor | None, b: Tensor | None) -> EditWeights:
    """Those with the settings of a layer, whose parameters these are, or several layers' with one dimension more."""
    intervention = INTERVENTIONS[layer.reft_config[adapter_name].intervention]
    if intervention.orthonormal and torch.is_grad_enabled() and R.requires_grad:
        R = orthogonal.tangent(R)
    return EditWeights.of(intervention, R, W, b, layer.edit(adapter_name).act)


class Prepared:
    """The weights of an adapter in some layers.

    Args:
        layers (`Sequence[ReftLayer]`): The layers. They have the adapter.
        adapter_name (`str`): The adapter.
    """

    def __init__(self, layers: Sequence[ReftLayer], adapter_name: str) -> None:
        by_kind: dict[tuple, list[tuple[ReftLayer, Parameters]]] = defaultdict(list)
        for layer in layers:
            parameters = layer.weights(adapter_name)
            R = parameters[0]
            by_kind[R.shape, R.dtype, R.device].append((layer, parameters))
        self._stacks: list[tuple[tuple[ReftLayer, ...], EditWeights]] = []
        for alike in by_kind.values():
            same, parameters_of = zip(*alike)
            stacked = [None if one[0] is None else torch.stack(one) for one in zip(*parameters_of)]
            assert stacked[0] is not None
            self._stacks.append((same, _edit_weights(same[0], adapter_name, stacked[0], *stacked[1:])))
        self._by_layer: dict[torch.dtype | None, dict[str, EditWeights]] = {}

    def by_layer(self, dtype: torch.dtype | None = None) -> dict[str, EditWeights]:
        """Those of each layer, by its name, in their own dtype or another."""
        if dtype not in self._by_layer:
            self._by_layer[dtype] = {
                layer.name: weights
                for layers, stacked in self._stacks
                for layer, weights in zip(layers, (stacked if dtype is None else stacked.to(dtype)).unbind())
            }
        return self._by_layer[dtype]


class PreparedWeights:
    """What has been prepared of a model's adapters, for forwards that compute no gradients of them.

    It holds until a parameter is replaced or written to, an optimizer has made a step, or `forget` is called. A write through a
    parameter's `data` leaves no trace: `forget` is called where such writes are usual.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str], tuple[int, list[nn.Parameter], list[int], Prepared]] = {}
        self._age = 0  # what a thread prepares while another has it forgotten is of an age that is over

    def __getstate__(self) -> dict:
        return {"_kept": {}, "_age": 0}

    def forget(self) -> None:
        """Let all be prepared anew."""
        self._age += 1
        self._kept.clear()

    def of(self, layers: Sequence[ReftLayer], adapter_name: str) -> Prepared:
        """The weights of an adapter in all the layers of an encoder, or of the rest, that have it."""
        if distributed.is_distributed():  # FSDP2 fills parameters anew without a trace
            return _prepare_without_graph(layers, adapter_name)
        parameters = [one for layer in layers for one in layer.weights(adapter_name) if one is not None]
        age, versions = self._age, [0 if one.is_inference() else one._version for one in parameters]
        key = (adapter_name, layers[0].name)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == age and kept[2] == versions and all(map(operator.is_, parameters, kept[1])):
            return kept[3]
        prepared = _prepare_without_graph(layers, adapter_name)
        self._kept[key] = (age, parameters, versions, prepared)
        return prepared


@torch.no_grad()
def _prepare_without_graph(layers: Sequence[ReftLayer], adapter_name: str) -> Prepared:
    with torch.inference_mode(False):  # no later graph could use its tensors
        return Prepared(layers, adapter_name)


def can_be_prepared(layers: Sequence[ReftLayer], adapter_name: str) -> bool:
    """Whether the parameters of an adapter hold its weights before the layers run. What an engine keeps, it brings into a layer
    when that runs."""
    return not distributed.is_distributed() or not any(
        distributed.is_kept(layer.reft_R[adapter_name]) for layer in layers
    )


def needs_gradient(layer: ReftLayer, adapter_name: str) -> bool:
    """Whether any parameter of an adapter in a layer is trained."""
    return any(parameter is not None and parameter.requires_grad for parameter in layer.weights(adapter_name))
