"""Writes a PEFT adapter in pyreft's layout, so that pyreft can load it.

The folder has the files that `ReftModel.save` writes, and an args.json with the settings that pyreft does not save
(positions, activation function, dropout), under the names that pyreft's training script gives them. `convert_pyreft`
reads it.

Dimensions: R rank, D width.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from ..tuner.config import ReftConfig
from ..tuner.interventions.formulas import INTERVENTIONS
from ..tuner.parameters.loading import NAME_OF_TENSOR, read
from .base_model import BaseModel, load_base_model, name_of_base
from .checkpoint import PREFIX, Conversion, Weights
from .files import new_folder
from .from_pyreft import BASE, FIELDS, ORIGINAL
from .householder import parameters_of
from .pyvene_places import Place, place_of


def export_pyreft(folder: str | os.PathLike, out: str | os.PathLike, base_model: str | None = None) -> Conversion:
    """Write a PEFT adapter as a checkpoint of pyreft, with the same logits.

    Args:
        folder (`str` or `os.PathLike`): The adapter's folder.
        out (`str` or `os.PathLike`): A new folder.
        base_model (`str`, *optional*): Folder or hub name of the base model. None: the one that the adapter names.

    Returns:
        `Conversion`: The folder, the adapter's config, and notes on how pyreft loads the folder.

    Raises:
        ValueError: when the adapter has a setting that pyreft has no counterpart for, naming it, or does not fit the
            base model. Nothing is written then.
    """
    folder = Path(folder)
    config: PeftConfig = ReftConfig.from_pretrained(str(folder))
    if not isinstance(config, ReftConfig):
        raise ValueError(f"{folder} holds an adapter of kind {getattr(config.peft_type, 'value', None)}, not REFT.")
    for name in ("subspaces", "trainable_token_indices"):
        if getattr(config, name) is not None:
            raise ValueError(f"{name}={getattr(config, name)!r} of {folder} has no place in a checkpoint of pyreft.")
    if config.scale != 1:
        raise ValueError(
            f"scale={config.scale!r} of {folder} has no place in a checkpoint of pyreft, which edits with strength 1. "
            "Take scale out of adapter_config.json to write the adapter at strength 1."
        )
    base_model = name_of_base(base_model, config.base_model_name_or_path, folder)
    base = load_base_model(base_model, None if config.task_type is None else TaskType(config.task_type).value)
    edits, head = _read(folder, config, base)
    places, states = [], []
    for group in range(config.groups):
        for name in (module for module in base.modules if module in edits):
            place = place_of(name, base.model_class)
            places.append(Place(place.component, place.layer, turn=group))
            states.append(state_of(config.intervention, edits[name][group]))
    path = new_folder(out)
    path.mkdir(parents=True, exist_ok=True)
    for place, state in zip(places, states):
        torch.save(state, path / f"intkey_{place.key}.bin")
    # Written without a head too: pyreft's load_intervention reads the file unless include_model=False is passed.
    torch.save({name: nn.Parameter(value) for name, value in head.items()}, path / "pytorch_model.bin")
    _write_json(path / "config.json", _config(config, places, states))
    _write_json(path / "args.json", _arguments(config, base_model))
    return Conversion(str(path), config, _notes(config, base, places, bool(head)))


def state_of(intervention: str, own: Weights) -> OrderedDict[str, Tensor]:
    """The weights of one intervention under the names and in the shapes of pyreft's `state_dict`, float32.

    Args:
        intervention (`str`): The edit, by its name in ReftConfig.
        own (`Weights`): Its weights. A missing b becomes 0.
    """
    R_RD, W_RD = own.R_RD.float(), own.W_RD
    rank, width = R_RD.shape
    b_R = torch.zeros(rank) if own.b_R is None else own.b_R.float()
    state: OrderedDict[str, Tensor] = OrderedDict()
    if intervention == "loreft":
        assert W_RD is not None
        return OrderedDict(weight=W_RD.float(), bias=b_R, rotate_layer=R_RD.mT.contiguous())
    state["embed_dim"] = torch.tensor(width)
    state["interchange_dim"] = torch.tensor(width)
    if INTERVENTIONS[intervention].orthonormal:
        state[ORIGINAL], state[BASE] = parameters_of(R_RD)
    else:
        state["proj_layer.weight"] = R_RD
    if W_RD is None:
        state["learned_source"] = b_R
    else:
        state["learned_source.weight"] = W_RD.float()
        state["learned_source.bias"] = b_R
    return state


def _read(folder: Path, config: ReftConfig, base: BaseModel) -> tuple[dict[str, list[Weights]], dict[str, Tensor]]:
    """The sets of weights of each edited module, and the trained weights of the base model."""
    parts: dict[str, dict[str, Tensor]] = {}
    head: dict[str, Tensor] = {}
    for name, value in read(folder / SAFETENSORS_WEIGHTS_NAME).items():
        plain = name.removeprefix(PREFIX)
        match = NAME_OF_TENSOR.fullmatch(plain)
        if match is None:
            head[plain] = value
        else:
            parts.setdefault(match["module"] or "", {})[match["letter"]] = value
    for module in parts:
        base.find_module(str(folder), module)
    base.refuse_unknown_weights(
        head,
        str(folder),
        "pyreft saves the edits and trained weights of the base model; those of other methods have no place in its "
        "checkpoints.",
    )
    edits = {
        module: [
            Weights(
                given["R"][group].clone(),
                given["W"][group].clone() if "W" in given else None,
                given["b"][group].clone() if "b" in given else None,
            )
            for group in range(config.groups)
        ]
        for module, given in parts.items()
    }
    return edits, head


def _config(config: ReftConfig, places: list[Place], states: list[OrderedDict[str, Tensor]]) -> dict[str, object]:
    """The contents of pyreft's config.json."""
    shapes = [_rank_and_width(state) for state in states]
    representations = []
    for place, (rank, _) in zip(places, shapes):
        values: dict[str, Any] = {
            **dict.fromkeys(FIELDS),
            "layer": 0 if place.layer is None else place.layer,
            "component": place.component,
            "unit": "pos",
            "max_number_of_units": 1,
            "low_rank_dimension": rank,
        }
        representations.append(list(values.values()))
    kind = f"<class 'pyreft.interventions.{config.intervention.title()}Intervention'>"
    return {
        "intervention_constant_sources": [True] * len(places),
        "intervention_dimensions": [width for _, width in shapes],
        "intervention_types": [kind] * len(places),
        "mode": "parallel",
        "representations": representations,
        "sorted_keys": [place.key for place in places],
    }


def _rank_and_width(state: OrderedDict[str, Tensor]) -> tuple[int, int]:
    if "rotate_layer" in state or ORIGINAL in state:
        width, rank = state["rotate_layer" if "rotate_layer" in state else ORIGINAL].shape
    else:
        rank, width = state["proj_layer.weight"].shape
    return rank, width


def _arguments(config: ReftConfig, base_model: str) -> dict[str, object]:
    """The contents of args.json, by the options of pyreft's training script."""
    return {
        "model": base_model,
        "position": config.positions,
        "share_weights": config.share_weights,
        "intervention_type": f"{config.intervention.title()}Intervention",
        "rank": config.r,
        "act_fn": config.act_fn,
        "add_bias": False,
        "dropout": config.dropout,
    }


def _notes(config: ReftConfig, base: BaseModel, places: list[Place], has_head: bool) -> list[str]:
    """How pyreft loads the folder: what it has to be given, and where its own `load` falls short."""
    notes = [
        f"positions={config.positions!r} and act_fn={config.act_fn!r} are not in pyreft's checkpoints. They are in "
        "args.json: give pyreft's locations and interventions the same."
    ]
    kind = f"{config.intervention.title()}Intervention"
    makes = f"{kind}(embed_dim=..., low_rank_dimension=..., dtype=..., act_fn={config.act_fn!r}, add_bias=False)"
    by_hand = f"make the model with {makes} at each place and load with load_intervention"
    if config.intervention in ("noreft", "nodireft"):
        notes.append(f"pyreft 0.1.0's own `load` can't make a {kind} (it needs add_bias): {by_hand}.")
    elif any("." in place.component for place in places):
        notes.append(
            f"pyvene knows no width for places given by paths, so pyreft's own `load` can't make them: {by_hand}."
        )
    elif INTERVENTIONS[config.intervention].has_source:
        notes.append(
            "pyreft's own `load` makes W and b bfloat16 and leaves act_fn out. For float32, or an activation, "
            f"{by_hand}."
        )
    if not config.add_bias:
        notes.append("add_bias=False: pyreft's W always has a bias. It is written as 0.")
    if has_head:
        notes.append("The trained head is in pytorch_model.bin: load with include_model=True.")
    if config.response_template is not None or config.prompt_boundary != "first":
        notes.append(
            "response_template and prompt_boundary have no place in pyreft: its locations say where prompts end."
        )
    return notes


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
