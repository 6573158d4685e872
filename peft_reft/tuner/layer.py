"""ReftLayer: wraps one module and edits its output.

This module knows the parameters of one module's adapters, and how the module is wrapped. The hot path is in
interventions/apply.py, the formulas are in interventions/formulas.py. A layer reads which rows to edit from the state
that all layers of a model share (forward/plan.py), and calls nothing above that.

Dimensions: B rows of the batch, S tokens of a row, G groups of weights, R rank, D width of the hidden state.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from . import nested
from .config import ReftConfig
from .engines_api import HOOK, has_hook, hooked_device, remove_hook_from_module
from .forward import saving
from .forward.plan import ModelState, unplanned
from .forward.transformers_api import Conv1D
from .interventions.apply import Edit, Job, edit_state
from .interventions.formulas import INTERVENTIONS, WEIGHT_DTYPES, activation, initialize
from .layouts import Layout
from .merging import MergedEdit, merge_edit, obstacle, unmerge_edit
from .parameters.bases import Bases, retract_stale
from .parameters.stacked import LayerAdapter, Parameters
from .peft_api import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from .strength import Scalable


class ReftLayer(nn.Module, Scalable, BaseTunerLayer):
    """Wraps a module, and replaces the selected rows h of its output by h + Rᵀc.

    `coefficients` in interventions/apply.py computes c and states LoReFT's formula in full; the table in
    interventions/formulas.py has c of each of the six edits, with its source.

    Parameters, by adapter name: `reft_R` [G, R, D], `reft_W` [G, R, D] and `reft_b` [G, R], where G is 1 or, for first
    and last tokens with weights of their own, 2. They are float32, unless the adapter was made with
    `autocast_adapter_dtype=False`. The edit is computed in their dtype, and without gradients in bfloat16 where the
    output is bfloat16; its result has the dtype of the output.

    `scaling`, by adapter name as in LoraLayer, is the strength s of an edit: h + s·Rᵀc. At 1 nothing is multiplied,
    and at 0 the layer does not edit. It may be written to at any time, and counts from the next forward on.

    A public attribute that this layer lacks is read from the wrapped module, so that a model that reads an attribute
    of its blocks still finds it. Not forwarded: marks that libraries put on a module to recognise it, namely private
    attributes (accelerate's hooks among them) and `quantization_scheme`, by which compressed-tensors finds the layers
    to unpack.

    Args:
        base_layer (`torch.nn.Module`): The module to wrap. Its output is a tensor [B, S, D] (any leading dimensions
            for `positions="all"`), or a tuple that starts with one.
        state (`ModelState`): The state that all ReftLayers of the model share. It holds the plan of the forward.
        name (`str`): Name of the module in the model. The plan finds the layer by it, and messages show it.
        is_block (`bool`): Whether the module is a block: its output is the hidden state of a layer of the model.
        in_encoder (`bool`): Whether the module lies in the encoder of an encoder-decoder model, whose tokens are not
            the decoder's.
        layout (`Layout`, *optional*): How the output holds the tokens. None: [B, S, D].
    """

    adapter_layer_names = ("reft_R", "reft_W", "reft_b")
    other_param_names = ("reft_config", "reft_dropout", "scaling")
    # PEFT's disable_input_dtype_casting reads and sets this on every tuner layer. ReftLayer casts no input either way.
    cast_input_dtype_enabled = True

    def __init__(
        self,
        base_layer: nn.Module,
        state: ModelState,
        name: str,
        is_block: bool,
        in_encoder: bool = False,
        layout: Layout | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.state = state
        self.name = name
        self.is_block = is_block
        self.in_encoder = in_encoder
        self.layout = layout
        # PEFT reads these two. A linear layer has them, and __getattr__ forwards them; these two classes lack them.
        if isinstance(base_layer, (nn.Embedding, Conv1D)):
            self.in_features: int | None
            self.out_features: int | None
            self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.reft_R = nn.ParameterDict()
        self.reft_W = nn.ParameterDict()
        self.reft_b = nn.ParameterDict()
        self.reft_dropout = nn.ModuleDict()  # modules, because trainers look for Dropout modules to switch dropout off
        self.reft_config: dict[str, ReftConfig] = {}
        self.scaling: dict[str, float] = {}
        self._edits: dict[str, Edit] = {}  # without dropout and scale, which change while the adapter is in use
        self.merged_adapters = []  # PEFT's is an attribute of the class: one list for all layers
        self._merged: list[MergedEdit] = []
        self.bases = Bases(self.reft_R, self.reft_config)
        self.register_state_dict_pre_hook(saving.before_layer)
        self.register_state_dict_post_hook(nested.rename_saved)
        self.register_load_state_dict_pre_hook(nested.rename_loaded)

    def __getattr__(self, name: str) -> Any:
        # The layer's own submodules are read several times in every forward, so they are looked up first.
        own = self.__dict__.get("_modules", {}).get(name)
        if own is not None:
            return own
        try:
            return super().__getattr__(name)
        except AttributeError:
            # While the module is built or unpickled, base_layer is not set yet, and reading it here would recurse.
            if name in ("base_layer", "quantization_scheme") or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a submodule of the wrapped module on the wrapped module: nested.py lists other methods' layers under
        names without `base_layer.`, and code that replaces a module by such a name sets it here."""
        base_layer = self.__dict__.get("_modules", {}).get("base_layer")
        if base_layer is not None and name in base_layer._modules and name not in self._modules:
            setattr(base_layer, name, value)
        else:
            super().__setattr__(name, value)
            # PEFT sets the active adapter and its switch this way, and torch the mode.
            if (state := self.__dict__.get("state")) is not None:
                state.changed()

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        return nested.without_wrapper(super().named_modules(memo, prefix, remove_duplicate), self, prefix)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast or move the module, as `nn.Module._apply` does. This changes the data of R, which no version counter
        shows: R needs a retraction, and stacked weights are outdated."""
        self.bases.mark_all_stale()
        self.state.forget()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """Set the mode, as `nn.Module.train` does. EMA and SWA callbacks swap weights through `param.data`, which no
        version counter shows, around train() and eval(): so check R anew and drop stacked weights here."""
        self.bases.doubt_all()
        self.state.forget()
        return super().train(mode)

    # -- adapters ----------------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, config: ReftConfig, rank: int, width: int) -> None:
        """Add the weights of an adapter, float32 and on the device of the wrapped module.

        Args:
            adapter_name (`str`): The name of the adapter.
            config (`ReftConfig`): The configuration of the adapter.
            rank (`int`): R, the rank of the edit of this module.
            width (`int`): D, the size of the last dimension of the wrapped module's output.
        """
        intervention = INTERVENTIONS[config.intervention]
        shape = (config.groups, rank, width)
        self.reft_config[adapter_name] = config
        self.scaling[adapter_name] = config.scale
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
        """The adapters by which this layer edits now, in order. Empty where all are off, merged or, outside training,
        of strength 0.

        forward/context.py calls this once a forward.

        Args:
            mixed (`Sequence[str]`, *optional*): The adapters of a mixed batch, which replace the active adapters.
                None: the batch is not mixed.

        Returns:
            `list[LayerAdapter]`: The name, the edit and the parameters of each.
        """
        reft_R: Any = self._modules["reft_R"]
        if HOOK in vars(reft_R):
            self.load_offloaded()
        if self.merged_adapters or self.disable_adapters:
            return []
        loaded, scaling = reft_R._parameters, self.scaling
        return [
            LayerAdapter(self.name, name, self.in_encoder, self._edit(name, scaling[name]), *self.weights(name))
            for name in (self.active_adapters if mixed is None else mixed)
            if name in loaded and (scaling[name] != 0 or self.training)  # in training, all weights get a gradient
        ]

    def _edit(self, adapter_name: str, scale: float) -> Edit:
        """The edit of an adapter of that strength, with dropout where its Dropout module is in training mode."""
        edit, modules = self._edits[adapter_name], self._modules
        dropout: Any = modules["reft_dropout"]._modules[adapter_name]  # type: ignore[union-attr]
        p = dropout.p if dropout.training else 0.0
        return edit if p == 0 and scale == 1 else Edit(edit.intervention, edit.act, p, scale)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off. Off also unmerges them: the layer then computes what the base model does."""
        super().enable_adapters(enabled)
        if not enabled and self.merged_adapters:
            self.unmerge()

    def weights(self, adapter_name: str) -> Parameters:
        """R [G, R, D], W [G, R, D] and b [G, R] of an adapter. W and b are None where it does not have them."""
        # Read `_modules` and `_parameters`: the lookups of Module and ParameterDict are slow, and every forward calls
        # this for every layer. A replica of DataParallel has empty `_parameters`; there ParameterDict's lookup finds
        # the tensors.
        own: Any = self._modules
        R = own["reft_R"]._parameters.get(adapter_name)
        if R is not None:
            return R, own["reft_W"]._parameters.get(adapter_name), own["reft_b"]._parameters.get(adapter_name)
        R, W, b = (own[name][adapter_name] if adapter_name in own[name] else None for name in self.adapter_layer_names)
        assert R is not None
        return R, W, b

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Move the weights of an adapter to the device of the wrapped module. Their dtype stays."""
        new_device = _computes_on(self.base_layer) if device is None else device
        if new_device is not None:
            self._convert(adapter_name, device=new_device)

    def _convert(self, adapter_name: str, **to: Any) -> None:
        """Convert the weights of an adapter as `Tensor.to` does."""
        for weights in (self.reft_R, self.reft_W, self.reft_b):
            if adapter_name in weights and not weights[adapter_name].is_meta:
                old = weights[adapter_name]
                new = old.to(**to)
                if new is not old:  # an unchanged parameter stays the same object: an optimizer may hold it
                    weights[adapter_name] = nn.Parameter(new, requires_grad=old.requires_grad)
        self.bases.mark_clean(adapter_name)

    def load_offloaded(self) -> None:
        """Load weights that accelerate has offloaded with the model, and remove its hooks from them. Such a hook loads
        a module's parameters when the module is called, and nobody calls a ParameterDict. The weights are small and
        stay on the device from then on."""
        if not has_hook(self.reft_R):  # accelerate hooks all three dicts or none
            return
        for weights in (self.reft_R, self.reft_W, self.reft_b):
            remove_hook_from_module(weights)
        for adapter_name in self.reft_R:
            self._move_adapter_to_device_of_base_layer(adapter_name)

    def cast_adapter_as_base(self, adapter_name: str) -> None:
        """Cast the weights of an adapter to the first dtype of the wrapped module's parameters that edits can be
        computed in. A module without such a dtype (8-bit and 4-bit weights) leaves them as they are."""
        dtypes = (parameter.dtype for parameter in self.base_layer.parameters())
        dtype = next((dtype for dtype in dtypes if dtype in WEIGHT_DTYPES), None)
        if adapter_name in self.reft_R and dtype is not None:
            self._convert(adapter_name, dtype=dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._edits.pop(adapter_name, None)
        self.bases.mark_stale(adapter_name)
        self.state.changed()

    # -- merging -----------------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold the edits of adapters, the active ones if none are named, into the weight and bias of a linear layer.

        Args:
            safe_merge (`bool`): Whether to look for NaN and infinities first.
            adapter_names (`list[str]`, *optional*): The adapters, in the order in which they edit.

        Raises:
            NotImplementedError: when an edit can't be folded in, with the reason. Nothing is merged then.
            ValueError: when `safe_merge` is set and the result would not be finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.reft_R]
        for name in names:
            self.refuse_merge(name)
        retract_stale([self.bases])
        for name in names:
            self._merged.append(merge_edit(self, name, self.scaling[name], safe_merge))
            self.merged_adapters.append(name)
            self.state.changed()

    def refuse_merge(self, adapter_name: str) -> None:
        """Check that an adapter can be merged into this layer.

        Raises:
            NotImplementedError: when it can't, with the reason.
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
        """Subtract merged edits from the weight and the bias, up to the rounding of their dtype."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.")
        while self._merged:
            unmerge_edit(self, self._merged.pop())
            self.merged_adapters.pop()
            self.state.changed()

    # -- forward -----------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # nn.Module.__call__ is there for hooks and compiled modules. Beside these it only costs time.
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or self._compiled_call_impl is not None
            or _has_any_global_hook()
        ):
            return super().__call__(*args, **kwargs)
        if self.state.call.skipped:  # a decode step with nothing to edit
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        planned = self.state.call.jobs
        jobs = None if planned is None else planned.get(self.name)
        if jobs is None:
            jobs = self._unplanned_jobs()
        # Read `_modules`: `self.base_layer` would go through __getattr__, which is slower.
        output = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        if not jobs:
            return output
        h = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(h, Tensor):
            raise TypeError(
                f"{self.name!r} returns {type(h).__name__}. ReFT edits modules that return a tensor, or a tuple that "
                "starts with one: choose another module in target_modules."
            )
        # The output of a block is edited in place. That saves a copy, and transformers, which collects `hidden_states`
        # with hooks on the wrapped block, then collects the edited state. Autograd allows a write to the result of any
        # operation that does not save this result for backward, and raises an error in backward where one does.
        writable = not torch.is_grad_enabled() or _may_be_written(h)
        owned = self.is_block and writable and not _is_among(h, args, kwargs.values())
        if self.layout is None:
            h = edit_state(h, jobs, self.weights, owned)
        else:
            h = self._edit_in_layout(h, self.layout, jobs, owned)
        if isinstance(output, Tensor):
            return h
        return (h, *output[1:]) if type(output) is tuple else _with_first(output, h)

    def _edit_in_layout(self, state: Tensor, layout: Layout, jobs: tuple[Job, ...], owned: bool) -> Tensor:
        """Edit an output that is not [B, S, D]. As for other outputs, an owned one is edited in place."""
        selection = jobs[0].selection
        count = None if selection is None else selection.edited_BS.shape[1]
        h = layout.tokens(state, count).clone(memory_format=torch.contiguous_format)
        edited = edit_state(h.flatten(2), jobs, self.weights, writable=True).view_as(h)
        if not owned:
            state = state.clone()
        layout.tokens(state, count).copy_(edited)
        return state

    def _unplanned_jobs(self) -> tuple[Job, ...]:
        """The jobs of this layer when it runs outside any forward of the model, without a plan. That works where each
        adapter edits all tokens in all directions.

        Raises:
            RuntimeError: where an adapter does not, so that the tokens or the directions to edit are unknown.
        """
        call = self.state.call
        if call.skipped:
            return ()
        in_use = self.adapters_in_use(call.mixed_adapters)
        if any(self.reft_config[adapter.adapter_name].depends_on_batch for adapter in in_use):
            raise RuntimeError(
                f"{self.name!r} ran without a Selection: it was called outside a forward of the whole model, so ReFT "
                "can't know which tokens to edit. Call the PeftModel (or its base model), not a part of it. If the "
                "call came from the backward pass of activation checkpointing, leave target_modules out: whole blocks "
                "are edited outside the part that is recomputed."
            )
        return unplanned(in_use, call.mixed)


def _computes_on(module: nn.Module) -> torch.device | str | int | None:
    """The device on which a module computes: that of its first parameter. An offloaded module has its parameters on
    the meta device between two forwards; then accelerate's hook names the device. None: neither names one."""
    for parameter in module.parameters():
        if not parameter.is_meta:
            return parameter.device
    return hooked_device(module)


def _with_first(output: Any, h: Tensor) -> Any:
    """A list or a named tuple with another first member, in its own type."""
    if isinstance(output, list):
        return [h, *output[1:]]
    return type(output)(h, *output[1:])  # a named tuple


def _is_among(h: Tensor, *arguments: Iterable[Any]) -> bool:
    """Whether the output h is one of the module's arguments: it then belongs to the caller and must not change."""
    for values in arguments:
        for argument in values:
            if argument is h:
                return True
    return False


def _may_be_written(h: Tensor) -> bool:
    """Whether autograd allows a write to a tensor. It refuses for leaves that require a gradient, and for views that a
    custom function returns (reentrant checkpointing and module backward hooks make such views)."""
    if torch.compiler.is_compiling():
        return True  # torch.compile turns writes into new tensors, and its graph has no views out of custom functions
    if h.grad_fn is None:
        return not h.requires_grad
    return not (h._is_view() and isinstance(h.grad_fn, torch.autograd.function.BackwardCFunction))
