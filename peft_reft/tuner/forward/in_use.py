"""The adapters in use in the layers of a model, remembered from one forward to the next.

To ask each layer for its adapters, to look for stale R, and to look up stacked weights are passes over all layers, and
a deep model spends as long on them as on the edits. Their results hold until a layer is changed, which the layer
reports (`ModelState.changed`), or until a parameter is replaced or written to, which the identity and the version
counter of each parameter show in one pass.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

from ..parameters.stacked import LayerAdapter, Stacked


class AdaptersInUse:
    """What each layer of a model answers when it is asked for its adapters in use.

    Args:
        layers (`Sequence[ReftLayer]`): The layers, which are asked here.
        mixed (`Sequence[str]`, *optional*): The adapters of a mixed batch, which replace the active adapters.

    Attributes:
        by_side (`dict[bool, list[LayerAdapter]]`): Whether layers are in an encoder -> the adapters in use in them, in
            the order in which they edit.
        by_name (`dict[bool, dict[str, list[LayerAdapter]]]`): The same by adapter name.
        layer_names (`dict[bool, list[str]]`): Whether layers are in an encoder -> their names, used or not.
        first (`dict[str, LayerAdapter]`): Adapter name -> the adapter in the first layer that uses it.
        stacked (`dict[tuple[str, bool], Stacked]`): Adapter name and whether in an encoder -> its stacked weights,
            without gradient, once a forward has used them.
    """

    def __init__(self, layers: Sequence[Any], mixed: Sequence[str] | None) -> None:
        self.mixed = mixed
        self.first: dict[str, LayerAdapter] = {}
        self.layer_names: dict[bool, list[str]] = {False: [], True: []}
        self.by_side: dict[bool, list[LayerAdapter]] = {False: [], True: []}
        self.by_name: dict[bool, dict[str, list[LayerAdapter]]] = {False: {}, True: {}}
        self.stacked: dict[tuple[str, bool], Stacked] = {}
        for layer in layers:
            self.layer_names[layer.in_encoder].append(layer.name)
            own = layer.adapters_in_use(mixed)
            self.by_side[layer.in_encoder] += own
            for adapter in own:
                self.first.setdefault(adapter.adapter_name, adapter)
                self.by_name[layer.in_encoder].setdefault(adapter.adapter_name, []).append(adapter)
        self._era: object | None = None
        # One for each parameter: its ParameterDict, whose `_parameters` an offloading library may replace, its name
        # there, and the parameter.
        self._places: list[tuple[Any, str]] = []
        self._known: list[Any] = []

    def remember(self, layers: Iterable[Any], era: object) -> None:
        """Note what the answers depend on, when each R in use is orthonormal.

        Args:
            layers (`Iterable[ReftLayer]`): The layers that were asked.
            era (`object`): `ModelState.era` of before they were asked.
        """
        adapters = [*self.by_side[False], *self.by_side[True]]
        known = [(adapter.R, adapter.W, adapter.b) for adapter in adapters]
        parameters = [one for own in known for one in own if one is not None]
        if any(one.is_inference() for one in parameters):  # they count no versions
            return
        # Read `_modules` and `_parameters`: the lookups of Module and ParameterDict are slow.
        self._layers = list(layers)
        modules = {layer.name: layer._modules for layer in self._layers}
        own_modules = [modules[adapter.layer_name] for adapter in adapters]
        for adapter, own in zip(adapters, own_modules):
            self._places += ((own[name], adapter.adapter_name) for name in ("reft_R", "reft_W", "reft_b"))
        self._known = [one for own in known for one in own]
        self._dropouts = [
            own["reft_dropout"]._modules[adapter.adapter_name] for adapter, own in zip(adapters, own_modules)
        ]
        self._scaling = [dict(layer.scaling) for layer in self._layers]
        self._parameters, self._R = parameters, [adapter.R for adapter in adapters]
        self._state = self._read_state()
        self._era = era

    def hold(self, mixed: Sequence[str] | None, era: object) -> bool:
        """Whether the answers would be the same, and each R in use is still orthonormal.

        Args:
            mixed (`Sequence[str]`, *optional*): The adapters of the mixed batch of the forward that begins.
            era (`object`): The present `ModelState.era`.
        """
        return (
            era is self._era
            and mixed == self.mixed
            and all(map(operator.is_, [weights._parameters.get(name) for weights, name in self._places], self._known))
            and [layer.scaling for layer in self._layers] == self._scaling
            and self._read_state() == self._state
        )

    def _read_state(self) -> tuple[list[int], list[Any], list[float]]:
        """The versions of the parameters; the dtype of each R, which a cast of its `data` changes alone; and dropout,
        which trainers switch by the mode and the p of its modules."""
        return (
            [one._version for one in self._parameters],
            [one.dtype for one in self._R],
            [module.p if module.training else 0.0 for module in self._dropouts],
        )
