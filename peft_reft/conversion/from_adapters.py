"""The adapters library's checkpoints of ReFT, as its `save_adapter` writes them.

    adapter_config.json                               the settings, under "config"
    pytorch_adapter.bin or adapter.safetensors        <block>.reft_layer.refts.<name>.units.<0 or 1>. ...
    pytorch_model_head.bin or model_head.safetensors  with `with_head`: the base model's head or the library's own

A unit is a set of weights: 0 for the first tokens, 1 for the last, or 0 for both. The library's DiReFT and NoReFT have
the same settings and tensors, so a checkpoint of either does not say which of the two it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tuner.interventions.formulas import INTERVENTIONS
from .base_model import BaseModel, load_base_model, name_of_base
from .checkpoint import Checkpoint, Conversion, Weights, settle, write_adapter
from .files import read_json, read_tensors
from .householder import basis_of


# The settings that are read, and the types of their values.
SETTINGS: dict[str, tuple[type, ...]] = {
    "prefix_positions": (int,), "suffix_positions": (int,), "r": (int,), "orthogonality": (bool,),
    "tied_weights": (bool,), "dropout": (int, float), "non_linearity": (str, type(None)),
}  # fmt: skip
# With these, all settings of adapters 1.3.0, and one that a later version may save (`_intervention`).
KNOWN = {*SETTINGS, "architecture", "layers", "dtype", "output_reft", "init_weights_seed", "subtract_projection"}

_TENSOR = re.compile(r"(?P<block>.+)\.reft_layer\.refts\.(?P<name>[^.]+)\.units\.(?P<unit>[01])\.(?P<tensor>.+)")


def convert_adapters(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    base_model: str | None = None,
    *,
    intervention: str | None = None,
    task_type: str | None = None,
    with_head: bool = True,
) -> Conversion:
    """Make a PEFT adapter of a ReFT checkpoint of the adapters library, with the same logits on prompts without
    answers.

    Args:
        folder (`str` or `os.PathLike`): The folder that `save_adapter` wrote.
        out (`str` or `os.PathLike`): A new folder for the adapter.
        base_model (`str`, *optional*): Folder or hub name of the base model. None: the one that the checkpoint names.
        intervention (`str`, *optional*): `"noreft"` or, for the library's DiReFT, `"nodireft"`: the files don't tell
            these apart. Not needed for LoReFT.
        task_type (`str`, *optional*): The task that the base model was loaded for. None: the class that the checkpoint
            names.
        with_head (`bool`): Whether to take a saved head along, as `modules_to_save`.

    Returns:
        `Conversion`: The folder, the adapter's config, and notes: what the files did not say, and what differs.

    Raises:
        ValueError: when a file holds anything but tensors, when the checkpoint is no ReFT, when its head is one of the
            library's own, or when the files leave open which edit it is. Nothing is written then.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    outer = read_json(path)
    settings = _settings(outer, path)
    own_class = str(outer.get("model_class"))
    from_library = own_class.endswith("AdapterModel")
    base = load_base_model(
        name_of_base(base_model, outer.get("model_name"), folder), task_type, None if from_library else own_class
    )
    checkpoint = Checkpoint(str(folder), _intervention(settings, intervention, path), {})
    checkpoint.act_fn = _activation(settings["non_linearity"])
    checkpoint.dropout = float(settings["dropout"])
    positions, units = _positions(settings, path)
    _read_edits(
        checkpoint,
        read_tensors(_file(folder, "adapter.safetensors", "pytorch_adapter.bin")),
        settings,
        units,
        base,
    )
    if with_head:
        checkpoint.head = _head(folder, from_library)
    first, last = settings["prefix_positions"], settings["suffix_positions"]
    if last:
        checkpoint.notes.append(
            f"suffix_positions={last}: adapters counts back from the end of all tokens, answers included, and a PEFT "
            "adapter from the end of the prompt. They agree on a prompt alone, not while answers are trained or "
            "generated."
        )
    if first and last:
        checkpoint.notes.append(
            f"On prompts of fewer than {first + last} tokens adapters edits some tokens as first and as last ones, "
            "and a PEFT adapter shares them out (docs/converting.md)."
        )
    return write_adapter(checkpoint, base, positions, out)


def _settings(outer: dict[str, Any], path: Path) -> dict[str, Any]:
    """The settings under "config", checked: each that is read is there, and none may change the edit unnoticed."""
    settings = outer.get("config")
    if not isinstance(settings, dict) or settings.get("architecture") != "reft":
        kind = settings.get("architecture") if isinstance(settings, dict) else settings
        raise ValueError(f"{path}: architecture={kind!r} under 'config' is not ReFT of the adapters library ('reft').")
    for name, types in SETTINGS.items():
        if name not in settings or type(settings[name]) not in types:
            allowed = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"{path}: {name}={settings.get(name)!r} should be there, as {allowed}.")
    unknown = {name: value for name, value in settings.items() if name not in KNOWN and value not in (None, False)}
    if unknown or settings.get("output_reft") is False:
        raise ValueError(
            f"{path}: {unknown or {'output_reft': False}} is not known here and may change what the adapter edits. "
            "Known are the settings of adapters 1.3.0."
        )
    return settings


def _intervention(settings: dict[str, Any], given: str | None, path: Path) -> str:
    """The edit, by its name in ReftConfig: from the settings, where they leave it open from the user."""
    subtracts = settings.get("subtract_projection")  # a later version may save it
    fitting = {
        (True, True): "loreft", (True, False): "direft", (False, True): "noreft", (False, False): "nodireft",
    }  # fmt: skip
    orthogonal = settings["orthogonality"]
    if subtracts is not None:
        return settle("intervention", given, fitting[orthogonal, bool(subtracts)], path)
    allowed = [fitting[orthogonal, True], fitting[orthogonal, False]]
    if given is None and orthogonal:
        return "loreft"  # the library has no other with an orthogonal projection
    if given not in allowed:
        raise ValueError(
            f"intervention={given!r}: {path} has orthogonality={orthogonal}, and does not say whether the projection "
            f"is subtracted. Say intervention={allowed[0]!r} if it is"
            + (" (NoReftConfig)" if not orthogonal else " (LoReftConfig)")
            + f", or {allowed[1]!r} if not" + (" (DiReftConfig)." if not orthogonal else ".")
        )  # fmt: skip
    return given


def _activation(name: str | None) -> str | None:
    """transformers' name of an activation function that the library names."""
    if name is not None and name.lower() == "leakyrelu":
        return "leaky_relu"
    return name if name is None else name.lower()


def _positions(settings: dict[str, Any], path: Path) -> tuple[str, list[int]]:
    """`positions`, and the units that have positions to edit."""
    first, last = settings["prefix_positions"], settings["suffix_positions"]
    if first < 0 or last < 0 or first + last == 0:
        raise ValueError(
            f"{path}: prefix_positions={first} and suffix_positions={last} edit nothing. One must be above 0."
        )
    positions = "+".join(f"{letter}{count}" for letter, count in (("f", first), ("l", last)) if count)
    if settings["tied_weights"]:
        return positions, [0]
    return positions, [unit for unit, count in enumerate((first, last)) if count]


def _read_edits(
    checkpoint: Checkpoint, tensors: dict[str, Tensor], settings: dict[str, Any], units: list[int], base: BaseModel
) -> None:
    """Put the edited modules and their sets of weights into `checkpoint.modules`."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    names = set()
    for key, value in tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            raise ValueError(
                f"{checkpoint.source}: {key!r} is no tensor of a ReFT adapter. Other methods can't be converted."
            )
        names.add(match["name"])
        found.setdefault(match["block"], {}).setdefault(int(match["unit"]), {})[match["tensor"]] = value
    if len(names) != 1:
        raise ValueError(f"{checkpoint.source} holds the adapters {sorted(names)}, and one is converted at a time.")
    prefix = getattr(base.model, "base_model_prefix", "")
    for block, sets in found.items():
        # The library may save a block with the prefix that models with a head have before its name, or without it.
        module = base.find_module(checkpoint.source, block, f"{prefix}.{block}", block.removeprefix(f"{prefix}."))
        missing = [unit for unit in units if unit not in sets]
        if missing:
            raise ValueError(f"{checkpoint.source}: unit {missing[0]} of {block!r} is missing. The file is not whole.")
        checkpoint.modules[module] = [_weights_of(checkpoint, sets[unit], f"{block}, unit {unit}") for unit in units]
    layers = settings.get("layers")
    if isinstance(layers, list) and len(layers) != len(found):
        raise ValueError(
            f"{checkpoint.source}: layers={layers}, and the file has the layers {sorted(found)}. It is not whole."
        )
    if any(len(sets) > len(units) for sets in found.values()):
        checkpoint.notes.append(
            "The second unit of each layer was left out: without positions of its own it edits nothing."
        )


def _weights_of(checkpoint: Checkpoint, tensors: dict[str, Tensor], where: str) -> Weights:
    """R, W and b of one unit, from its tensors."""
    original, base = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
    source = {"learned_source.weight", "learned_source.bias"}
    free, orthogonal = {*source, "projection.weight"}, {*source, original, base}
    expected = orthogonal if INTERVENTIONS[checkpoint.intervention].orthonormal else free
    if tensors.keys() != expected:
        raise ValueError(
            f"{checkpoint.source}: {where}, has the tensors {sorted(tensors)}, which are not those of "
            f"{checkpoint.intervention!r}."
        )
    if original in tensors:
        R_RD = basis_of(tensors[original].mT.contiguous(), tensors[base])
    else:
        R_RD = tensors["projection.weight"]
    if any(value.dtype not in (torch.float32, torch.float64) for value in tensors.values()):
        note = (
            "Weights of 16 bits were made float32, in which the edit is computed: logits agree as far as 16 bits go."
        )
        checkpoint.notes.extend([note] if note not in checkpoint.notes else [])
    return Weights(R_RD, tensors["learned_source.weight"], tensors["learned_source.bias"])


def _file(folder: Path, *names: str) -> Path:
    """The first of these files that is in the folder."""
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} has neither {' nor '.join(names)}, so it is no checkpoint of the adapters library.")


def _head(folder: Path, from_library: bool) -> dict[str, Tensor]:
    """The weights of the saved head, none where no head was saved."""
    names = [name for name in ("model_head.safetensors", "pytorch_model_head.bin") if (folder / name).exists()]
    if not names:
        return {}
    tensors = read_tensors(folder / names[0])
    own = next((name for name in tensors if name.startswith("heads.")), None)
    if own is not None or (from_library and tensors):
        raise ValueError(
            f"{folder / names[0]} holds a head of the adapters library ({own or next(iter(tensors))!r}), which no "
            "model of transformers has. Convert the edits alone with with_head=False (--no-head), or give the adapter "
            "a head of transformers' own first."
        )
    return tensors
