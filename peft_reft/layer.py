"""ReftLayer: wraps one module and edits its output at the Selection.

This module knows how to gather rows of one output, edit them and write them back. Which rows it is told by the
ForwardContext that the layers of a model share; the formulas are in interventions.py.

Dimensions: B rows of the batch, S tokens, T = B * S, G groups of weights, N tokens of a group, R rank, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate.hooks import remove_hook_from_module
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import nested, rotation
from .bases import Bases, retract_stale
from .config import ReftConfig
from .interventions import INTERVENTIONS, WEIGHT_DTYPES, activation, edit_coefficients, initialize
from .merging import MergedEdit, merge_edit, obstacle, unmerge_edit
from .mixed import MixedBatch
from .positions import Selection


class SelectionSource(Protocol):
    """What a layer needs of the ForwardContext."""

    @property
    def mixed(self) -> MixedBatch | None: ...

    def selection(self, adapter_name: str, layer: ReftLayer) -> Selection | None: ...


class ReftLayer(nn.Module, BaseTunerLayer):
    """Adds h + Rᵀc to the selected rows h of a module's output.

    For LoReFT, c = Wh + b − Rh (arXiv 2404.03592, section 3.2); `peft_reft.interventions` has the six. Parameters,
    float32 unless told otherwise: `reft_R` [G, r, D], `reft_W` [G, r, D] and `reft_b` [G, r], where G is 1 or, for
    first and last tokens with weights of their own, 2. The edit is computed in their dtype and goes back in the base's.

    Public attributes that the wrapped module has and this one lacks are the wrapped module's, so that a model that reads
    an attribute of its blocks still finds it. What tools note on a module to know it by is not lent: private attributes,
    accelerate's hooks among them, and the scheme by which compressed-tensors finds the layers to unpack.

    Args:
        base_layer (`torch.nn.Module`): The module to wrap. Its output is a tensor [B, S, D] (any leading dimensions
            for `positions="all"`), or a tuple that starts with one.
        context (`SelectionSource`): Where the Selection of the running forward is found.
        name (`str`): Name of the module in the model, for messages.
        is_block (`bool`): Whether the output is the hidden state of a layer of the model.
        in_encoder (`bool`): Whether the module lies in the encoder of an encoder-decoder model, which has tokens of its own.
    """

    adapter_layer_names = ("reft_R", "reft_W", "reft_b")
    other_param_names = ("reft_config", "reft_dropout")
    cast_input_dtype_enabled = True  # for PEFT's helper to switch; an edit is computed in the dtype of its weights

    def __init__(
        self, base_layer: nn.Module, context: SelectionSource, name: str, is_block: bool, in_encoder: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.context = context
        self.name = name
        self.is_block = is_block
        self.in_encoder = in_encoder
        if isinstance(base_layer, (nn.Embedding, Conv1D)):  # other linear layers have them themselves
            self.in_features: int | None
            self.out_features: int | None
            self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.reft_R = nn.ParameterDict()
        self.reft_W = nn.ParameterDict()
        self.reft_b = nn.ParameterDict()
        self.reft_dropout = nn.ModuleDict()  # modules, for trainers that look for them to switch them off
        self.reft_config: dict[str, ReftConfig] = {}
        self._act: dict[str, Any] = {}
        self._all_tokens: dict[str, bool] = {}  # of the spec, which a forward, maybe a compiled one, should not parse
        self.merged_adapters = []  # the class has a list that all layers would share
        self._merged: list[MergedEdit] = []
        self.bases = Bases(self.reft_R, self.reft_config)
        self.register_state_dict_pre_hook(_before_saving)
        self.register_state_dict_post_hook(nested.rename_saved)
        self.register_load_state_dict_pre_hook(nested.rename_loaded)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # base_layer is not there yet while the module is being built or unpickled.
            if name in ("base_layer", "quantization_scheme") or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Replacing a part of the wrapped module by its name without the wrapper replaces that part."""
        base_layer = self.__dict__.get("_modules", {}).get("base_layer")
        if base_layer is not None and name in base_layer._modules and name not in self._modules:
            setattr(base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        return nested.without_wrapper(super().named_modules(memo, prefix, remove_duplicate), self, prefix)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Casts and moves of the model, which change the parameters' data past their version counters."""
        self.bases.mark_all_stale()
        return super()._apply(fn, recurse)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: ReftConfig, rank: int, width: int) -> None:
        """Add the weights of an adapter.

        Args:
            adapter_name (`str`): Its name.
            config (`ReftConfig`): Its configuration.
            rank (`int`): r of this module.
            width (`int`): D.
        """
        intervention = INTERVENTIONS[config.intervention]
        shape = (config.groups, rank, width)
        self.reft_config[adapter_name] = config
        self._act[adapter_name] = activation(config.act_fn)
        self._all_tokens[adapter_name] = config.spec.all_tokens
        self.reft_R[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if intervention.has_source:
            self.reft_W[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if config.add_bias:
            self.reft_b[adapter_name] = nn.Parameter(torch.empty(shape[:2], dtype=torch.float32))
        self.reft_dropout[adapter_name] = nn.Dropout(config.dropout if intervention.has_dropout else 0.0)
        R, W, b = self.weights(adapter_name)
        if not R.is_meta:
            initialize(intervention, R, W, b, self._act[adapter_name], config.init_weights)
        self.bases.mark_clean(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def weights(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]:
        """R, W and b of an adapter, where it has them."""

        def get(weights: nn.ParameterDict) -> nn.Parameter | None:
            return weights[adapter_name] if adapter_name in weights else None

        return self.reft_R[adapter_name], get(self.reft_W), get(self.reft_b)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Follow the wrapped module to its device, but not to its dtype: the weights stay float32."""
        place = _computes_on(self.base_layer) if device is None else device
        if place is not None:
            self._convert(adapter_name, device=place)

    def _convert(self, adapter_name: str, **to: Any) -> None:
        for weights in (self.reft_R, self.reft_W, self.reft_b):
            if adapter_name in weights and not weights[adapter_name].is_meta:
                old = weights[adapter_name]
                new = old.to(**to)
                if new is not old:  # else an optimizer may hold it
                    weights[adapter_name] = nn.Parameter(new, requires_grad=old.requires_grad)
        self.bases.mark_clean(adapter_name)

    def keep_weights(self) -> None:
        """Take back weights that accelerate has offloaded along with the model. Its hooks load the parameters of a module
        when the module is called, and the dicts that hold these never are. They are small, and stay on the device."""
        offloaded = [weights for weights in (self.reft_R, self.reft_W, self.reft_b) if "_hf_hook" in vars(weights)]
        for weights in offloaded:
            remove_hook_from_module(weights)
        if offloaded:
            for adapter_name in self.reft_R:
                self._move_adapter_to_device_of_base_layer(adapter_name)

    def cast_adapter_as_base(self, adapter_name: str) -> None:
        """Give the weights of an adapter the dtype in which the wrapped module keeps its own, if it is one to compute in."""
        dtypes = (parameter.dtype for parameter in self.base_layer.parameters())
        dtype = next((dtype for dtype in dtypes if dtype in WEIGHT_DTYPES), None)
        if adapter_name in self.reft_R and dtype is not None:
            self._convert(adapter_name, dtype=dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._act.pop(adapter_name, None)
        self._all_tokens.pop(adapter_name, None)
        self.bases.mark_stale(adapter_name)

    # -- merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the edits of adapters, the active ones if none are named, into the weight and bias of a linear layer.

        Args:
            safe_merge (`bool`): Whether to look for NaN and infinities first.
            adapter_names (`list[str]`, *optional*): The adapters, in the order in which they edit.

        Raises:
            NotImplementedError: when an edit can't be folded in, saying why. Nothing is merged then.
            ValueError: when it is to be safe and the result would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.reft_R]
        for name in names:
            self.refuse_merge(name)
        retract_stale([self])
        for name in names:
            self._merged.append(merge_edit(self, name, safe_merge))
            self.merged_adapters.append(name)

    def refuse_merge(self, adapter_name: str) -> None:
        """
        Raises:
            NotImplementedError: when an adapter can't be merged into this layer.
        """
        reason = obstacle(self, adapter_name)
        if reason is not None:
            raise NotImplementedError(
                f"The adapter {adapter_name!r} can't be merged: {reason}. Keep the adapter loaded, or take it off with "
                "`unload()`. The model is as it was."
            )

    @property
    def gained_bias(self) -> bool:
        """Whether merging has given the linear layer a bias that it did not have."""
        return any(edit.made_bias for edit in self._merged)

    def unmerge(self) -> None:
        """Take merged edits out of the weight and the bias again, up to the rounding of their dtype."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.")
        while self._merged:
            unmerge_edit(self, self._merged.pop())
            self.merged_adapters.pop()

    # -- forward -----------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.disable_adapters and self.merged:
            self.unmerge()
        output = self.base_layer(*args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        h = output[0] if isinstance(output, tuple) else output
        if not isinstance(h, Tensor):
            raise TypeError(
                f"{self.name!r} returns {type(h).__name__}. ReFT edits modules that return a tensor, or a tuple that starts "
                "with one: choose another module in target_modules."
            )
        # The output of a block is edited in place, which saves a copy and lets whoever has taken hold of the hidden
        # state see the edit: transformers collects `hidden_states` with hooks on the wrapped block. Autograd allows it
        # for any operation that does not keep its own result, and says so when one does.
        passed_through = any(h is argument for argument in (*args, *kwargs.values()))
        owned = self.is_block and not passed_through and _may_be_written(h)
        mixed = self.context.mixed
        for adapter_name in self.active_adapters if mixed is None else mixed.adapters:
            if adapter_name in self.reft_R:
                edited = self._edit(h, adapter_name, in_place=owned)
                owned, h = owned or edited is not h, edited
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _edit(self, h: Tensor, adapter_name: str, in_place: bool) -> Tensor:
        """Edit the selected rows of h [..., D]. Returns h itself, or a copy where it may not be written to."""
        all_tokens = self._all_tokens[adapter_name]
        selection = None
        if not all_tokens or self.reft_config[adapter_name].subspaces is not None:
            selection = self.context.selection(adapter_name, self)
            if selection is None:  # a decode step
                return h
            self._check_shape(h, selection)
            selection = selection.to(h.device)
        if all_tokens:
            return self._edit_all(h, adapter_name, in_place, None if selection is None else selection.kept_TR)
        assert selection is not None and selection.index_GN is not None and selection.spare_GN is not None
        h_TD, index_GN = h.flatten(0, -2), selection.index_GN
        kept_GNR = None if selection.kept_TR is None else selection.kept_TR[index_GN]
        delta_GND = self._delta(h_TD[index_GN], adapter_name, kept_GNR)
        delta_GND = delta_GND.masked_fill(selection.spare_GN[..., None], 0.0)
        # Adding, not assigning: spare places add 0 to a token that another place edits.
        edit = h_TD.index_add_ if in_place else h_TD.index_add
        return edit(0, index_GN.flatten(), delta_GND.flatten(0, 1)).view(h.shape)

    def _edit_all(self, h: Tensor, adapter_name: str, in_place: bool, kept_TR: Tensor | None) -> Tensor:
        """Edit every row of h [..., D], or, in a mixed batch, of the examples that use the adapter."""
        mixed = self.context.mixed
        if mixed is None:
            # Backward reads the states as they were before the edit.
            before = h.clone() if in_place and torch.is_grad_enabled() else h
            delta = self._delta(before.reshape(1, -1, h.shape[-1]), adapter_name, kept_TR).view(h.shape)
            return h.add_(delta) if in_place else h + delta
        rows = mixed.rows(adapter_name, h.shape[0], h.device)
        if kept_TR is not None:
            kept_TR = kept_TR.view(*h.shape[:-1], -1)[rows].flatten(0, -2)
        own = h[rows]
        delta = self._delta(own.reshape(1, -1, h.shape[-1]), adapter_name, kept_TR).view(own.shape)
        return h.index_add_(0, rows, delta) if in_place else h.index_add(0, rows, delta)

    def _check_shape(self, h: Tensor, selection: Selection) -> None:
        rows, width = selection.edited_BS.shape
        if h.shape[:-1] not in ((rows, width), (rows * width,)):
            raise ValueError(
                f"{self.name!r} returns shape {list(h.shape)}, which does not hold one state for each of the batch's "
                f"{rows} x {width} tokens. Choose in target_modules a module that works token by token, or set "
                "positions='all'."
            )

    def _delta(self, h_GND: Tensor, adapter_name: str, kept_GNR: Tensor | None) -> Tensor:
        """What the edit adds to the rows h_GND, in their dtype. `kept_GNR` marks the directions that a row uses."""
        config = self.reft_config[adapter_name]
        intervention = INTERVENTIONS[config.intervention]
        R, W, b = self.weights(adapter_name)
        with _full_precision(h_GND.device.type):
            R_GRD = R if not intervention.orthonormal or not torch.is_grad_enabled() else rotation.tangent(R)
            wide_GND = h_GND.to(R.dtype)
            c_GNR = edit_coefficients(intervention, wide_GND, R_GRD, W, b, self._act[adapter_name])
            if kept_GNR is not None:
                c_GNR = c_GNR * kept_GNR
            delta_GND = c_GNR @ R_GRD
            dropout = self.reft_dropout[adapter_name]
            assert isinstance(dropout, nn.Dropout)
            if dropout.training and dropout.p > 0:
                delta_GND = dropout(wide_GND + delta_GND) - wide_GND
        return delta_GND.to(h_GND.dtype)


def _computes_on(module: nn.Module) -> torch.device | str | int | None:
    """The device of a module's forward. The weights of an offloaded module lie on the meta device between two forwards,
    and accelerate's hooks know where they are taken."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    hooks = (vars(part).get("_hf_hook") for part in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((device for device in devices if device is not None), None)


def _may_be_written(h: Tensor) -> bool:
    """Whether autograd lets a tensor be changed in place: leaves that need a gradient, and views that a custom function
    returns (reentrant checkpointing, module backward hooks), it does not."""
    if torch.compiler.is_compiling():
        return True  # a compiled graph has its own way with writes, and no views out of custom functions
    if h.is_leaf:
        return not h.requires_grad
    return not (h._is_view() and isinstance(h.grad_fn, torch.autograd.function.BackwardCFunction))


def _full_precision(device_type: str) -> AbstractContextManager:
    """Leave autocast, so that the edit is computed in the dtype of its weights."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _before_saving(layer: nn.Module, *_: Any) -> None:
    """State dict hook: what is saved as reft_R has orthonormal rows, also right after an optimizer step."""
    assert isinstance(layer, ReftLayer)
    layer.keep_weights()
    retract_stale([layer])
