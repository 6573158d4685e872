"""ReftModel: wraps the modules to edit in ReftLayers, and unwraps, merges and mixes adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import nn

from .config import ReftConfig
from .engines_api import check_accelerate, has_hook
from .forward.context import ForwardContext
from .forward.mixed import mixed_modules_to_save
from .forward.transformers_api import Conv1D, check_transformers, encoder_of
from .layer import ReftLayer
from .merging import quantization_backend, refuse_shared_weights, warn_of_new_biases
from .parameters.distributed import refuse_sharded_base
from .parameters.loading import check_names
from .peft_api import AuxiliaryTrainingWrapper, BaseTuner, BaseTunerLayer, _maybe_include_all_linear_layers, check_peft
from .peft_type import NAME
from .rules import rules_of
from .targets import Target, find_targets, not_a_target, target_of


# TRL's preference trainers, given a PeftModel, add an adapter of this name to be the reference, with the very config
# object of "default", and copy to it the weights whose names contain ".default.". ReFT's names end in ".default".
REFERENCE, TRAINED = "ref", "default"


class ReftModel(BaseTuner):
    """Creates a Representation Finetuning (ReFT) model from a pretrained model: arXiv 2404.03592.

    Args:
        model (`torch.nn.Module`): The model to adapt. Its modules are wrapped in place, and its parameters frozen.
        config (`ReftConfig`): The configuration of the adapter.
        adapter_name (`str`): The name of the adapter, `"default"` by default.
        low_cpu_mem_usage (`bool`): Create the adapter's weights on the meta device, for weights that are loaded next.

    Returns:
        `torch.nn.Module`: The ReFT model.

    Raises:
        ValueError: when the modules to edit can't be found or do not fit the config, or when an adapter of another
            method has the same name.
        NotImplementedError: when the model can't be adapted in its present state, with the reason and the way out.
        RuntimeError: when transformers, PEFT or accelerate lacks a name that ReFT relies on.

    Example:

        ```py
        >>> import peft_reft
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM

        >>> base = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> model = get_peft_model(base, peft_reft.ReftConfig(r=8, positions="f7+l7", task_type="CAUSAL_LM"))
        ```
    """

    prefix: str = "reft_"
    tuner_layer_cls = ReftLayer
    target_module_mapping: dict[str, list[str]] = {}  # empty: main_stack finds the blocks of any architecture

    def __init__(self, model: Any, peft_config: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        check_transformers()
        check_peft()
        check_accelerate()
        if isinstance(model, PeftModel):  # a model with LoRA, for example: ReFT then joins LoRA on the same base model
            model = model.get_base_model()
        for name, other in getattr(model, "peft_config", {}).items():
            if other.peft_type != NAME:
                _refuse_beside(other, name, adapter_name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Call the model, not its forward as PEFT 0.20 does: the hooks of forward/context.py run only in __call__.
        return self.model(*args, **kwargs)

    @property
    def _layers(self) -> list[ReftLayer]:
        """All edited modules of the base model."""
        return cast("list[ReftLayer]", self._context.layers)

    # -- injection ---------------------------------------------------------------------------------------------------

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not adapter_name or "." in adapter_name:
            raise ValueError(
                f"adapter_name={adapter_name!r} is not possible: PEFT makes it a part of the names of parameters, "
                "where a dot separates modules. Choose a name without dots."
            )
        encoder = encoder_of(model)
        self._context = ForwardContext.of(model) or ForwardContext(model, encoder)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [module for module in model.modules() if isinstance(module, ReftLayer)]
        self._context.add_adapter(model, encoder, layers, adapter_name, self._rules)
        configs = self.peft_config
        if adapter_name == REFERENCE and configs[REFERENCE] is configs.get(TRAINED):
            _copy_adapter(model, TRAINED, REFERENCE)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        return peft_config

    def _prepare_model(self, peft_config: ReftConfig, model: nn.Module) -> None:  # type: ignore[override]
        """Find the modules to edit, and raise what speaks against it, before anything is changed.

        Raises:
            NotImplementedError: when the base model is sharded, or is on disk and has lost accelerate's hooks.
            ValueError: when the modules can't be found, or the config does not fit them.
        """
        if not peft_config.inference_mode:
            refuse_sharded_base(model)
        _refuse_unhooked(model)
        self._include_all_linear_layers(peft_config, model)
        self._targets: dict[str, Target] = find_targets(model, peft_config)
        peft_config.note_width({target.width for target in self._targets.values()})
        self._rules = rules_of(model, peft_config)
        encoder = encoder_of(model)
        self._encoder_modules = set() if encoder is None else set(encoder.modules())

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        """Freeze the base model. Trainable parameters of other methods' adapters stay trainable."""
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, ReftLayer)]
        trained = [parameter for layer in layers for parameter in layer.parameters() if parameter.requires_grad]
        super()._mark_only_adapters_as_trainable(model)
        for parameter in trained:
            parameter.requires_grad = True

    def _include_all_linear_layers(self, peft_config: ReftConfig, model: nn.Module) -> None:
        """Resolve "all-linear". PEFT does not recognise a linear layer that a ReftLayer of another adapter wraps, so
        those are added here."""
        given = peft_config.target_modules
        _maybe_include_all_linear_layers(peft_config, model)
        if isinstance(given, str) and isinstance(found := peft_config.target_modules, set):
            output = getattr(model, "get_output_embeddings", lambda: None)()
            for name, module in model.named_modules():
                wrapped = isinstance(module, ReftLayer) and isinstance(module.get_base_layer(), (nn.Linear, Conv1D))
                if wrapped and module is not output:
                    found.add(name)

    def _check_target_module_exists(self, peft_config: ReftConfig, key: str) -> Any:  # type: ignore[override]
        return key in self._targets or not_a_target(key, peft_config)

    def _create_and_replace(  # type: ignore[override]
        self,
        peft_config: ReftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        # PEFT can also inject by the keys of a state dict. Such a key may be a module that the config does not name.
        found = self._targets.get(current_key) or target_of(self.model, peft_config, current_key)
        if isinstance(target, ReftLayer):
            target.update_layer(adapter_name, peft_config, found.rank, found.width)
            return
        in_encoder = target in self._encoder_modules
        layer = ReftLayer(target, self._context.state, current_key, found.is_block, in_encoder, found.layout)
        layer.quantization_backend = quantization_backend(target, self.model)
        layer.update_layer(adapter_name, peft_config, found.rank, found.width)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # as PEFT does: a second adapter is frozen until set_adapter names it
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        new_module.training = child.training
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast the weights to the dtype of the modules that they edit, if `autocast_adapter_dtype` is False. They are
        made in float32 and stay in it otherwise."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            for layer in self._layers:
                layer.cast_adapter_as_base(adapter_name)

    # -- strength -----------------------------------------------------------------------------------------------------

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter in all layers to `scale` times that in its config, 1 unless it was set.

        It counts from the next forward on, for `generate` and mixed batches too, and is not saved. To save it, set
        `scale` in the adapter's config: `model.peft_config[adapter].scale = 0.5`.

        Args:
            adapter (`str`): The adapter.
            scale (`float`): 0 computes what the base model does and 1 what the adapter was trained to, to the bit.
                Values between and beyond steer.

        Raises:
            TypeError: when `scale` is no number.
            ValueError: when `scale` is not finite, or when the adapter is not loaded or merged.
        """
        if not any(adapter in layer.scaling for layer in self._layers):
            own = [name for name, config in self.peft_config.items() if config.peft_type == NAME]
            raise ValueError(f"There is no ReFT adapter {adapter!r} to scale. Loaded are: {', '.join(own)}.")
        for layer in self._layers:
            layer.set_scale(adapter, scale)

    # -- saving and loading -------------------------------------------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls, model: Any, config: PeftConfig, adapter_name: str, state_dict: dict[str, Any], *_: Any, **__: Any
    ) -> dict[str, Any]:
        """The tensors of ReFT in a state dict from which PEFT has removed other adapters. PEFT's own method compares
        keys with the names of modules, to which FSDP's activation checkpointing adds a prefix: it would save an
        adapter inside a checkpointed block empty."""
        return {
            key: value for key, value in state_dict.items() if f".{cls.prefix}" in key or key.startswith(cls.prefix)
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Any]
    ) -> dict[str, Any]:
        """Check the names of tensors before they are loaded as an adapter. PEFT calls this from 0.21 on; 0.20 does not
        say which adapter it loads."""
        base: Any = super()  # Any: the class has no such method in PEFT 0.20
        remapped = base._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_names(model, config, adapter_name, remapped)
        return remapped

    # -- merging and removal ------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._refuse_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if not merge:
            return self._take_off()
        self._refuse_merge(adapter_names, safe_merge)
        model: Any = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        self._context.detach(model)
        warn_of_new_biases(self._layers)
        return model

    def _take_off(self) -> nn.Module:
        """Put every wrapped module back. PEFT's own method would remove the layers of other methods, too."""
        # Inner modules first: the name of a module is invalid as soon as the ReftLayer around it is gone.
        for name, module in reversed(list(self.model.named_modules())):
            parent, _, last = name.rpartition(".")
            if isinstance(module, ReftLayer):
                setattr(self.model.get_submodule(parent), last, module.base_layer)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                restored = module.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                setattr(self.model.get_submodule(parent), last, restored)
        self._context.detach(self.model)
        for name in [name for name, config in self.peft_config.items() if config.peft_type == NAME]:
            del self.peft_config[name]
        if not self.peft_config and hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def _refuse_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Raise any obstacle to merging before the first layer is changed.

        Raises:
            NotImplementedError: when a layer can't take an edit in, or shares its weight with another module.
            ValueError: when an adapter is not loaded, or, with `safe_merge`, when its weights are not finite.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        unknown = sorted(set(names) - set(self.peft_config))
        if unknown:
            raise ValueError(
                f"There is no adapter {unknown[0]!r} to merge. Loaded are: {', '.join(self.peft_config)}."
            )
        targets = [(layer, name) for layer in self._layers for name in names if name in layer.reft_R]
        for layer, name in targets:
            layer.refuse_merge(name)
            if safe_merge and not all(weight is None or weight.isfinite().all() for weight in layer.weights(name)):
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it holds NaN or "
                    f"infinity in {layer.name!r}. Nothing was merged."
                )
        refuse_shared_weights(self.model, {layer.name: layer.get_base_layer() for layer, _ in targets})
        backends = {layer.quantization_backend.backend_name for layer, _ in targets if layer.quantization_backend}
        if backends:
            warnings.warn(
                f"Merged weights are rounded to {', '.join(sorted(backends))} again, which changes more than the edit "
                "asks for, and unmerging does not bring the base's own weights back to the bit. Merge into an "
                "unquantized base where it matters."
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, adapter_names: Any = None, **kwargs: Any) -> Iterator[None]:
        """Calls inside this context use an adapter for each example of the batch, PEFT's `adapter_names`.

        Raises:
            ValueError: when adapters are merged, the model is in training mode, or an adapter is not loaded.
        """
        if adapter_names is None:
            yield
            return
        merged = sorted({name for layer in self._layers for name in layer.merged_adapters})
        if merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first. "
                f"Merged are: {', '.join(merged)}."
            )
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. Call model.eval() first."
            )
        with self._context.mixing(adapter_names) as mixed, mixed_modules_to_save(self.model, mixed):
            yield

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        # PEFT activates the next adapter that the first layer has, and none if it has none. But adapters may edit
        # different layers, so activate the first adapter that is left.
        if not self.active_adapters and self.peft_config:
            self.set_adapter(next(iter(self.peft_config)))


@torch.no_grad()
def _copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Copy the weights of an adapter to another of the same config, with modules and tokens that it trains."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        if source in (parts := name.split(".")):
            copy = parameters.get(".".join(target if part == source else part for part in parts))
            if copy is not None and copy.shape == parameter.shape and not copy.is_meta:
                copy.copy_(parameter)


def _refuse_beside(other: PeftConfig, name: str, adapter_name: str) -> None:
    """Check that a ReFT adapter can stand beside an adapter of another method on the same model.

    Args:
        other (`PeftConfig`): The config of the adapter that is on the model.
        name (`str`): Its name.
        adapter_name (`str`): The name of the new ReFT adapter.

    Raises:
        ValueError: when both have the same name.
        NotImplementedError: when the other adapter trains modules that serve one adapter at a time.
    """
    if name == adapter_name:
        raise ValueError(
            f"adapter_name={adapter_name!r} is that of a {other.peft_type} adapter on the model. Give each a name of "
            "its own, such as adapter_name='lora' and adapter_name='reft'."
        )
    for field in ("modules_to_save", "trainable_token_indices"):
        if getattr(other, field, None):
            raise NotImplementedError(
                f"The adapter {name!r} on the model has {field}={getattr(other, field)!r}, which would be switched "
                f"off with the switch to {adapter_name!r}. Set {field} in ReftConfig instead; PEFT sets "
                "modules_to_save by itself where a config has task_type SEQ_CLS, TOKEN_CLS or QUESTION_ANS, so leave "
                "that to ReftConfig, too."
            )


def _refuse_unhooked(model: nn.Module) -> None:
    """Refuse a base model on disk that `PeftModel.from_pretrained` has prepared. It removes the hooks that load the
    weights, and adds new ones by names that only layers such as LoRA's have (PEFT 0.21, `_update_offload`).

    Raises:
        NotImplementedError: when a model on disk has lost its hooks.
    """
    device_map = getattr(model, "hf_device_map", None) or {}
    if "disk" in device_map.values() and not any(map(has_hook, model.modules())):
        raise NotImplementedError(
            "PeftModel.from_pretrained can't load a ReFT adapter on a base model that device_map puts on disk, and "
            "has taken the base's hooks off. Load the base anew, and add the adapter to it as it is: model = "
            "get_peft_model(base, PeftConfig.from_pretrained(path)), then set_peft_model_state_dict(model, "
            "load_peft_weights(path))."
        )
