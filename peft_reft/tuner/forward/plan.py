"""What every layer has to do in one forward, laid out before the first one runs.

A layer runs once a forward, with little time to spare in a deep model; what does not depend on its hidden state is looked up here,
for all layers in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..interventions.apply import Edit
from ..interventions.formulas import EditWeights
from ..parameters.stacked import Prepared, layer_weights
from ..positions.selection import Rows, Selection
from .mixed import MixedBatch


if TYPE_CHECKING:
    from ..layer import ReftLayer


@dataclass
class Job:
    """One adapter's edit of one layer's output.

    Args:
        adapter_name (`str`): The adapter.
        edit (`Edit`): What is done to each row.
        selection (`Selection`, *optional*): What the batch gives. None: nothing depends on it.
        rows (`Rows`, *optional*): Which rows. None: all.
        mixed (`MixedBatch`, *optional*): Of all rows, those of the examples that use the adapter.
        prepared (`Prepared`, *optional*): The weights of all layers. None: each layer reads its own.
        in_graph (`bool`): Whether they have a gradient.
    """

    adapter_name: str
    edit: Edit
    selection: Selection | None = None
    rows: Rows | None = None
    mixed: MixedBatch | None = None
    prepared: Prepared | None = None
    in_graph: bool = False

    def __post_init__(self) -> None:
        self._dtype: torch.dtype | None = None  # of the states that were edited last, most likely that of all
        self._by_layer: dict[str, EditWeights] = {}

    def weights(self, layer: ReftLayer, dtype: torch.dtype) -> EditWeights:
        """Those to edit states of some dtype with: without a graph, bfloat16 ones are edited in bfloat16. float16 has no room for what
        a projection of large states may come to, and is edited in the dtype of the weights."""
        if dtype is not self._dtype:
            if self.prepared is None:
                return layer_weights(layer, self.adapter_name)
            narrow = dtype == torch.bfloat16 and not self.in_graph
            self._dtype, self._by_layer = dtype, self.prepared.by_layer(torch.bfloat16 if narrow else None)
        return self._by_layer[layer.name]


Jobs = dict[str, tuple[Job, ...]]


def plan(
    layers: Iterable[ReftLayer],
    selections: Mapping[tuple[str, bool], Selection | None],
    prepared: Mapping[str, tuple[Prepared, bool]],
    mixed: MixedBatch | None,
    on_own_devices: bool = True,
) -> Jobs:
    """The jobs of some layers, by the layer's name. Each is there, whether it has any or not.

    Args:
        layers (`Iterable[ReftLayer]`): The layers.
        selections (`Mapping`): What each adapter edits, in an encoder and elsewhere. One that is not there edits all rows.
        prepared (`Mapping`): The weights of adapters, and whether they have a gradient.
        mixed (`MixedBatch`, *optional*): The adapters of the examples, where each has its own.
        on_own_devices (`bool`): Whether these layers run, and not copies of them on the batch's device.
    """
    jobs: Jobs = {}
    made: dict[tuple, Job] = {}  # most layers have theirs in common
    for layer in layers:
        own = []
        for name in names_in_use(layer, mixed):
            R = layer.reft_R._parameters[name]
            assert R is not None
            side, rank, dropout = (name, layer.in_encoder), R.shape[1], layer.dropout(name)
            kind = (*side, rank, R.device, dropout)
            if kind not in made:
                selection = selections.get(side)
                if selection is None and side in selections:  # a decode step
                    continue
                if selection is not None and on_own_devices:
                    selection = selection.to(R.device)
                rows = None if selection is None else selection.rows(rank)
                edit = layer.edit(name)
                made[kind] = Job(name, edit, selection, rows, mixed, *prepared.get(name, (None, False)))
            own.append(made[kind])
        jobs[layer.name] = tuple(own)
    return jobs


def names_in_use(layer: ReftLayer, mixed: MixedBatch | None) -> list[str]:
    """The adapters by which a layer edits, taking those out of its weight that are switched off."""
    if layer.merged_adapters and layer.disable_adapters:
        layer.unmerge()
    if layer.merged_adapters or layer.disable_adapters:
        return []
    weights = layer.reft_R._parameters
    return [name for name in (layer.active_adapters if mixed is None else mixed.adapters) if name in weights]


def with_own_weights(jobs: Jobs) -> Jobs:
    """The same for layers that read their own weights."""
    return {name: tuple(replace(job, prepared=None, in_graph=False) for job in own) for name, own in jobs.items()}
