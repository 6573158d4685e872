"""A checkpoint of ReFT in memory, whatever library it comes from, and how it is written as a PEFT adapter.

Dimensions: G sets of weights of a module (1, or 2: for first and for last tokens), R rank, D width.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor

from ..tuner.config import ReftConfig
from ..tuner.interventions.formulas import INTERVENTIONS
from ..tuner.parameters.loading import check_tensors, check_values
from ..tuner.positions.selection import PositionSpec
from ..tuner.targets import find_targets, main_stack
from .base_model import BaseModel
from .files import new_folder


# What PEFT puts before the base model's own names, in the names of saved tensors.
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Weights:
    """One set of weights of a module's edit, named as in the formulas of `peft_reft.tuner.interventions.formulas`.

    Args:
        R_RD (`torch.Tensor`): [r, D].
        W_RD (`torch.Tensor`, *optional*): [r, D].
        b_R (`torch.Tensor`, *optional*): [r].
    """

    R_RD: Tensor
    W_RD: Tensor | None
    b_R: Tensor | None


@dataclass
class Checkpoint:
    """A trained adapter, as read from a checkpoint of any library.

    Args:
        source (`str`): The checkpoint's folder, for messages.
        intervention (`str`): Its edit, by the name in ReftConfig.
        modules (`dict[str, list[Weights]]`): Name of each edited module to its sets of weights: one, or one for
            the first tokens and one for the last.
        head (`dict[str, torch.Tensor]`): Trained weights of the base model, by their names.
        act_fn, dropout: As in ReftConfig.
        share_weights (`bool`, *optional*): The value in a file of the checkpoint, to be compared with the number of
            sets. None: no file has one.
        notes (`list[str]`): What the files did not say, and what differs after the conversion, for the user.
    """

    source: str
    intervention: str
    modules: dict[str, list[Weights]]
    head: dict[str, Tensor] = field(default_factory=dict)
    act_fn: str | None = None
    dropout: float = 0.0
    share_weights: bool | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion.

    Args:
        folder (`str`): The folder that was written.
        config (`ReftConfig`): The adapter's config.
        notes (`list[str]`): What the files did not say, and what differs after the conversion, a sentence each.
    """

    folder: str
    config: ReftConfig
    notes: list[str]


def write_adapter(checkpoint: Checkpoint, base: BaseModel, positions: str, out: str | os.PathLike) -> Conversion:
    """Write a checkpoint as a PEFT adapter: adapter_config.json and adapter_model.safetensors, float32.

    Args:
        checkpoint (`Checkpoint`): The checkpoint. Its modules are put in the order of the base model.
        base (`BaseModel`): The base model.
        positions (`str`): As in ReftConfig.
        out (`str` or `os.PathLike`): A new folder.

    Raises:
        ValueError: when the checkpoint can't be an adapter of this package, naming the setting or tensor. Nothing is
            written then.
    """
    folder = new_folder(out)
    base.refuse_decoder(list(checkpoint.modules))
    order = {name: index for index, name in enumerate(base.modules)}
    checkpoint.modules = dict(sorted(checkpoint.modules.items(), key=lambda item: order[item[0]]))
    config = _config(checkpoint, base, positions)
    tensors = _tensors(checkpoint, config)
    for name, value in checkpoint.head.items():
        check_values(checkpoint.source, name, value)
        tensors[f"{PREFIX}{name}"] = value.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return Conversion(str(folder), config, checkpoint.notes)


def _config(checkpoint: Checkpoint, base: BaseModel, positions: str) -> ReftConfig:
    edits = checkpoint.modules
    ranks = {name: sets[0].R_RD.shape[0] for name, sets in edits.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    stack = _stack(base)
    whole_blocks = set(edits) <= set(stack)
    heads = base.heads(checkpoint.head, checkpoint.source)
    config = ReftConfig(
        r=rank,
        rank_pattern={name: own for name, own in ranks.items() if own != rank},
        intervention=checkpoint.intervention,
        positions=positions,
        share_weights=_shares(checkpoint, PositionSpec.parse(positions)),
        dropout=checkpoint.dropout if INTERVENTIONS[checkpoint.intervention].has_dropout else 0.0,
        act_fn=checkpoint.act_fn,
        target_modules=None if whole_blocks else list(edits),
        layers_to_transform=[i for i, name in enumerate(stack) if name in edits]
        if whole_blocks and len(edits) < len(stack)
        else None,
        modules_to_save=heads or None,
        response_template=None,  # the checkpoint's own library does not look for any
        base_model_name_or_path=base.name,
        task_type=base.task_type,
        inference_mode=True,
    )
    targets = find_targets(base.model, config)
    if set(targets) != set(edits):
        raise ValueError(
            f"{checkpoint.source}: the modules {sorted(edits)} can't be told from {sorted(set(targets) - set(edits))} "
            "by their names. Such a model can't be converted for."
        )
    for name, target in targets.items():
        for edit in edits[name]:
            if edit.R_RD.shape[1] != target.width:
                raise ValueError(
                    f"{checkpoint.source}: the edit of {name!r} has width {edit.R_RD.shape[1]}, and the output of "
                    f"that module in base_model={base.name!r} has width {target.width}. Give the base model that the "
                    "checkpoint was trained on."
                )
    config.note_width({target.width for target in targets.values()})
    return config


def _stack(base: BaseModel) -> list[str]:
    try:
        return main_stack(base.model)
    except ValueError:  # find_targets does not recognise this model's blocks; target_modules names the modules then
        return []


def _shares(checkpoint: Checkpoint, spec: PositionSpec) -> bool:
    """`share_weights`: for two-sided positions, whether each module has one set of weights or two."""
    counts = {name: len(sets) for name, sets in checkpoint.modules.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(
            f"{checkpoint.source}: the modules have different numbers of sets of weights: {counts}. An adapter has "
            "one everywhere, or two everywhere, for the first and the last tokens."
        )
    (count,) = set(counts.values())
    if count > 2 or (count == 2 and not spec.two_sided):
        raise ValueError(
            f"positions={str(spec)[1:-1]!r} has one set of weights for each module, and {checkpoint.source} has "
            f"{count}. Two sets are for first and last tokens: give positions such as 'f7+l7'. More can't be "
            "converted."
        )
    shared = spec.two_sided and count == 1
    if checkpoint.share_weights not in (None, shared):
        raise ValueError(
            f"share_weights={checkpoint.share_weights}, says a file of {checkpoint.source}, and each module has "
            f"{count} set(s) of weights. The files are not of one checkpoint."
        )
    return shared


def _tensors(checkpoint: Checkpoint, config: ReftConfig) -> dict[str, Tensor]:
    intervention = INTERVENTIONS[config.intervention]
    way_out = "The checkpoint is damaged, or not all of one training run."
    if intervention.orthonormal:
        way_out += (
            " If its R is 0: weight decay does that to torch's orthogonal parametrization, and the adapter does "
            "nothing. It can't be saved by conversion."
        )
    tensors: dict[str, Tensor] = {}
    for name, edits in checkpoint.modules.items():
        rank, width = config.rank_of(name), edits[0].R_RD.shape[1]
        values = {
            "R": _stack_sets([edit.R_RD for edit in edits], name, checkpoint),
            "W": _stack_sets([edit.W_RD for edit in edits], name, checkpoint),
            "b": _stack_sets([edit.b_R for edit in edits], name, checkpoint),
        }
        given = {letter: value for letter, value in values.items() if value is not None}
        shapes = {"R": (config.groups, rank, width), "W": (config.groups, rank, width), "b": (config.groups, rank)}
        if not intervention.has_source:
            del shapes["W"]
        names = {letter: f"{name}.reft_{letter}" for letter in shapes}
        # near=False: an R that is not quite orthonormal is refused, not replaced by the nearest one. The converted
        # adapter must edit as the checkpoint did.
        check_tensors(checkpoint.source, names, given, shapes, intervention.orthonormal, way_out, near=False)
        tensors |= {f"{PREFIX}{name}.reft_{letter}": value for letter, value in given.items()}
    return tensors


def _stack_sets(parts: Sequence[Tensor | None], name: str, checkpoint: Checkpoint) -> Tensor | None:
    """R, W or b of a module's sets as one tensor [G, ...], float32. None where the edit has no such weight."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len({part.shape for part in parts if part is not None}) > 1:
        raise ValueError(
            f"{checkpoint.source}: the sets of weights of {name!r}, for first and last tokens, have the shapes "
            f"{[list(part.shape) for part in present]}. An adapter has one rank for both."
        )
    for part in present:
        check_values(checkpoint.source, name, part)
    return torch.stack([part.float() for part in present]).contiguous()


def settle(name: str, given: Any, recorded: Any, where: Path | str) -> Any:
    """The value of a setting that the user may give and a file may record. None where neither does.

    Args:
        name (`str`): The setting, for the message.
        given: The user's value, None for none.
        recorded: The file's value, None for none.
        where (`Path` or `str`): The file.

    Raises:
        ValueError: when both have a value and the values differ.
    """
    if given is not None and recorded is not None and given != recorded:
        raise ValueError(
            f"{name}={given!r} is given, and {where} says {recorded!r}. Leave {name} out, or correct the file if it "
            "is wrong."
        )
    return recorded if given is None else given
