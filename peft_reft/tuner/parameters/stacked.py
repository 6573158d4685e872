"""The weights of an adapter in all layers, stacked and computed in a few batched operations.

This module knows which layers can be stacked, and how long a stack is valid: with a gradient, for the forward whose
graph it is a part of; without, until a parameter changes. interventions/apply.py computes an edit's weights from its
parameters.

Dimensions: G groups of weights, R rank, D width of the hidden state.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from ..interventions.apply import Edit, EditWeights, edit_weights
from . import distributed


Parameters = tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]  # R, W and b of an adapter in a layer


class LayerAdapter(NamedTuple):
    """An adapter in use in one layer. Each layer is asked for those once a forward.

    Args:
        layer_name (`str`): The name of the layer in the model.
        adapter_name (`str`): The adapter.
        in_encoder (`bool`): Whether the layer is part of the encoder of an encoder-decoder model.
        edit (`Edit`): The edit.
        R, W, b (`torch.nn.Parameter`): Its parameters, [G, R, D], [G, R, D] and [G, R]. None for W or b where it has
            none.
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
    """The weights of an adapter in some layers, stacked by shape, dtype and device of R.

    They are in the dtype of the parameters, and a part of the graph where gradients are enabled.

    Args:
        layers (`Sequence[LayerAdapter]`): The adapter in each layer.

    Attributes:
        by_layer (`dict[str, EditWeights]`): Layer name -> its weights, views of the stack.
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
        """The weights of one layer in bfloat16. The first call casts those of all layers."""
        if self._in_bfloat16 is None:
            self._in_bfloat16 = self._unbind(torch.bfloat16)
        return self._in_bfloat16[layer_name]


@dataclass(eq=False)
class InferenceWeights:
    """The stacks of a model's adapters, cached for forwards that compute no gradient of the weights.

    An entry is valid until one of its parameters is replaced or written to. `ModelState.forget` takes a new cache at a
    step of an optimizer, and where callbacks write through a parameter's `data`, which no version counter shows; an
    entry that another thread is building then goes to the old cache.
    """

    _entries: dict[tuple[str, str], tuple[list[nn.Parameter], list[int], Stacked]] = field(default_factory=dict)

    def __getstate__(self) -> dict:
        return {"_entries": {}}

    def of(self, layers: Sequence[LayerAdapter]) -> Stacked:
        """The weights of an adapter, from the cache where they are still valid.

        Args:
            layers (`Sequence[LayerAdapter]`): The adapter in all layers of the encoder that have it, or in all other
                layers.
        """
        if distributed.is_distributed():  # FSDP2 refills parameters, which no version counter shows
            return _stack_without_graph(layers)
        parameters = [one for layer in layers for one in layer.parameters if one is not None]
        versions = [0 if one.is_inference() else one._version for one in parameters]
        key = (layers[0].adapter_name, layers[0].layer_name)
        entry = self._entries.get(key)
        if entry is not None:
            known, known_versions, stacked = entry
            if known_versions == versions and len(known) == len(parameters):
                if all(map(operator.is_, parameters, known)):
                    return stacked
        stacked = _stack_without_graph(layers)
        self._entries[key] = (parameters, versions, stacked)
        return stacked


@torch.no_grad()
def _stack_without_graph(layers: Sequence[LayerAdapter]) -> Stacked:
    with torch.inference_mode(False):  # tensors made in inference mode could not be used in a later graph
        return Stacked(layers)


def can_be_stacked(layers: Sequence[LayerAdapter]) -> bool:
    """Whether the parameters of an adapter hold its values before the layers run. Those that an engine owns do not:
    the engine gathers them for each layer when that layer runs."""
    return not distributed.is_distributed() or not any(distributed.is_owned_by_engine(layer.R) for layer in layers)


def needs_gradient(layers: Sequence[LayerAdapter]) -> bool:
    """Whether any parameter of an adapter requires a gradient, in any of these layers."""
    return any(one is not None and one.requires_grad for layer in layers for one in layer.parameters)
