"""Merging: folds an edit, where it is an affine map of a linear layer's output, into the layer's weight and bias.

Without an activation function every edit is h + Rᵀ(Mh + b), with M and b as `affine_form` in
interventions/formulas.py returns them. If the adapter edits every token, and h = Ax + a is the output of a linear
layer, then the layer with weight A + RᵀMA and bias a + Rᵀ(Ma + b) computes the edited states by itself. This module
knows that algebra, and for which layers it holds. PEFT and model.py decide which layers are merged, and when.

Dimensions: G groups of weights (1 in a merge), R rank, D width of the output, I width of the input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .engines_api import has_hook
from .forward.transformers_api import Conv1D
from .interventions.formulas import INTERVENTIONS, WEIGHT_DTYPES, activation, affine_form
from .peft_api import QuantizationBackend, get_quantization_kwargs, resolve_quantization_backend


class MergeableLayer(Protocol):
    """The part of a ReftLayer that merging reads and calls. PEFT's BaseTunerLayer defines most of it."""

    name: str
    base_layer: Any
    reft_config: dict[str, Any]
    quantization_backend: Any

    @property
    def gained_bias(self) -> bool: ...

    def weights(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]: ...

    def get_base_layer(self) -> nn.Module: ...

    def get_base_weight(self) -> Tensor: ...

    def set_base_weight(self, weight_data: Tensor) -> None: ...


@dataclass
class MergedEdit:
    """The change that merging made to a layer, which unmerging subtracts.

    Args:
        R_RD (`torch.Tensor`): [R, D], R as it was when the edit was merged.
        added_RI (`torch.Tensor`): [R, I], MA: merging added RᵀMA to the weight.
        added_R (`torch.Tensor`): [R], Ma + b: merging added Rᵀ(Ma + b) to the bias.
        made_bias (`bool`): Whether the layer had no bias and merging gave it one.
    """

    R_RD: Tensor
    added_RI: Tensor
    added_R: Tensor
    made_bias: bool


def obstacle(layer: MergeableLayer, adapter_name: str) -> str | None:
    """The reason why an adapter can't be merged into a layer, for an error message. None: it can be merged."""
    config, base = layer.reft_config[adapter_name], layer.base_layer
    if not config.spec.all_tokens:
        return (
            "it edits hidden states at chosen positions, and no change of a weight does that, since a weight acts on "
            "every token alike"
        )
    if config.subspaces is not None:
        return "it has subspaces, which examples choose for themselves"
    if activation(config.act_fn) is not None:
        return f"act_fn={config.act_fn!r} makes the edit nonlinear, and a linear layer can't take it in"
    if layer.get_base_layer() is not base:
        return f"there is another adapter between it and {layer.name!r}: merge that one first"
    weight, backend = getattr(base, "weight", None), layer.quantization_backend
    if backend is not None and not backend.supports_merge:
        return f"PEFT can't unpack the quantized weight of {layer.name!r} ({backend.backend_name})"
    if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return (
            f"bitsandbytes has packed the weight of {layer.name!r} for the CPU, at a forward in evaluation mode, and "
            "can't unpack it. Merge right after loading"
        )
    if backend is not None:
        return None
    # A forward that was set on the instance may compute anything from the weight. accelerate's hooks set one too, but
    # it computes what the class's does.
    own_forward = "forward" in vars(base) and not has_hook(base)
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) or own_forward or weight is None:
        changed = " with a forward of its own" if own_forward else ""
        return (
            f"{layer.name!r} is a {type(base).__name__}{changed}, and only the output of a linear layer can be folded "
            "into a weight"
        )
    if type(weight.data) is not Tensor or weight.dtype not in WEIGHT_DTYPES:
        kind = type(weight.data).__name__
        return (
            f"the weight of {layer.name!r} is a {kind} of {weight.dtype}, which can't be written to as floating point"
        )
    return None


def refuse_shared_weights(model: nn.Module, to_merge: dict[str, nn.Module]) -> None:
    """Check that no other module uses a weight that merging would change.

    Args:
        model (`torch.nn.Module`): The whole model.
        to_merge (`dict[str, torch.nn.Module]`): The linear layers to merge into, by the names of their ReftLayers.

    Raises:
        NotImplementedError: when another module shares such a weight.
    """
    merging = {id(getattr(base, "weight", None)): name for name, base in to_merge.items()}
    for other, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            name = merging.get(id(parameter))
            if name is not None and module is not to_merge[name]:
                raise NotImplementedError(
                    f"Merging into {name!r} would change {other!r} too: they share a weight. Load the base model with "
                    "tie_word_embeddings=False and a copy of the weight, or keep the adapter loaded. The model is as "
                    "it was."
                )


def warn_of_new_biases(layers: Iterable[MergeableLayer]) -> None:
    """Warn where merging gave linear layers a bias: an architecture without these biases drops them on loading."""
    names = [layer.name for layer in layers if layer.gained_bias]
    if names:
        warnings.warn(
            f"{names[0]!r} had no bias, and has one now (layers so changed: {len(names)}). If the architecture has no "
            "place for it, from_pretrained drops it from a saved copy of this model. Train with add_bias=False to "
            "merge without a bias."
        )


def quantization_backend(target: nn.Module, model: nn.Module) -> QuantizationBackend | None:
    """PEFT's backend for the quantization of a linear layer: it unpacks the weight and packs it again. None: the layer
    is not quantized, or in a way that PEFT does not know."""
    if not hasattr(target, "out_features"):  # no linear layer: it is never merged
        return None
    try:
        return resolve_quantization_backend(target, **get_quantization_kwargs(model))
    except ValueError:  # a layer that torchao quantized without transformers does not say how to quantize it again
        return None


def merge_edit(layer: MergeableLayer, adapter_name: str, scale: float, safe: bool) -> MergedEdit:
    """Fold the edit of an adapter into the weight and the bias of the linear layer that a ReftLayer wraps.

    Args:
        layer (`ReftLayer`): The layer. `obstacle` has returned None for it.
        adapter_name (`str`): The adapter.
        scale (`float`): The strength with which its edit is folded in.
        safe (`bool`): Whether to look for NaN and infinities before the layer is changed.

    Returns:
        `MergedEdit`: The change, for `unmerge_edit`.

    Raises:
        ValueError: when `safe` is set and the result holds NaN or infinities. The layer is then unchanged.
    """
    R_GRD, W_GRD, b_GR = layer.weights(adapter_name)
    M_GRD, constant_GR = affine_form(INTERVENTIONS[layer.reft_config[adapter_name].intervention], R_GRD, W_GRD, b_GR)
    A_DI, bias = _weight(layer), getattr(layer.base_layer, "bias", None)
    R_RD = R_GRD[0].detach().clone()
    zero_R = R_RD.new_zeros(R_RD.shape[0])
    added_RI = R_RD.new_zeros(R_RD.shape[0], A_DI.shape[1]) if M_GRD is None else M_GRD[0] @ A_DI.to(R_RD.dtype)
    added_R = zero_R if constant_GR is None else constant_GR[0]
    if M_GRD is not None and bias is not None:
        added_R = added_R + M_GRD[0] @ bias.to(R_RD.dtype)
    if scale != 1:
        added_RI, added_R = added_RI * scale, added_R * scale
    edit = MergedEdit(R_RD, added_RI.detach(), added_R.detach(), made_bias=bias is None and bool(added_R.any()))
    _add(layer, A_DI, edit, 1.0, safe)
    return edit


def unmerge_edit(layer: MergeableLayer, edit: MergedEdit) -> None:
    """Subtract from the weight and the bias what `merge_edit` added."""
    _add(layer, _weight(layer), edit, -1.0, safe=False)


@torch.no_grad()
def _add(layer: MergeableLayer, A_DI: Tensor, edit: MergedEdit, sign: float, safe: bool) -> None:
    """Add a merged edit to the weight and the bias of the base layer (sign 1), or subtract it (sign −1)."""
    bias: Any = getattr(layer.base_layer, "bias", None)
    R_DR = edit.R_RD.to(A_DI.device).mT
    weight_DI = (A_DI.to(R_DR.dtype) + sign * (R_DR @ edit.added_RI.to(A_DI.device))).to(A_DI.dtype)
    bias_D = sign * (R_DR @ edit.added_R.to(A_DI.device))
    if safe and not (weight_DI.isfinite().all() and bias_D.isfinite().all()):
        raise ValueError(
            f"NaNs detected in the merged weights, or infinity, of {layer.name!r}. The adapter seems to be broken. "
            "The layer is as it was."
        )
    if bias is not None:
        bias_D = (bias.to(R_DR.dtype) + bias_D).to(bias.dtype)
    _set_weight(layer, weight_DI)
    base = layer.base_layer  # read again: for some kinds of quantized layer, _set_weight replaces it
    if edit.made_bias:
        base.bias = nn.Parameter(bias_D.to(A_DI.dtype), requires_grad=False) if sign > 0 else None
    elif isinstance(bias, nn.Parameter):
        bias.data = bias_D
        base.bias = bias
    elif bias is not None:
        base.bias = bias_D


def _weight(layer: MergeableLayer) -> Tensor:
    """The weight [D, I] of the wrapped linear layer, unpacked if it is quantized."""
    weight = layer.get_base_weight()
    return weight.mT if isinstance(layer.base_layer, Conv1D) else weight


def _set_weight(layer: MergeableLayer, weight_DI: Tensor) -> None:
    layer.set_base_weight(weight_DI.mT.contiguous() if isinstance(layer.base_layer, Conv1D) else weight_DI)
