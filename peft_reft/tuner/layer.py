"""ReftLayer: wraps one module and edits its output.

This module knows the parameters of one module's adapters, and how the module is wrapped. The hot path is in interventions/apply.py,
the formulas in interventions/formulas.py, and which rows are edited comes from the state that the layers of a model share
(forward/plan.py). A layer calls nothing above that.

Dimensions: B rows of the batch, S tokens of a row, G groups of weights, r rank, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import nested
from .config import ReftConfig
from .engines_api import HOOK, has_hook, hooked_device, remove_hook_from_module
from .forward import saving
from .forward.plan import ModelState, unplanned
from .forward.transformers_api import Conv1D
from .interventions.apply import Edit, Job, edit_state
from .interventions.formulas import INTERVENTIONS, WEIGHT_DTYPES, activation, initialize
from .merging import MergedEdit, merge_edit, obstacle, unmerge_edit
from .parameters.bases import Bases, retract_stale
from .parameters.stacked import LayerAdapter, Parameters
from .peft_api import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge


class ReftLayer(nn.Module, BaseTunerLayer):
    """Puts h + Rᵀc in place of the selected rows h of a module's output.

    For LoReFT, c = Wh + b − Rh (arXiv 2404.03592, section 3.2); interventions/formulas.py has the six. Parameters,
    float32 unless told otherwise: `reft_R` [G, r, D], `reft_W` [G, r, D] and `reft_b` [G, r], where G is 1 or, for
    first and last tokens with weights of their own, 2. The edit is computed in their dtype and goes back in the base's.

    Public attributes that the wrapped module has and this one lacks are the wrapped module's, so that a model that reads
    an attribute of its blocks still finds it. Not forwarded are marks that libraries put on a module to recognise it: private
    attributes, accelerate's hooks among them, and the scheme by which compressed-tensors finds the layers to unpack.

    Args:
        base_layer (`torch.nn.Module`): The module to wrap. Its output is a tensor [B, S, D] (any leading dimensions
            for `positions="all"`), or a tuple that starts with one.
        state (`ModelState`): What the layers of the model share: the plan of the running forward above all.
        name (`str`): Name of the module in the model, for messages.
        is_block (`bool`): Whether the output is the hidden state of a layer of the model.
        in_encoder (`bool`): Whether the module lies in the encoder of an encoder-decoder model, which has tokens of its own.
    """

    adapter_layer_names = ("reft_R", "reft_W", "reft_b")
    other_param_names = ("reft_config", "reft_dropout")
    cast_input_dtype_enabled = (
        True  # PEFT's disable_input_dtype_casting asks every layer for it; an edit goes by its weights' dtype
    )

    def __init__(
        self, base_layer: nn.Module, state: ModelState, name: str, is_block: bool, in_encoder: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.state = state
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
        self._edits: dict[str, Edit] = {}  # without dropout, which is switched with the mode
        self.merged_adapters = []  # the class has a list that all layers would share
        self._merged: list[MergedEdit] = []
        self.bases = Bases(self.reft_R, self.reft_config)
        self.register_state_dict_pre_hook(saving.before_layer)
        self.register_state_dict_post_hook(nested.rename_saved)
        self.register_load_state_dict_pre_hook(nested.rename_loaded)

    def __getattr__(self, name: str) -> Any:
        # Its own parts are asked for several times in every forward, so they come first.
        own = self.__dict__.get("_modules", {}).get(name)
        if own is not None:
            return own
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
        self.state.weights.forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """Callbacks that average weights swap them through `param.data`, which no version counter shows, around train() and eval()."""
        self.bases.doubt_all()
        self.state.weights.forget()
        return super().train(mode)

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
        self._edits[adapter_name] = Edit(intervention, activation(config.act_fn))
        self.reft_R[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if intervention.has_source:
            self.reft_W[adapter_name] = nn.Parameter(torch.empty(shape, dtype=torch.float32))
        if config.add_bias:
            self.reft_b[adapter_name] = nn.Parameter(torch.empty(shape[:2], dtype=torch.float32))
        self.reft_dropout[adapter_name] = nn.Dropout(config.dropout if intervention.has_dropout else 0.0)
        R, W, b = self.weights(adapter_name)
        if not R.is_meta:
            initialize(intervention, R, W, b, self._edits[adapter_name].act, config.init_weights)
        self.bases.mark_clean(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapters_in_use(self, mixed: Sequence[str] | None) -> list[LayerAdapter]:
        """The adapters by which this layer edits now, in order: none where they are switched off or merged.

        It is asked once a forward.

        Args:
            mixed (`Sequence[str]`, *optional*): The adapters of a batch whose examples have each their own, in place of the active ones.
        """
        if HOOK in vars(self.reft_R):
            self.keep_weights()
        if self.merged_adapters or self.disable_adapters:
            return []
        known = self.reft_R._parameters
        return [
            LayerAdapter(self.name, name, self.in_encoder, self._edit(name), *self.weights(name))
            for name in (self.active_adapters if mixed is None else mixed)
            if name in known
        ]

    def _edit(self, adapter_name: str) -> Edit:
        """What an adapter does, with dropout as it is switched now."""
        dropout = self.reft_dropout._modules[adapter_name]
        assert isinstance(dropout, nn.Dropout)
        edit = self._edits[adapter_name]
        return Edit(edit.intervention, edit.act, dropout.p) if dropout.training and dropout.p > 0 else edit

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. Those that are merged are taken out of the weight first, for off to mean the base model."""
        super().enable_adapters(enabled)
        if not enabled and self.merged_adapters:
            self.unmerge()

    def weights(self, adapter_name: str) -> Parameters:
        """R, W and b of an adapter, where it has them."""
        dicts = (self.reft_R, self.reft_W, self.reft_b)
        # Past ParameterDict's own ways, which take their time: this is asked for every layer in every step. What DataParallel
        # replicates has its parameters elsewhere.
        R, W, b = (weights._parameters.get(adapter_name) for weights in dicts)
        if R is None:
            R, W, b = (weights[adapter_name] if adapter_name in weights else None for weights in dicts)
        assert R is not None
        return R, W, b

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
        if not has_hook(self.reft_R):  # with a hook on one of the dicts there is one on each
            return
        for weights in (self.reft_R, self.reft_W, self.reft_b):
            remove_hook_from_module(weights)
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
        self._edits.pop(adapter_name, None)
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
        retract_stale([self.bases])
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
                f"The adapter {adapter_name!r} can't be merged: {reason}. Keep the adapter loaded, or take it off "
                "with `unload()`. The model is as it was."
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A decode step with nothing to edit goes past this module, unless somebody listens to it.
        if self.state.call.skipped and not (self._forward_hooks or self._forward_pre_hooks):
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        planned = self.state.call.jobs
        jobs = None if planned is None else planned.get(self.name)
        if jobs is None:
            jobs = self._unplanned_jobs()
        output = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]  # without the search of __getattr__
        if not jobs:
            return output
        h = output[0] if isinstance(output, tuple) else output
        if not isinstance(h, Tensor):
            raise TypeError(
                f"{self.name!r} returns {type(h).__name__}. ReFT edits modules that return a tensor, or a tuple that "
                "starts with one: choose another module in target_modules."
            )
        # The output of a block is edited in place, which saves a copy and lets whoever has taken hold of the hidden
        # state see the edit: transformers collects `hidden_states` with hooks on the wrapped block. Autograd allows it
        # for any operation that does not keep its own result, and says so when one does.
        writable = not torch.is_grad_enabled() or _may_be_written(h)
        owned = self.is_block and writable and not _is_among(h, args, kwargs.values())
        h = edit_state(h, jobs, self.weights, owned)
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _unplanned_jobs(self) -> tuple[Job, ...]:
        """The jobs of this layer where no plan has it: it runs outside any forward, which is possible where all tokens are edited.

        Raises:
            RuntimeError: where not all tokens are, so that the tokens to edit are unknown.
        """
        call = self.state.call
        if call.skipped:
            return ()
        in_use = self.adapters_in_use(None if call.mixed is None else call.mixed.adapters)
        if any(self.reft_config[adapter.adapter_name].depends_on_batch for adapter in in_use):
            raise RuntimeError(
                f"{self.name!r} ran without a Selection: it was called outside a forward of the whole model, so ReFT "
                "can't know which tokens to edit. Call the PeftModel (or its base model), not a part of it. If the "
                "call came from the backward pass of activation checkpointing, leave target_modules out: whole blocks "
                "are edited outside the part that is recomputed."
            )
        return unplanned(in_use, call.mixed)


def _computes_on(module: nn.Module) -> torch.device | str | int | None:
    """The device of a module's forward. The weights of an offloaded module lie on the meta device between two forwards,
    and accelerate's hooks know where they are taken."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return hooked_device(module)


def _is_among(h: Tensor, *arguments: Iterable[Any]) -> bool:
    """Whether the wrapped module passes on an argument of its own."""
    for some in arguments:
        for argument in some:
            if argument is h:
                return True
    return False


def _may_be_written(h: Tensor) -> bool:
    """Whether autograd lets a tensor be changed in place: leaves that need a gradient, and views that a custom function
    returns (reentrant checkpointing, module backward hooks), it does not."""
    if torch.compiler.is_compiling():
        return True  # a compiled graph has its own way with writes, and no views out of custom functions
    if h.grad_fn is None:
        return not h.requires_grad
    return not (h._is_view() and isinstance(h.grad_fn, torch.autograd.function.BackwardCFunction))
