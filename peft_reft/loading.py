"""What is refused when an adapter is loaded: files that can't be read, tensors that don't fit, values that make no sense.

PEFT loads without strictness: it drops tensors that the model lacks, leaves the start in place of tensors that the file lacks, and
reads pickles where there are no safetensors. For edits of hidden states each of these would be a silent change of the model.

A saved adapter is checked twice. `check_file` goes by its folder, before anything is changed: it knows the file and its config, and
not the model. `check_state_dict` goes by the model, before the first tensor is written, whoever loads it. It also puts the nearest
orthonormal R in place of one that is near one, as averages of adapters are.

Dimensions: G groups of weights, R rank, D width.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open
from torch import Tensor, nn

from . import rotation
from .interventions import INTERVENTIONS, WEIGHT_DTYPES


# How far R Rᵀ may be from the identity. Rounding a basis to bfloat16, whose unit roundoff is u = 2⁻⁸, moves no entry of it by more
# than 2u + u² (Cauchy and Schwarz), float16 and float32 by less. Also a float32 file may have been through bfloat16, so that twice
# this bound is allowed to every dtype.
ORTHONORMAL_TOLERANCE = 2.0**-6

# How far, in the spectral norm, R may be from the nearest orthonormal matrix, which is max |σ − 1| over its singular values σ. At a
# distance of 1 rank can be lost, as of the zero matrix: nothing then says which orthonormal matrix was meant. 0.9 keeps every σ at 0.1
# or more, where rounding R to 16 bits turns the result by a few hundredths at most. An average of bases has no σ above 1. Measured: an
# EMA keeps σ above 0.79 (300 steps at 1e-3 to 3e-2, decay 0.9 to 0.999), the mean of two adapters that started apart above 0.37.
NEAR_ORTHONORMAL = 0.9

NAME_OF_TENSOR = re.compile(r"(?:(?P<module>.*)\.)?reft_(?P<letter>[^.]+)(?:\.(?P<adapter>.+))?")
# What wraps modules without a change to the names in their state dict.
WRAPPERS = re.compile(r"\b(?:base_layer|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

CONVERSION = (
    "from safetensors.torch import save_file; "
    f"save_file(torch.load({WEIGHTS_NAME!r}, weights_only=True), {SAFETENSORS_WEIGHTS_NAME!r})"
)


class Config(Protocol):
    """What is read of a ReftConfig."""

    intervention: str
    add_bias: bool
    width: int | None

    @property
    def groups(self) -> int: ...

    def rank_of(self, module_name: str) -> int: ...


# -- by the folder -------------------------------------------------------------------------------------------------------


def check_file(model_id: str | os.PathLike, config: Config, **hub: Any) -> None:
    """Refuse a saved adapter whose weights can't be loaded, or are not those of its config. A config alone passes.

    Args:
        model_id (`str` or `os.PathLike`): The adapter's folder, or its name on the hub.
        config (`ReftConfig`): Its config.
        hub: `subfolder`, `revision`, ... as `hf_hub_download` takes them.

    Raises:
        ValueError: naming the file, the tensor, what is wrong and the way out.
    """
    path = _find(model_id, SAFETENSORS_WEIGHTS_NAME, **hub)
    if path is not None:
        _check_tensors_of_file(path, read(path), config)
        return
    pickled = _find(model_id, WEIGHTS_NAME, **hub)
    if pickled is not None:
        raise ValueError(
            f"{pickled} is a pickle, and there is no {SAFETENSORS_WEIGHTS_NAME} beside it. ReFT reads safetensors only, for a "
            f"pickle may run code. If you trust who made it, convert it once, in its folder: {CONVERSION}"
        )


def _find(model_id: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """A file of a saved adapter, where PEFT looks for it next. None where there is no such file."""
    if os.path.isdir(model_id):
        path = os.path.join(model_id, subfolder or "", name)
        return path if os.path.exists(path) else None
    try:
        return hf_hub_download(str(model_id), name, subfolder=subfolder, **hub)
    except EntryNotFoundError:
        return None


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: when it is not whole, naming it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # of several kinds, as the damage is
        raise ValueError(
            f"{path} ({os.path.getsize(path):,} bytes) is no readable safetensors file: {error}. It is damaged, or was cut off "
            "while it was written or copied. Fetch it anew or, in training, resume from the checkpoint before it."
        ) from error


def _check_tensors_of_file(path: str, tensors: dict[str, Tensor], config: Config) -> None:
    way_out = "The file and its adapter_config.json are not of one adapter, or one of them was changed: take both from one save."
    intervention = INTERVENTIONS[config.intervention]
    letters = ["R"] + ["W"] * intervention.has_source + ["b"] * config.add_bias
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if (match := NAME_OF_TENSOR.fullmatch(key)) is None:
            continue
        if match["letter"] not in letters or match["adapter"]:
            raise ValueError(
                f"{path}: {key!r} is no tensor of an adapter with intervention={config.intervention!r} and "
                f"add_bias={config.add_bias}. {way_out}"
            )
        modules.setdefault(match["module"] or "", {})[match["letter"]] = tensor
    if not modules:
        raise ValueError(
            f"{path} holds no tensor of a ReFT adapter, of {len(tensors)} tensors{_examples(tensors)}. {way_out}"
        )
    for module, given in modules.items():
        R = given.get("R")
        width = config.width or (R.shape[-1] if R is not None and R.dim() > 0 else 0)
        groups, rank = config.groups, config.rank_of(module)
        shape_of = {"b": (groups, rank), **dict.fromkeys("RW", (groups, rank, width))}
        names = {letter: f"{module}.reft_{letter}".lstrip(".") for letter in letters}
        shapes = {letter: shape_of[letter] for letter in letters}
        check_tensors(path, names, given, shapes, intervention.orthonormal, way_out)
    for key, tensor in tensors.items():  # those of modules_to_save, which may have integers among them, too
        if tensor.dtype in WEIGHT_DTYPES:
            check_values(path, key, tensor)


# -- by the model --------------------------------------------------------------------------------------------------------


class Layer(Protocol):
    """What is read of a ReftLayer."""

    name: str
    reft_config: dict[str, Any]


def check_state_dict(
    model: nn.Module, layers: Iterable[Layer], adapters: Iterable[str], state_dict: dict[str, Any], prefix: str
) -> None:
    """Refuse a state dict with tensors of an adapter that are not all of them, or don't fit. Of adapters that it has no tensor
    of, and of the base model's own tensors, it says nothing. An R that is near an orthonormal one is replaced in the dict by the
    nearest; the tensor that was there is not written to.

    Args:
        model (`torch.nn.Module`): The base model, to be loaded into.
        layers (`Iterable[ReftLayer]`): Its edited modules.
        adapters (`Iterable[str]`): Names of its adapters.
        state_dict (`dict`): What is to be loaded.
        prefix (`str`): What the names of the model's tensors begin with in it.

    Raises:
        ValueError: naming the adapter, the tensor, what is wrong and the way out.
    """
    edited = set(layers)
    places = {plain(name): m for name, m in model.named_modules(remove_duplicate=False) if m in edited}
    given: dict[str, dict[Any, dict[str, Tensor]]] = {}
    bases: dict[str, list[str]] = {}
    strays: dict[str, str] = {}
    whole = True
    for key in state_dict:
        if not key.startswith(prefix):
            continue
        name = plain(key[len(prefix) :])
        match = NAME_OF_TENSOR.fullmatch(name)
        if match is None:
            # One of several files of a checkpoint of the whole model: it has tensors of the edited blocks themselves, and may
            # have a part of an adapter's.
            whole = whole and not any(name.startswith(f"{place}.") for place in places)
            continue
        adapter = _owner(match["adapter"] or "", adapters)
        if adapter is None:
            continue
        layer = places.get(match["module"] or "")
        if adapter != match["adapter"] or match["letter"] not in _weights(layer, adapter):
            strays.setdefault(adapter, key)
        else:
            given.setdefault(adapter, {}).setdefault(layer, {})[match["letter"]] = state_dict[key]
            if match["letter"] == "R":
                bases.setdefault(adapter, []).append(key)
    for adapter in {**given, **strays}:
        config = next(layer.reft_config[adapter] for layer in places.values() if adapter in layer.reft_config)
        _check_adapter(adapter, config, places, given.get(adapter, {}), strays.get(adapter), whole)
        if not INTERVENTIONS[config.intervention].orthonormal:
            bases.pop(adapter, None)
    for adapter, keys in bases.items():
        _replace_by_nearest(adapter, state_dict, keys)


def _check_adapter(
    adapter: str,
    config: Any,
    places: dict[str, Any],
    given: dict[Any, dict[str, Tensor]],
    stray: str | None,
    whole: bool,
) -> None:
    way_out = _way_out(adapter, config)
    if stray is not None:
        raise ValueError(f"Adapter {adapter!r} has no tensor {stray!r}. {way_out}")
    orthonormal = INTERVENTIONS[config.intervention].orthonormal
    for place, layer in places.items():
        weights, tensors = _weights(layer, adapter), given.get(layer, {})
        names = {letter: f"{place}.reft_{letter}.{adapter}" for letter in weights}
        # DeepSpeed's ZeRO-3 keeps values apart, and notes their shape. What it loads of its own checkpoints are placeholders.
        shapes = {
            letter: tuple(getattr(weight, "ds_shape", weight.shape))
            for letter, weight in weights.items()
            if not (hasattr(weight, "ds_shape") and letter in tensors and tensors[letter].shape == weight.shape)
        }
        if not whole:
            shapes = {letter: shape for letter, shape in shapes.items() if letter in tensors}
        check_tensors(f"Adapter {adapter!r}", names, tensors, shapes, orthonormal, way_out)


def _replace_by_nearest(adapter: str, state_dict: dict[str, Any], keys: list[str]) -> None:
    off = {
        key: error
        for key in keys
        if _here(state_dict[key]) and (error := _error(state_dict[key])) > ORTHONORMAL_TOLERANCE
    }
    if not off:
        return
    for key in off:
        state_dict[key] = rotation.nearest(state_dict[key])
    worst = max(off, key=off.__getitem__)
    warnings.warn(
        f"Adapter {adapter!r}: the rows of {len(off)} of {len(keys)} tensors reft_R to load are not orthonormal, as an average of adapters "
        f"has them (R Rᵀ is off by up to {off[worst]:.2g}, in {worst!r}). Each is loaded as the nearest R with orthonormal rows, W and b as "
        "they are. If nothing averaged or changed these weights, they may be those of an edit with a free R (noreft, nodireft)."
    )


def check_names(model: nn.Module, config: Any, adapter: str, state_dict: dict[str, Any]) -> None:
    """Refuse to load an adapter from a state dict with none of its tensors, or with some that it lacks, by their names alone."""
    names = {plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    # PEFT takes this prefix off next, where it loads into a model that is no PeftModel.
    found = {
        key: not names.isdisjoint({plain(key), plain(key.removeprefix("base_model.model."))}) for key in state_dict
    }
    own = [key for key in found if NAME_OF_TENSOR.fullmatch(key)]
    if not any(found[key] and key.endswith(f".{adapter}") for key in own):
        raise ValueError(
            f"Adapter {adapter!r}: none of the {len(found)} tensors to load is one of its own{_examples(found)}. "
            f"{_way_out(adapter, config)}"
        )
    for key in own:
        if not found[key]:
            raise ValueError(f"Adapter {adapter!r} has no tensor {key!r}. {_way_out(adapter, config)}")


def check_weights(layers: Iterable[Layer], adapter: str) -> None:
    """Refuse an adapter in the model whose weights are no finite floating-point numbers."""
    for layer in layers:
        for letter, weight in _weights(layer, adapter).items():
            check_values(f"Adapter {adapter!r}", f"{layer.name}.reft_{letter}.{adapter}", weight)


def _way_out(adapter: str, config: Any) -> str:
    base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    return (
        "Nothing was loaded. These are tensors of another adapter, of one with other settings or of one for another base model: "
        f"load them with the adapter_config.json that they were saved with, on the base model that they were trained on{base}. "
        f"Before that, take this adapter off: delete_adapter({adapter!r}), or unload() if it is the only one."
    )


def _owner(name: str, adapters: Iterable[str]) -> str | None:
    """The adapter that a tensor is meant for. PEFT puts the adapter's name before what follows in a tensor's name."""
    owners = [adapter for adapter in adapters if name == adapter or name.startswith(f"{adapter}.")]
    return max(owners, key=len, default=None)


def _weights(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter in a layer, by their letters."""
    if layer is None:
        return {}
    found = {letter: getattr(layer, f"reft_{letter}") for letter in ("R", "W", "b")}
    return {letter: weights[adapter] for letter, weights in found.items() if adapter in weights}


def plain(name: str) -> str:
    """A name of a module or tensor without what wraps modules."""
    return WRAPPERS.sub("", f"{name}.")[:-1]


# -- of one module -------------------------------------------------------------------------------------------------------


def check_tensors(
    who: str,
    names: dict[str, str],
    given: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    orthonormal: bool,
    way_out: str,
    near: bool = True,
) -> None:
    """Refuse the tensors of a module.

    Args:
        who (`str`): Whose they are: the file, or the adapter.
        names (`dict[str, str]`): What to call them, by letter.
        given (`dict[str, torch.Tensor]`): Those to load, by letter.
        shapes (`dict[str, tuple]`): The shapes that they must have, by letter.
        orthonormal (`bool`): Whether the rows of R must be orthonormal.
        way_out (`str`): What to do where they don't fit.
        near (`bool`): Whether it is enough that R is near a matrix with orthonormal rows.

    Raises:
        ValueError: naming the tensor.
    """
    for letter, shape in shapes.items():
        name, tensor = names[letter], given.get(letter)
        if tensor is None:
            raise ValueError(f"{who}: {name!r} is missing. {way_out}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{who}: {name!r} has shape {list(tensor.shape)}, and the adapter's settings ask for {list(shape)}. {way_out}"
            )
        check_values(who, name, tensor)
        if letter == "R" and orthonormal and _here(tensor):
            _check_orthonormal(who, name, tensor, near)


def check_values(who: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not hold finite floating-point numbers."""
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{who}: {name!r} holds {str(tensor.dtype).removeprefix('torch.')}, and weights are floating-point numbers of at least "
            "16 bits. Save them as float32, float16 or bfloat16."
        )
    if _here(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{who}: {name!r} holds {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite values, of "
            f"{tensor.numel()}: the training that it was saved from had diverged, or the file is damaged. Go back to an earlier "
            "save."
        )


def _check_orthonormal(who: str, name: str, R_GRD: Tensor, near: bool) -> None:
    error = _error(R_GRD)
    if error <= ORTHONORMAL_TOLERANCE:
        return
    not_orthonormal = f"{who}: the rows of {name!r} are not orthonormal. R Rᵀ is off by {error:.2g}, and "
    way_out = (
        "Every edit with an orthonormal R is saved with one, so these are other weights, or they were changed. If that was on purpose, "
        "peft_reft.rotation.retract([R]) makes the rows of any R orthonormal."
    )
    if not near:
        raise ValueError(
            f"{not_orthonormal}rounding to 16 bits explains less than {ORTHONORMAL_TOLERANCE:.2g}. {way_out}"
        )
    sizes = torch.linalg.svdvals(rotation.wide(R_GRD))
    low, high = sizes.min().item(), sizes.max().item()
    if not max(1 - low, high - 1) <= NEAR_ORTHONORMAL:
        raise ValueError(
            f"{not_orthonormal}its singular values, from {low:.2g} to {high:.2g}, are not all between {1 - NEAR_ORTHONORMAL:.1f} and "
            f"{1 + NEAR_ORTHONORMAL:.1f}, so that no orthonormal R is near. An average is so where its adapters cancel each other: average "
            f"adapters that were trained from one start. {way_out}"
        )


def _error(R_GRD: Tensor) -> float:
    """How far R Rᵀ is from the identity, in its worst entry."""
    wide_GRD = rotation.wide(R_GRD)
    eye_RR = torch.eye(R_GRD.shape[1], dtype=wide_GRD.dtype, device=wide_GRD.device)
    return (wide_GRD @ wide_GRD.mT - eye_RR).abs().max().item()


def _here(tensor: Tensor) -> bool:
    """Whether the values can be read: not those of a placeholder (meta, or ZeRO-3's empty ones), nor of a tensor that processes
    share out."""
    return not tensor.is_meta and tensor.numel() > 0 and type(tensor) in (Tensor, nn.Parameter)


def _examples(tensors: Iterable[str]) -> str:
    first = sorted(tensors)[:2]
    return f" (such as {', '.join(map(repr, first))})" if first else ""
