"""ReftLayer: wraps one module and edits its output at the Selection.

This module knows how to gather rows of one output, edit them and write them back. Which rows it is told by the
ForwardContext that the layers of a model share; the formulas are in interventions.py.

Dimensions: B rows of the batch, S tokens, T = B * S, G groups of weights, N tokens of a group, R rank, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import nested
from .config import ReftConfig
from .engines_api import has_hook, hooked_device, remove_hook_from_module
from .forward import saving
from .forward.plan import Job, Jobs
from .forward.transformers_api import Conv1D
from .interventions.apply import Edit, delta, edit_rows
from .interventions.formulas import INTERVENTIONS, WEIGHT_DTYPES, EditWeights, Intervention, activation, initialize
from .merging import MergedEdit, merge_edit, obstacle, unmerge_edit
from .parameters.bases import Bases, retract_stale
from .peft_api import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from .positions.selection import Selection


class CallState(Protocol):
    """What a layer needs to know of the call that its thread is in."""

    jobs: Jobs | None
    resting: bool
    saving: bool


class SelectionSource(Protocol):
    """What a layer needs of the ForwardContext."""

    @property
    def state(self) -> CallState: ...

    def unplanned_jobs(self, layer: ReftLayer) -> tuple[Job, ...]: ...

    def forget_weights(self) -> None: ...

    def settle_checks(self) -> None: ...


class ReftLayer(nn.Module, BaseTunerLayer):
    """Adds h + Rᵀc to the selected rows h of a module's output.

    For LoReFT, c = Wh + b − Rh (arXiv 2404.03592, section 3.2); `peft_reft.tuner.interventions.formulas` has the six. Parameters,
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
        self._interventions: dict[str, Intervention] = {}
        self._act: dict[str, Any] = {}
        self._all_tokens: dict[str, bool] = {}
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
        self.context.forget_weights()
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> Any:
        """Callbacks that average weights swap them through `param.data`, which no version counter shows, around train() and eval()."""
        self.bases.doubt_all()
        self.context.forget_weights()
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
        self._interventions[adapter_name] = intervention
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

    def edit(self, adapter_name: str) -> Edit:
        """The edit of an adapter."""
        return Edit(self._interventions[adapter_name], self._act[adapter_name], self.dropout(adapter_name))

    def dropout(self, adapter_name: str) -> float:
        """The part of edited states that is dropped, as it is switched now."""
        dropout = self.reft_dropout._modules[adapter_name]
        assert isinstance(dropout, nn.Dropout)
        return dropout.p if dropout.training else 0.0

    def needs_selection(self, adapter_name: str) -> bool:
        """Whether which rows an adapter edits, or in which directions, depends on the batch."""
        return not self._all_tokens[adapter_name] or self.reft_config[adapter_name].subspaces is not None

    def weights(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter | None, nn.Parameter | None]:
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
        self._interventions.pop(adapter_name, None)
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

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A decode step with nothing to edit goes past this module, unless somebody listens to it.
        if self.context.state.resting and not (self._forward_hooks or self._forward_pre_hooks):
            return self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        planned = self.context.state.jobs
        jobs = None if planned is None else planned.get(self.name)
        if jobs is None:
            jobs = self.context.unplanned_jobs(self)
        output = self._modules["base_layer"](*args, **kwargs)  # type: ignore[misc]  # without the search of __getattr__
        if not jobs:
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
        writable = not torch.is_grad_enabled() or _may_be_written(h)
        owned = self.is_block and writable and not _is_among(h, args, kwargs.values())
        for job in jobs:
            if job.selection is not None and h.shape[:-1] != job.selection.edited_BS.shape:
                self._check_shape(h, job.selection)
            if job.rows is None:
                edited = self._edit_all(h, job, in_place=owned)
                owned, h = owned or edited is not h, edited
                continue
            if not (owned and h.is_contiguous()):
                owned, h = True, h.clone(memory_format=torch.contiguous_format)
            h = edit_rows(h, job.rows, job.edit, job.weights(self, h.dtype))
        return (h, *output[1:]) if isinstance(output, tuple) else h

    def _edit_all(self, h: Tensor, job: Job, in_place: bool) -> Tensor:
        """Edit every row of h [..., D], or, in a mixed batch, of the examples that use the adapter."""
        unused_TR, weights = None, job.weights(self, h.dtype)
        if job.selection is not None:
            kept_TR = job.selection.to(h.device).kept_TR
            unused_TR = None if kept_TR is None else ~kept_TR
        if job.mixed is None:
            # Backward reads the states as they were before the edit.
            before = h.clone() if in_place and torch.is_grad_enabled() else h
            added = _delta_of_all(before, job.edit, weights, unused_TR)
            return h.add_(added) if in_place else h + added
        rows = job.mixed.rows(job.adapter_name, h.shape[0], h.device)
        if unused_TR is not None:
            unused_TR = unused_TR.view(*h.shape[:-1], -1)[rows].flatten(0, -2)
        added = _delta_of_all(h[rows], job.edit, weights, unused_TR)
        return h.index_add_(0, rows, added) if in_place else h.index_add(0, rows, added)

    def _check_shape(self, h: Tensor, selection: Selection) -> None:
        rows, width = selection.edited_BS.shape
        if h.shape[:-1] not in ((rows, width), (rows * width,)):
            raise ValueError(
                f"{self.name!r} returns shape {list(h.shape)}, which does not hold one state for each of the batch's "
                f"{rows} x {width} tokens. Choose in target_modules a module that works token by token, or set "
                "positions='all'."
            )


def _delta_of_all(h: Tensor, edit: Edit, weights: EditWeights, unused_TR: Tensor | None) -> Tensor:
    """What an edit adds to all rows of h [..., D]. `unused_TR` marks the directions that a row does not use."""
    return delta(h.reshape(-1, h.shape[-1]), edit, weights, unused_TR).view(h.shape)


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
