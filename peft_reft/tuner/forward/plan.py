"""What each layer has to do in one forward, laid out before the first layer runs, and the state in which layers find it.

A layer runs once a forward, with little time to spare in a deep model; what does not depend on its hidden state is looked up here,
for all layers in a row. Layers read `ModelState` and call nothing above them.
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
from ..positions.deferred_checks import Checks
from ..positions.selection import Selection
from .generation import Generation
from .mixed import MixedBatch


Jobs = dict[str, tuple[Job, ...]]  # by the layer's name


class CallState(threading.local):
    """What belongs to the call that a thread is in. Threads may run one model, as `torch.nn.DataParallel` does."""

    mixed: MixedBatch | None = None  # the adapters of the examples, where each has its own
    generation: Generation | None = None
    told: dict[str, Any] | None = None  # what the caller says of the prompts besides the tokens
    answers: list[LayerAdapter] | None = None  # the adapters in use in each layer, as the layers answered
    active: dict[str, LayerAdapter] = {}  # each adapter in use, and the first layer's answer
    jobs: Jobs | None = None  # None: no forward is running
    skipped: bool = False  # a decode step is running in which no layer has anything to do
    recomputed: Jobs | None = None  # the jobs of what runs in this forward and again in backward
    encoder_alone: bool = False
    saving: bool = False  # the state dict of the whole model is being collected

    def clear(self) -> None:
        """The forward is over."""
        self.jobs = self.recomputed = self.told = self.answers = None
        self.skipped = self.saving = False


@dataclass
class ModelState:
    """What the layers of one model share.

    Args:
        call (`CallState`): The call that a thread is in.
        weights (`InferenceWeights`): What has been stacked of their weights.
        checks (`Checks`): The conditions of batches that are still to be read from a GPU.
    """

    call: CallState = field(default_factory=CallState)
    weights: InferenceWeights = field(default_factory=InferenceWeights)
    checks: Checks = field(default_factory=Checks)

    def __getstate__(self) -> dict[str, Any]:
        """A copy or an unpickled model is in no call."""
        return {"weights": self.weights, "checks": self.checks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, call=CallState())


class Layer(Protocol):
    """What forwards and saves ask of a ReftLayer."""

    name: str
    is_block: bool
    in_encoder: bool
    state: ModelState
    bases: Bases
    reft_R: nn.ParameterDict
    reft_config: dict[str, Any]

    def adapters_in_use(self, mixed: Sequence[str] | None) -> list[LayerAdapter]: ...

    def keep_weights(self) -> None: ...


def plan(
    layer_names: Iterable[str],
    answers: Iterable[LayerAdapter],
    selections: Mapping[str, Selection | None],
    stacked: Mapping[str, tuple[Stacked, bool]],
    mixed: MixedBatch | None,
    on_own_devices: bool = True,
) -> Jobs:
    """The jobs of some layers. Each layer is there, whether it has any or not.

    Args:
        layer_names (`Iterable[str]`): The layers.
        answers (`Iterable[LayerAdapter]`): The adapters in use in them.
        selections (`Mapping`): What each adapter edits. None: nothing, for it is a decode step. An adapter that is not there edits all
            rows.
        stacked (`Mapping`): The weights of adapters, and whether they have a gradient. Of an adapter that is not there, each layer reads
            its own.
        mixed (`MixedBatch`, *optional*): The adapters of the examples, where each has its own.
        on_own_devices (`bool`): Whether these layers run, and not copies of them on the batch's device.
    """
    jobs: dict[str, list[Job]] = {name: [] for name in layer_names}
    moved: dict[tuple[str, torch.device], Selection] = {}  # most layers have theirs in common
    for answer in answers:
        name, layer_name = answer.adapter_name, answer.layer_name
        selection = selections.get(name)
        if selection is None and name in selections:
            continue
        if selection is not None and on_own_devices:
            place = (name, answer.R.device)
            if place not in moved:
                moved[place] = selection.to(answer.R.device)
            selection = moved[place]
        weights, in_bfloat16 = None, None
        if name in stacked:
            own, in_graph = stacked[name]
            weights = own.by_layer[layer_name]
            in_bfloat16 = None if in_graph else partial(own.in_bfloat16, layer_name)
        examples = None if mixed is None else partial(mixed.rows, name)
        jobs.setdefault(layer_name, []).append(
            Job(layer_name, name, answer.edit, selection, examples, weights, in_bfloat16)
        )
    return {name: tuple(own) for name, own in jobs.items()}


def unplanned(in_use: Sequence[LayerAdapter], mixed: MixedBatch | None) -> tuple[Job, ...]:
    """The jobs of a layer that runs outside any forward: each adapter edits all rows, with weights that the layer reads itself.

    Args:
        in_use (`Sequence[LayerAdapter]`): The adapters in use in the layer.
        mixed (`MixedBatch`, *optional*): The adapters of the examples, where each has its own.
    """
    return tuple(job for own in plan((), in_use, {}, {}, mixed).values() for job in own)


def with_own_weights(jobs: Jobs) -> Jobs:
    """The same for layers that read their own weights."""
    return {name: tuple(replace(job, weights=None, in_bfloat16=None) for job in own) for name, own in jobs.items()}
