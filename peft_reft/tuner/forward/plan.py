"""The plan of one forward: the jobs of each layer, made before the first layer runs, and the state that layers read.

Time spent in a layer counts as often as a deep model has layers. So whatever does not depend on a layer's hidden state
is looked up here, for all layers in one pass. Layers read `ModelState` and call nothing above them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from ..interventions.apply import Job
from ..parameters.bases import Bases
from ..parameters.stacked import InferenceWeights, LayerAdapter, Stacked
from ..positions.batch import SelectedTokens
from ..positions.deferred_checks import Checks
from ..positions.selection import Selection
from ..positions.spec import Rules
from ..positions.unedited import UneditedRows
from .generation import Generation
from .in_use import AdaptersInUse
from .mixed import MixedBatch


Jobs = dict[str, tuple[Job, ...]]  # layer name -> its jobs, in the order in which its adapters edit


class CallState(threading.local):
    """The state of the call of the model that a thread runs. One for each thread: `torch.nn.DataParallel` runs a model
    in several."""

    mixed: MixedBatch | None = None  # the adapters of the examples, in a mixed batch
    generation: Generation | None = None  # the running `generate`
    given: dict[str, Any] | None = None  # the arguments that only ReFT reads: `prompt_lengths`, `subspaces`, ...
    in_use: AdaptersInUse | None = None  # the adapters in use in each layer
    jobs: Jobs | None = None  # None: no forward is running
    skipped: bool = False  # a decode step is running in which no layer has a job
    recomputed: Jobs | None = None  # the jobs for modules that run in this forward and again in backward
    encoder_alone: bool = False  # the encoder runs outside a forward of the model, as `generate` calls it
    edits: dict[Rules, SelectedTokens] = {}  # the tokens edited in this call, outside `generate`
    saving: bool = False  # the state dict of the whole model is being collected

    @property
    def mixed_adapters(self) -> Sequence[str] | None:
        """The names of the adapters of a mixed batch. None: the batch is not mixed."""
        return None if self.mixed is None else self.mixed.adapters

    def clear(self) -> None:
        """Reset what belongs to a forward, when the forward is over."""
        self.jobs = self.recomputed = self.given = self.in_use = None
        self.edits = {}
        self.skipped = self.saving = False


@dataclass
class ModelState:
    """The state that all ReftLayers of one model share.

    Args:
        call (`CallState`): The state of the call that the current thread runs.
        weights (`InferenceWeights`): The stacked weights of adapters, for forwards without gradients.
        checks (`Checks`): The conditions on batches that are still to be read from a GPU.
        unedited (`UneditedRows`): The counts of rows that hold no token to edit.
        in_use (`AdaptersInUse`, *optional*): The answers of the layers in an earlier forward.
        era (`object`): Another object after each change of a layer.
    """

    call: CallState = field(default_factory=CallState)
    weights: InferenceWeights = field(default_factory=InferenceWeights)
    checks: Checks = field(default_factory=Checks)
    unedited: UneditedRows = field(init=False)
    in_use: AdaptersInUse | None = None
    era: object = field(default_factory=object)

    def __post_init__(self) -> None:
        self.unedited = UneditedRows(self.checks)

    def changed(self) -> None:
        """Note a change of a layer, so that the next forward asks all layers anew."""
        self.in_use, self.era = None, object()

    def forget(self) -> None:
        """Drop all that was computed from parameters, because they may have been written to unseen."""
        self.changed()
        self.weights = InferenceWeights()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the call and the answers of layers: no call runs a model that has just been copied or unpickled,
        and its layers are others."""
        return {"weights": self.weights, "checks": self.checks, "unedited": self.unedited}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, call=CallState(), in_use=None, era=object())


class Layer(Protocol):
    """The part of a ReftLayer that forward/ reads and calls."""

    name: str
    is_block: bool
    in_encoder: bool
    layout: Any
    state: ModelState
    bases: Bases
    reft_R: nn.ParameterDict
    reft_config: dict[str, Any]

    def adapters_in_use(self, mixed: Sequence[str] | None) -> list[LayerAdapter]: ...

    def load_offloaded(self) -> None: ...

    def get_base_layer(self) -> nn.Module: ...


def plan(
    layer_names: Iterable[str],
    in_use: Iterable[LayerAdapter],
    selections: Mapping[str, Selection | None],
    stacked: Mapping[str, tuple[Stacked, bool]],
    mixed: MixedBatch | None,
    on_own_devices: bool = True,
) -> Jobs:
    """Make the jobs of some layers.

    Args:
        layer_names (`Iterable[str]`): The layers.
        in_use (`Iterable[LayerAdapter]`): The adapters in use in them.
        selections (`Mapping[str, Selection | None]`): Adapter name -> the tokens that it edits, or None in a decode
            step, in which it edits nothing. An adapter without an entry edits all rows.
        stacked (`Mapping[str, tuple[Stacked, bool]]`): Adapter name -> its stacked weights, and whether they are a
            part of the graph. For an adapter without an entry, each layer reads its own parameters.
        mixed (`MixedBatch`, *optional*): The adapters of the examples, in a mixed batch.
        on_own_devices (`bool`): Whether the selections are moved to the devices of these layers. False for a replica
            of DataParallel, whose layers are on the batch's device.

    Returns:
        `dict[str, tuple[Job, ...]]`: The jobs by the layer's name. A layer without jobs has an empty tuple.
    """
    jobs: dict[str, list[Job]] = {name: [] for name in layer_names}
    moved: dict[tuple[str, torch.device], Selection] = {}  # the layers on one device share an adapter's selection
    for adapter in in_use:
        name, layer_name = adapter.adapter_name, adapter.layer_name
        selection = selections.get(name)
        if selection is None and name in selections:
            continue
        if selection is not None and on_own_devices:
            key = (name, adapter.R.device)
            if key not in moved:
                moved[key] = selection.to(adapter.R.device)
            selection = moved[key]
        weights, in_bfloat16 = None, None
        if name in stacked:
            own, in_graph = stacked[name]
            weights = own.by_layer[layer_name]
            in_bfloat16 = None if in_graph else own.in_bfloat16
        examples = None if mixed is None else partial(mixed.rows, name)
        jobs.setdefault(layer_name, []).append(
            Job(layer_name, name, adapter.edit, selection, examples, weights, in_bfloat16)
        )
    return {name: tuple(own) for name, own in jobs.items()}


def unplanned(in_use: Sequence[LayerAdapter], mixed: MixedBatch | None) -> tuple[Job, ...]:
    """The jobs of a layer that runs outside any forward: its adapters edit all rows, and it reads its own parameters.

    Args:
        in_use (`Sequence[LayerAdapter]`): The adapters in use in the layer.
        mixed (`MixedBatch`, *optional*): The adapters of the examples, in a mixed batch.
    """
    return tuple(job for own in plan((), in_use, {}, {}, mixed).values() for job in own)


def with_own_weights(jobs: Jobs) -> Jobs:
    """The same jobs without stacked weights: each layer reads its own parameters when it runs."""
    return {name: tuple(replace(job, weights=None, in_bfloat16=None) for job in own) for name, own in jobs.items()}
