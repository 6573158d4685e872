"""The adapters library's checkpoints of ReFT: what its `save_adapter` writes.

    adapter_config.json                                  the settings, under "config"
    pytorch_adapter.bin or adapter.safetensors           <block>.reft_layer.refts.<name>.units.<0 or 1>. ...
    pytorch_model_head.bin or model_head.safetensors     with `with_head`: the base model's own head, or one of the library's

A unit is a set of weights: 0 for the first tokens, 1 for the last, or 0 for both. The library's DiReFT and NoReFT have the same
settings and tensors, so that a checkpoint of either does not say which it is.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tuner.interventions.formulas import INTERVENTIONS
from .base_model import Skeleton, load_skeleton
from .checkpoint import Checkpoint, Conversion, Edit, settle, write_adapter
from .files import read_json, read_tensors
from .householder import basis_of


# What is read of the settings, and the types it has.
SETTINGS: dict[str, tuple[type, ...]] = {
    "prefix_positions": (int,), "suffix_positions": (int,), "r": (int,), "orthogonality": (bool,), "tied_weights": (bool,),
    "dropout": (int, float), "non_linearity": (str, type(None)),
}  # fmt: skip
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
    """Make a PEFT adapter of a ReFT checkpoint of the adapters library. The result has its logits, on prompts without answers.

    Args:
        folder (`str` or `os.PathLike`): What `save_adapter` wrote.
        out (`str` or `os.PathLike`): A new folder for the adapter.
        base_model (`str`, *optional*): Folder or hub name of the base model. None: the one that the checkpoint names.
        intervention (`str`, *optional*): `"noreft"` or, for the library's DiReFT, `"nodireft"`: the files don't tell these apart.
            Not needed for LoReFT.
        task_type (`str`, *optional*): What the base model was loaded for. None: the class that the checkpoint names.
        with_head (`bool`): Whether to take a saved head along, as `modules_to_save`.

    Returns:
        `Conversion`: The folder, the config and what to know of them.

    Raises:
        ValueError: when a file holds anything but tensors, when it is no ReFT, when the head is one of the library's own, when the
            edit can't be told. Nothing is written then.
    """
    folder = Path(folder)
    path = folder / "adapter_config.json"
    outer = read_json(path)
    settings = _settings(outer, path)
    base_model = base_model or outer.get("model_name")
    if not base_model:
        raise ValueError(f"base_model=None, and {path} names none: give its folder or hub name (--base-model).")
    own_class = str(outer.get("model_class"))
    from_library = own_class.endswith("AdapterModel")
    skeleton = load_skeleton(base_model, task_type, None if from_library else own_class)
    checkpoint = Checkpoint(str(folder), _intervention(settings, intervention, path), {})
    checkpoint.act_fn = _activation(settings["non_linearity"])
    checkpoint.dropout = float(settings["dropout"])
    positions, units = _positions(settings, path)
    _read_edits(
        checkpoint,
        read_tensors(_file(folder, "adapter.safetensors", "pytorch_adapter.bin")),
        settings,
        units,
        skeleton,
    )
    if with_head:
        checkpoint.head = _head(folder, from_library)
    first, last = settings["prefix_positions"], settings["suffix_positions"]
    if last:
        checkpoint.notes.append(
            f"suffix_positions={last}: adapters counts back from the end of all tokens, answers included, and a PEFT adapter from the "
            "end of the prompt. They agree on a prompt alone, not while answers are trained or generated."
        )
    if first and last:
        checkpoint.notes.append(
            f"On prompts of fewer than {first + last} tokens adapters edits some tokens as first and as last ones, and a PEFT adapter "
            "shares them out (docs/converting.md)."
        )
    return write_adapter(checkpoint, skeleton, positions, out)


def _settings(outer: dict[str, Any], path: Path) -> dict[str, Any]:
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
            f"{path}: {unknown or {'output_reft': False}} is not known here and may change what the adapter edits. Known are the settings "
            "of adapters 1.3.0."
        )
    return settings


def _intervention(settings: dict[str, Any], given: str | None, path: Path) -> str:
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
            f"intervention={given!r}: {path} has orthogonality={orthogonal}, and does not say whether the projection is subtracted. Say "
            f"intervention={allowed[0]!r} if it is" + (" (NoReftConfig)" if not orthogonal else " (LoReftConfig)")
            + f", or {allowed[1]!r} if not" + (" (DiReftConfig)." if not orthogonal else ".")
        )  # fmt: skip
    return given


def _activation(name: str | None) -> str | None:
    """The library's name of an activation function as transformers has it."""
    if name is not None and name.lower() == "leakyrelu":
        return "leaky_relu"
    return name if name is None else name.lower()


def _positions(settings: dict[str, Any], path: Path) -> tuple[str, list[int]]:
    """`positions`, and the units that edit something."""
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
    checkpoint: Checkpoint, tensors: dict[str, Tensor], settings: dict[str, Any], units: list[int], skeleton: Skeleton
) -> None:
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
    known = set(skeleton.modules)
    prefix = getattr(skeleton.model, "base_model_prefix", "")
    for block, sets in found.items():
        # A model of the library without a head is saved like one with it, and the other way round.
        candidates = [block, f"{prefix}.{block}", block.removeprefix(f"{prefix}.")]
        module = next((name for name in candidates if name in known), None)
        if module is None:
            raise ValueError(
                f"{checkpoint.source} edits {block!r}, and base_model={skeleton.name!r}, a {skeleton.model_class}, has no such module. "
                "Give the base model that the checkpoint was trained on."
            )
        missing = [unit for unit in units if unit not in sets]
        if missing:
            raise ValueError(f"{checkpoint.source}: unit {missing[0]} of {block!r} is missing. The file is not whole.")
        checkpoint.modules[module] = [_edit(checkpoint, sets[unit], f"{block}, unit {unit}") for unit in units]
    layers = settings.get("layers")
    if isinstance(layers, list) and len(layers) != len(found):
        raise ValueError(
            f"{checkpoint.source}: layers={layers}, and the file has the layers {sorted(found)}. It is not whole."
        )
    if any(len(sets) > len(units) for sets in found.values()):
        checkpoint.notes.append(
            "The second unit of each layer was left out: without positions of its own it edits nothing."
        )


def _edit(checkpoint: Checkpoint, tensors: dict[str, Tensor], where: str) -> Edit:
    original, base = "projection.parametrizations.weight.original", "projection.parametrizations.weight.0.base"
    source = {"learned_source.weight", "learned_source.bias"}
    free, orthogonal = {*source, "projection.weight"}, {*source, original, base}
    expected = orthogonal if INTERVENTIONS[checkpoint.intervention].orthonormal else free
    if tensors.keys() != expected:
        raise ValueError(
            f"{checkpoint.source}: {where}, has the tensors {sorted(tensors)}, which are not those of {checkpoint.intervention!r}."
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
    return Edit(R_RD, tensors["learned_source.weight"], tensors["learned_source.bias"])


def _file(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise ValueError(f"{folder} has neither {' nor '.join(names)}, so it is no checkpoint of the adapters library.")


def _head(folder: Path, from_library: bool) -> dict[str, Tensor]:
    names = [name for name in ("model_head.safetensors", "pytorch_model_head.bin") if (folder / name).exists()]
    if not names:
        return {}
    tensors = read_tensors(folder / names[0])
    own = next((name for name in tensors if name.startswith("heads.")), None)
    if own is not None or (from_library and tensors):
        raise ValueError(
            f"{folder / names[0]} holds a head of the adapters library ({own or next(iter(tensors))!r}), which no model of transformers "
            "has. Convert the edits alone with with_head=False (--no-head), or give the adapter a head of transformers' own first."
        )
    return tensors
