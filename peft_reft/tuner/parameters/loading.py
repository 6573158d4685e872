"""Checks of an adapter that is loaded: of its file, the names and shapes of its tensors, and their values.

PEFT does not load strictly: it drops tensors that the model lacks, and leaves start values where the file lacks
tensors. Each of these would change the edits in silence.

A saved adapter is checked twice. `check_file` reads its folder, before anything is changed: it knows the file and its
config, and not the model. `check_state_dict` compares a state dict with the model before the first tensor is written,
whoever loads it. It also replaces an R that is near an orthonormal one by the nearest, since the average of several
adapters has such an R.

Dimensions: G groups of weights, R rank, D width of the hidden state.
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
from safetensors import safe_open
from torch import Tensor, nn

from ..interventions import orthogonal
from ..interventions.formulas import INTERVENTIONS, WEIGHT_DTYPES
from ..peft_api import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME


# How far an entry of R Rᵀ may be from the identity's. Rounding R to bfloat16, whose unit roundoff is u = 2⁻⁸, moves no
# entry by more than 2u + u² (Cauchy and Schwarz), to float16 and float32 by less. A float32 file may hold values that
# were once bfloat16, so twice the bound is allowed to every dtype.
ORTHONORMAL_TOLERANCE = 2.0**-6

# How far, in the spectral norm, R may be from the nearest matrix with orthonormal rows: the distance is max |σ − 1|
# over the singular values σ of R. At a distance of 1 R may lose rank, as the zero matrix does, and then several such
# matrices are equally near. 0.9 keeps every σ at 0.1 or more, where rounding R to 16 bits turns the result by a few
# hundredths at most. An average of orthonormal R has no σ above 1. Measured: an EMA keeps σ above 0.79 (300 steps at
# 1e-3 to 3e-2, decay 0.9 to 0.999), the mean of two adapters with different start values above 0.37.
NEAR_ORTHONORMAL = 0.9

NAME_OF_TENSOR = re.compile(r"(?:(?P<module>.*)\.)?reft_(?P<letter>[^.]+)(?:\.(?P<adapter>.+))?")
# Attributes in which wrappers hold the wrapped module. They are not a part of the module's own name.
WRAPPERS = re.compile(r"\b(?:base_layer|_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")


class Config(Protocol):
    """The fields of a ReftConfig that this module reads."""

    intervention: str
    add_bias: bool
    width: int | None

    @property
    def groups(self) -> int: ...

    def rank_of(self, module_name: str) -> int: ...


# -- by the folder ----------------------------------------------------------------------------------------------------


def check_file(model_id: str | os.PathLike, config: Config, **hub: Any) -> None:
    """Refuse a saved adapter whose weights can't be read or do not fit its config. A folder without weights passes.

    Args:
        model_id (`str` or `os.PathLike`): The adapter's folder, or its name on the hub.
        config (`ReftConfig`): Its config.
        hub: `subfolder`, `revision`, ... as `hf_hub_download` takes them.

    Raises:
        ValueError: naming the file, the tensor, what is wrong and the way out.
    """
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):  # in PEFT's order
        path = _find(model_id, name, **hub)
        if path is not None:
            _check_tensors_of_file(path, read(path), config)
            return


def _find(model_id: str | os.PathLike, name: str, subfolder: str | None = None, **hub: Any) -> str | None:
    """The path of a file of a saved adapter, where PEFT will look for it. None where there is no such file."""
    if os.path.isdir(model_id):
        path = os.path.join(model_id, subfolder or "", name)
        return path if os.path.exists(path) else None
    try:
        return hf_hub_download(str(model_id), name, subfolder=subfolder, **hub)
    except EntryNotFoundError:
        return None


def read(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle, by name.

    Raises:
        ValueError: when the file is damaged or cut off, or is a pickle of anything else than tensors. No code in a
            pickle is run.
    """
    if not str(path).endswith(".safetensors"):
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(
                f"{path} ({os.path.getsize(path):,} bytes) can't be read as a pickle of tensors (weights_only=True): "
                f"{str(error).splitlines()[0] if str(error) else error!r} It is damaged, cut off, or holds code. "
                f"Take {SAFETENSORS_WEIGHTS_NAME} of the same save, or save the adapter anew."
            ) from error
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except Exception as error:  # the type depends on the damage
        raise ValueError(
            f"{path} ({os.path.getsize(path):,} bytes) is no readable safetensors file: {error}. It is damaged, or "
            "was cut off while it was written or copied. Fetch it anew or, in training, resume from the checkpoint "
            "before it."
        ) from error


def _check_tensors_of_file(path: str, tensors: dict[str, Tensor], config: Config) -> None:
    way_out = (
        "The file and its adapter_config.json are not of one adapter, or one of them was changed: take both from one "
        "save."
    )
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
    for key, tensor in tensors.items():  # also those of modules_to_save, some of which may be integers
        if tensor.dtype in WEIGHT_DTYPES:
            check_values(path, key, tensor)


# -- by the model -----------------------------------------------------------------------------------------------------


class Layer(Protocol):
    """The attributes of a ReftLayer that this module reads, besides its parameters."""

    name: str
    reft_config: dict[str, Any]


def check_state_dict(
    model: nn.Module, layers: Iterable[Layer], adapters: Iterable[str], state_dict: dict[str, Any], prefix: str
) -> None:
    """Refuse a state dict that has some tensors of an adapter but not all, or tensors that don't fit the adapter.

    The base model's own tensors are not checked, nor adapters of which the state dict has no tensor. An R that is near
    an orthonormal one is replaced in the dict by the nearest, with a warning; the tensor that was there is not written
    to.

    Args:
        model (`torch.nn.Module`): The base model, to be loaded into.
        layers (`Iterable[ReftLayer]`): The layers of the model that have adapters.
        adapters (`Iterable[str]`): The names of the adapters.
        state_dict (`dict`): The state dict to load.
        prefix (`str`): The prefix of the model's names in it.

    Raises:
        ValueError: naming the adapter, the tensor, what is wrong and the way out.
    """
    edited = set(layers)
    layer_at = {plain(name): m for name, m in model.named_modules(remove_duplicate=False) if m in edited}
    given: dict[str, dict[Any, dict[str, Tensor]]] = {}  # adapter -> layer -> letter -> tensor
    keys_of_R: dict[str, list[str]] = {}  # adapter -> keys of its R in the state dict
    strays: dict[str, str] = {}  # adapter -> a key of a tensor that it does not have
    complete = True
    for key in state_dict:
        if not key.startswith(prefix):
            continue
        name = plain(key[len(prefix) :])
        match = NAME_OF_TENSOR.fullmatch(name)
        if match is None:
            # A tensor of an edited block itself: the state dict may be one of several files of a checkpoint of the
            # whole model, with only some tensors of an adapter.
            complete = complete and not any(name.startswith(f"{module}.") for module in layer_at)
            continue
        adapter = _owner(match["adapter"] or "", adapters)
        if adapter is None:
            continue
        layer = layer_at.get(match["module"] or "")
        if adapter != match["adapter"] or match["letter"] not in _weights(layer, adapter):
            strays.setdefault(adapter, key)
        else:
            given.setdefault(adapter, {}).setdefault(layer, {})[match["letter"]] = state_dict[key]
            if match["letter"] == "R":
                keys_of_R.setdefault(adapter, []).append(key)
    for adapter in {**given, **strays}:
        config = next(layer.reft_config[adapter] for layer in layer_at.values() if adapter in layer.reft_config)
        _check_adapter(adapter, config, layer_at, given.get(adapter, {}), strays.get(adapter), complete)
        if not INTERVENTIONS[config.intervention].orthonormal:
            keys_of_R.pop(adapter, None)
    for adapter, keys in keys_of_R.items():
        _replace_by_nearest(adapter, state_dict, keys)


def _check_adapter(
    adapter: str,
    config: Any,
    layer_at: dict[str, Any],
    given: dict[Any, dict[str, Tensor]],
    stray: str | None,
    complete: bool,
) -> None:
    """Refuse the tensors of one adapter in a state dict. `complete`: all tensors of the adapter have to be there."""
    way_out = _way_out(adapter, config)
    if stray is not None:
        raise ValueError(f"Adapter {adapter!r} has no tensor {stray!r}. {way_out}")
    orthonormal = INTERVENTIONS[config.intervention].orthonormal
    for module, layer in layer_at.items():
        weights, tensors = _weights(layer, adapter), given.get(layer, {})
        names = {letter: f"{module}.reft_{letter}.{adapter}" for letter in weights}
        # A parameter of DeepSpeed's ZeRO-3 is empty and has its shape in ds_shape. ZeRO-3 loads placeholders from its
        # own checkpoints, as empty as the parameter: those are not checked.
        shapes = {
            letter: tuple(getattr(weight, "ds_shape", weight.shape))
            for letter, weight in weights.items()
            if not (hasattr(weight, "ds_shape") and letter in tensors and tensors[letter].shape == weight.shape)
        }
        if not complete:
            shapes = {letter: shape for letter, shape in shapes.items() if letter in tensors}
        check_tensors(f"Adapter {adapter!r}", names, tensors, shapes, orthonormal, way_out)


def _replace_by_nearest(adapter: str, state_dict: dict[str, Any], keys: list[str]) -> None:
    """Replace each R of an adapter in a state dict that is not orthonormal by the nearest that is, and warn once."""
    off = {
        key: error
        for key in keys
        if _is_readable(state_dict[key]) and (error := _orthonormality_error(state_dict[key])) > ORTHONORMAL_TOLERANCE
    }
    if not off:
        return
    for key in off:
        state_dict[key] = orthogonal.nearest(state_dict[key])
    worst = max(off, key=off.__getitem__)
    warnings.warn(
        f"Adapter {adapter!r}: the rows of {len(off)} of {len(keys)} tensors reft_R to load are not orthonormal, as "
        f"an average of adapters has them (R Rᵀ is off by up to {off[worst]:.2g}, in {worst!r}). Each is loaded as "
        "the nearest R with orthonormal rows, W and b as they are. If nothing averaged or changed these weights, they "
        "may be those of an edit with a free R (noreft, nodireft)."
    )


def check_names(model: nn.Module, config: Any, adapter: str, state_dict: dict[str, Any]) -> None:
    """Refuse a state dict that has no tensor of an adapter, or a tensor that the adapter lacks, by their names.

    Args:
        model (`torch.nn.Module`): The model with the adapter.
        config (`ReftConfig`): The adapter's config, for messages.
        adapter (`str`): The adapter's name.
        state_dict (`dict`): The state dict to load, with the adapter's name in its keys.

    Raises:
        ValueError: naming the adapter and the tensor.
    """
    names = {plain(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    # PEFT removes this prefix later, where it loads into a model that is no PeftModel.
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
    """Refuse an adapter whose parameters in the model are not finite floating-point numbers.

    Args:
        layers (`Iterable[ReftLayer]`): The layers of the model that have adapters.
        adapter (`str`): The adapter's name.

    Raises:
        ValueError: naming the adapter and the parameter.
    """
    for layer in layers:
        for letter, weight in _weights(layer, adapter).items():
            check_values(f"Adapter {adapter!r}", f"{layer.name}.reft_{letter}.{adapter}", weight)


def _way_out(adapter: str, config: Any) -> str:
    base = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    return (
        "Nothing was loaded. These are tensors of another adapter, of one with other settings or of one for another "
        "base model: load them with the adapter_config.json that they were saved with, on the base model that they "
        f"were trained on{base}. Before that, take this adapter off: delete_adapter({adapter!r}), or unload() if it "
        "is the only one."
    )


def _owner(name: str, adapters: Iterable[str]) -> str | None:
    """The adapter whose name follows the letter in a tensor's name. PEFT inserts it before what else follows there:
    `reft_W.x` in a file becomes `reft_W.default.x`, a tensor that the adapter `default` does not have."""
    owners = [adapter for adapter in adapters if name == adapter or name.startswith(f"{adapter}.")]
    return max(owners, key=len, default=None)


def _weights(layer: Any, adapter: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter in a layer, by their letters R, W and b."""
    if layer is None:
        return {}
    found = {letter: getattr(layer, f"reft_{letter}") for letter in ("R", "W", "b")}
    return {letter: weights[adapter] for letter, weights in found.items() if adapter in weights}


def plain(name: str) -> str:
    """The name of a module or tensor without the attributes of wrappers (`WRAPPERS`) in it."""
    return WRAPPERS.sub("", f"{name}.")[:-1]


# -- of one module ----------------------------------------------------------------------------------------------------


def check_tensors(
    who: str,
    names: dict[str, str],
    given: dict[str, Tensor],
    shapes: dict[str, tuple[int, ...]],
    orthonormal: bool,
    way_out: str,
    near: bool = True,
) -> None:
    """Refuse tensors of a module that are missing, or whose shape or values do not fit.

    Args:
        who (`str`): The file or the adapter that they belong to, for messages.
        names (`dict[str, str]`): Letter -> name of the tensor, for messages.
        given (`dict[str, torch.Tensor]`): Letter -> tensor to load.
        shapes (`dict[str, tuple]`): Letter -> shape that the tensor must have. Only these letters are checked.
        orthonormal (`bool`): Whether the rows of R must be orthonormal.
        way_out (`str`): The way out, for messages.
        near (`bool`): Whether an R passes that is near a matrix with orthonormal rows.

    Raises:
        ValueError: naming the tensor.
    """
    for letter, shape in shapes.items():
        name, tensor = names[letter], given.get(letter)
        if tensor is None:
            raise ValueError(f"{who}: {name!r} is missing. {way_out}")
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{who}: {name!r} has shape {list(tensor.shape)}, and the adapter's settings ask for {list(shape)}. "
                f"{way_out}"
            )
        check_values(who, name, tensor)
        if letter == "R" and orthonormal and _is_readable(tensor):
            _check_orthonormal(who, name, tensor, near)


def check_values(who: str, name: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not hold finite floating-point numbers of at least 16 bits.

    Args:
        who (`str`): The file or the adapter that it belongs to, for messages.
        name (`str`): Its name.
        tensor (`torch.Tensor`): The tensor. Of a placeholder or a `DTensor`, only the dtype is checked.

    Raises:
        ValueError: naming the tensor.
    """
    if tensor.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{who}: {name!r} holds {str(tensor.dtype).removeprefix('torch.')}, and weights are floating-point "
            "numbers of at least 16 bits. Save them as float32, float16 or bfloat16."
        )
    if _is_readable(tensor) and not bool(tensor.isfinite().all()):
        raise ValueError(
            f"{who}: {name!r} holds {int(tensor.isnan().sum())} NaN and {int(tensor.isinf().sum())} infinite values, "
            f"of {tensor.numel()}: the training that it was saved from had diverged, or the file is damaged. Go back "
            "to an earlier save."
        )


def _check_orthonormal(who: str, name: str, R_GRD: Tensor, near: bool) -> None:
    """Refuse an R whose rows are not orthonormal or, with `near`, that is too far from any such R."""
    error = _orthonormality_error(R_GRD)
    if error <= ORTHONORMAL_TOLERANCE:
        return
    not_orthonormal = f"{who}: the rows of {name!r} are not orthonormal. R Rᵀ is off by {error:.2g}, and "
    way_out = (
        "Every edit with an orthonormal R is saved with one, so these are other weights, or they were changed. If "
        "that was on purpose, peft_reft.tuner.interventions.orthogonal.retract([R]) makes the rows of any R "
        "orthonormal."
    )
    if not near:
        raise ValueError(
            f"{not_orthonormal}rounding to 16 bits explains less than {ORTHONORMAL_TOLERANCE:.2g}. {way_out}"
        )
    sizes = torch.linalg.svdvals(orthogonal.wide(R_GRD))
    low, high = sizes.min().item(), sizes.max().item()
    if not max(1 - low, high - 1) <= NEAR_ORTHONORMAL:
        raise ValueError(
            f"{not_orthonormal}its singular values, from {low:.2g} to {high:.2g}, are not all between "
            f"{1 - NEAR_ORTHONORMAL:.1f} and {1 + NEAR_ORTHONORMAL:.1f}, so that no orthonormal R is near. An average "
            f"is so where its adapters cancel each other: average adapters that were trained from one start. {way_out}"
        )


def _orthonormality_error(R_GRD: Tensor) -> float:
    """How far R Rᵀ is from the identity, in its worst entry."""
    wide_GRD = orthogonal.wide(R_GRD)
    eye_RR = torch.eye(R_GRD.shape[1], dtype=wide_GRD.dtype, device=wide_GRD.device)
    return (wide_GRD @ wide_GRD.mT - eye_RR).abs().max().item()


def _is_readable(tensor: Tensor) -> bool:
    """Whether this process can read the values: they are not those of a placeholder (on the meta device, or empty, as
    ZeRO-3's are), nor sharded over processes."""
    return not tensor.is_meta and tensor.numel() > 0 and type(tensor) in (Tensor, nn.Parameter)


def _examples(tensors: Iterable[str]) -> str:
    some = sorted(tensors)[:2]
    return f" (such as {', '.join(map(repr, some))})" if some else ""
