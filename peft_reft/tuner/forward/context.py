"""The bridge between a call of the model and its edited layers: one Selection per forward.

This module knows how a call reaches a transformers model, and its layers. It takes out what only ReFT reads (`prompt_lengths`,
`intervention_mask`, `subspaces`), has selecting.py find the tokens to edit and weights.py prepare what to edit them with, and keeps
the result where the layers look it up for as long as the call lasts.

An encoder-decoder model has two streams of tokens. Its encoder's are found when the encoder is called, which `generate` does
outside any forward of the model; its decoder's when the model is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import ReftConfig
from ..layer import ReftLayer
from ..parameters import distributed
from ..parameters.bases import retract_before_forward, watch_steps
from ..parameters.loading import check_state_dict, check_weights
from ..parameters.stacked import Prepared, PreparedWeights, can_be_prepared, needs_gradient
from ..positions.batch import Rules
from ..positions.selection import Selection
from .backward_stop import BackwardStop
from .checkpointing import bind_checkpoints, unbind_checkpoints
from .generation import Generation, given_input, given_prompts, refuse_unknown_prompts
from .mixed import MixedBatch
from .plan import Job, Jobs, plan, with_own_weights
from .saving import watch_saving
from .selector import Call, Selector
from .transformers_api import encoder_of, forward_parameters


Configs = dict[str, ReftConfig]  # by the adapter's name

TOLD = ("prompt_lengths", "intervention_mask", "subspaces")


class CallState(threading.local):
    """What belongs to the call that a thread is in. Threads may run one model, as `torch.nn.DataParallel` does."""

    mixed: MixedBatch | None = None
    generation: Generation | None = None
    told: dict[str, Any] | None = None
    jobs: Jobs | None = None  # None: no forward is running
    resting: bool = False  # a decode step is running in which no layer has anything to do
    recomputed: Jobs | None = None  # the same, for what runs in it and again in backward
    encoder_alone: bool = False
    saving: bool = False  # the state dict of the whole model is being collected

    def clear(self) -> None:
        """The forward is over."""
        self.jobs = self.recomputed = self.told = None
        self.resting = self.saving = False


class ForwardContext:
    """Builds the Selection of every forward of one model, for all its ReftLayers.

    Args:
        model (`torch.nn.Module`): The base model, whose calls are watched from the first adapter to `detach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[ReftLayer] = []
        self.rules: dict[str, Rules] = {}
        self.parameters = forward_parameters(model)
        self.encoder_parameters: tuple[str, ...] = ()
        self._configs: dict[str, ReftConfig] = {}
        self._sides: dict[str, set[bool]] = {}  # whether an adapter edits the encoder, the rest, or both
        self._stacks: list[nn.ModuleList] = []  # the lists that edited blocks stand in
        self._selector = Selector()
        self._prepared = PreparedWeights()
        self._stop = BackwardStop()
        self._checked: dict[str, int] = {}  # the basis that an adapter had when its weights were last known to be good
        self.state = CallState()
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "state"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, state=CallState())
        watch_steps(self)

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext:
        """The context of a model that has ReftLayers already, else a new one."""
        for module in model.modules():
            if isinstance(module, ReftLayer) and isinstance(module.context, cls):
                return module.context
        return cls(model)

    def add_adapter(self, model: nn.Module, adapter_name: str, rules: Rules) -> None:
        """Serve an adapter, whose layers are in the model already, and watch the calls of the model."""
        self.layers = [module for module in model.modules() if isinstance(module, ReftLayer)]
        self.rules[adapter_name] = rules
        self._configs[adapter_name] = next(
            layer.reft_config[adapter_name] for layer in self.layers if adapter_name in layer.reft_config
        )
        self._stacks = [
            m for m in model.modules() if isinstance(m, nn.ModuleList) and any(c in self.layers for c in m)
        ]
        self._sides[adapter_name] = {layer.in_encoder for layer in self.layers if adapter_name in layer.reft_config}
        if self._handles:
            return
        watch_steps(self)
        self._watch(model, self._before_forward, self._after_forward)
        self._handles += watch_saving(model, self)
        self._handles.append(model.register_load_state_dict_pre_hook(self._before_loading))
        encoder = encoder_of(model)
        if encoder is not None:
            self.encoder_parameters = forward_parameters(encoder)
            self._watch(encoder, self._before_encoder, self._after_encoder)
        if hasattr(model, "generate"):
            model.generate = _Generate(self, model)  # type: ignore[assignment]

    def _around_edits(self, model: nn.Module) -> Iterable[nn.Module]:
        """The modules that may run an edit again in backward: all, or, where only whole blocks are edited, what may have
        been wrapped around a block since."""
        if all(layer.is_block for layer in self.layers):
            return (member for stack in self._stacks for member in stack)
        return model.modules()

    def _watch(self, module: nn.Module, before: Callable, after: Callable) -> None:
        self._handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, always_call=True),
        ]

    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        unbind_checkpoints(model.modules())
        self._stop.remove()
        model.__dict__.pop("generate", None)

    def unplanned_jobs(self, layer: ReftLayer) -> tuple[Job, ...]:
        """The jobs of a layer that is not in the plan, or runs outside any forward, which is possible where all tokens are edited.

        Raises:
            RuntimeError: where they are not, so that the tokens to edit are unknown.
        """
        if self.state.resting:
            return ()
        jobs = plan([layer], {}, {}, self.mixed)[layer.name]
        if any(layer.needs_selection(job.adapter_name) for job in jobs):
            raise RuntimeError(
                f"{layer.name!r} ran without a Selection: it was called outside a forward of the whole model, so ReFT can't "
                "know which tokens to edit. Call the PeftModel (or its base model), not a part of it. If the call came "
                "from the backward pass of activation checkpointing, leave target_modules out: whole blocks are edited "
                "outside the part that is recomputed."
            )
        return jobs

    def forget_weights(self) -> None:
        """What has been prepared of the weights may not be what they are."""
        self._prepared.forget()

    def settle_checks(self) -> None:
        """
        Raises:
            ValueError: for what an earlier batch on a GPU is refused for.
        """
        self._selector.checks.settle()

    # -- mixed batches -----------------------------------------------------------------------------------------------

    @property
    def mixed(self) -> MixedBatch | None:
        """The adapters of the examples, where each has its own."""
        return self.state.mixed

    @contextmanager
    def mixing(self, adapter_names: Any) -> Iterator[MixedBatch]:
        """Run the calls within with an adapter for each example.

        Raises:
            ValueError: when there is no adapter of a name.
        """
        mixed = MixedBatch(adapter_names)
        loaded = {name for layer in self.layers for name in layer.reft_R}
        unknown = sorted(set(mixed.adapters) - loaded)
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Loaded are: {', '.join(sorted(loaded))}."
            )
        before, self.state.mixed = self.state.mixed, mixed
        try:
            yield mixed
        finally:
            self.state.mixed = before

    # -- loading -----------------------------------------------------------------------------------------------------

    def _before_loading(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        check_state_dict(model, self.layers, self.rules, state_dict, prefix)

    def _check_replaced(self, active: Configs) -> None:
        """Check weights that came with no state dict: transformers' load_adapter puts new parameters in place of a layer's. Of
        each adapter one is looked at, in every forward."""
        for name in active:
            layer = next(layer for layer in self.layers if name in layer.reft_R)
            if self._checked.get(name) != id(layer.reft_R[name]):
                check_weights(self.layers, name)
                self._checked[name] = id(layer.reft_R[name])

    # -- forward -----------------------------------------------------------------------------------------------------
    # torch.compile leaves what is decorated out of its graphs: it reads the cache, the batch and the state of the weights,
    # and its result, index tensors of few different shapes, is an input to the compiled layers.

    @torch.compiler.disable
    def _before_forward(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        state, generation = self.state, self.state.generation
        if generation is not None and generation.rests_in_decoding and generation.decodes(kwargs):
            state.jobs, state.resting = {}, True
            return None
        arguments = {**dict(zip(self.parameters, args)), **kwargs}
        told = {key: value for key in TOLD if (value := arguments.pop(key, None)) is not None}
        state.told = told or (generation.told if generation is not None else {})
        state.jobs = {}
        active = self._active()
        self.settle_checks()
        self._settle_weights(model, active)
        if model.training:
            bind_checkpoints(self._around_edits(model), self._remember)
            self._stop.watch(model)
        _refuse_stray_subspaces(told, active)
        if self.mixed is not None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.mixed.refuse_other_size(first.shape[0], repeated=generation is not None)
        self._plan(model, arguments, active, in_encoder=False)
        if generation is not None:
            generation.advance()
        return args, {key: value for key, value in kwargs.items() if key not in TOLD}

    def _settle_weights(self, model: nn.Module, active: Configs) -> None:
        """See that the weights are where and as the layers read them."""
        for layer in self.layers:
            layer.keep_weights()
        self._check_replaced(active)
        retract_before_forward(model, self.layers)

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.state.clear()

    @torch.compiler.disable
    def _before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state, active = self.state, self._active()
        state.encoder_alone = state.jobs is None  # as generate calls it
        if state.jobs is None:
            state.jobs = {}
            state.told = state.generation.told if state.generation is not None else {}
            self._settle_weights(encoder, active)
        self._plan(encoder, {**dict(zip(self.encoder_parameters, args)), **kwargs}, active, in_encoder=True)

    @torch.compiler.disable
    def _after_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        if self.state.encoder_alone:
            self.state.clear()

    def _plan(self, module: nn.Module, arguments: dict[str, Any], active: Configs, in_encoder: bool) -> None:
        """Find what every active adapter edits in a call of the model or its encoder, prepare the weights of those that have
        something to edit, and note each layer's part."""
        state, selections = self.state, {}
        # DataParallel's copies on other devices have weights of their own, which these layers are not.
        replica = getattr(module, "_is_replica", False)
        in_use = self._in_use(active, in_encoder)
        if in_use and distributed.is_distributed():
            distributed.refuse_split_sequences()
        by_rules: dict[tuple[Rules, Any], Selection | None] = {}
        for name, config in in_use.items():
            groups = None if config.subspaces is None else tuple(config.subspaces.items())
            kind = (self.rules[name], groups)
            if kind not in by_rules:
                call = self._call(name, module, arguments, in_encoder)
                by_rules[kind] = self._selector.select(self.rules[name], config.subspaces, call)
            selection = by_rules[kind]
            if self.mixed is not None and selection is not None:
                rows, device = selection.edited_BS.shape[0], selection.edited_BS.device
                selection = selection.in_rows(self.mixed.rows(name, rows, device))
            selections[name, in_encoder] = selection
        layers = [layer for layer in self.layers if layer.in_encoder == in_encoder]
        prepared = {
            name: found
            for name in active
            if not replica
            and (name not in in_use or selections[name, in_encoder] is not None)
            and (found := self._prepared_weights(layers, name, in_graph=name in in_use)) is not None
        }
        assert state.jobs is not None
        state.jobs.update(plan(layers, selections, prepared, self.mixed, on_own_devices=not replica))
        state.recomputed = None

    def _call(self, name: str, module: nn.Module, arguments: dict[str, Any], in_encoder: bool) -> Call:
        """A call as the rules of an adapter see it."""
        told, prefix = self.state.told or {}, ""
        if self.encoder_parameters and not in_encoder:
            prefix = "decoder_"
            if True in self._sides[name]:  # what is told of prompts is about the encoder's tokens, if it edits any
                told = {key: value for key, value in told.items() if key == "subspaces"}
        generation, model_name = self.state.generation, type(module).__name__
        return Call(model_name, arguments, told, module.training, generation, prefix, in_encoder)

    def _prepared_weights(self, layers: list[ReftLayer], name: str, in_graph: bool) -> tuple[Prepared, bool] | None:
        """The weights of an adapter for the forward, and whether they have a gradient. None: each layer reads its own.

        They are a part of the graph only where edits depend on the token: others run in whatever a user may checkpoint by himself,
        and in its recompute, outside any forward, each layer reads its own weights. The two would not save the same tensors.
        """
        layers = [layer for layer in layers if name in layer.reft_R._parameters]
        if not layers or not can_be_prepared(layers, name):
            return None
        if not torch.is_grad_enabled() or not any(needs_gradient(layer, name) for layer in layers):
            return self._prepared.of(layers, name), False
        return (Prepared(layers, name), True) if in_graph else None

    def _active(self) -> Configs:
        """The adapters that are switched on, or that the examples of a mixed batch use, by name."""
        enabled = [layer for layer in self.layers if not layer.disable_adapters]
        if not enabled:
            return {}
        active = (name for layer in enabled for name in layer.active_adapters)  # single layers may have others
        names = dict.fromkeys(active) if self.mixed is None else self.mixed.adapters
        return {name: self._configs[name] for name in names if name in self._configs}

    def rules_in_use(self) -> list[Rules]:
        """Those of the adapters that are switched on and edit some tokens of a prompt of a decoder, not all."""
        names = self._in_use(self._active(), in_encoder=False)
        return [rules for name in names if not (rules := self.rules[name]).spec.all_tokens]

    def _in_use(self, active: Configs, in_encoder: bool) -> Configs:
        """Those of them whose edit depends on the token."""
        return {
            name: config
            for name, config in active.items()
            if in_encoder in self._sides[name]
            and (not self.rules[name].spec.all_tokens or config.subspaces is not None)
        }

    def _remember(self) -> Callable[[], AbstractContextManager]:
        """For what is checkpointed, which runs now and again in backward: a context in which this forward's plan holds. Its
        layers read their own weights: what is prepared for all is a part of the graph outside."""
        if self.state.recomputed is None:
            self.state.recomputed = with_own_weights(self.state.jobs or {})
        recomputed = self.state.recomputed

        @contextmanager
        def as_in_this_forward() -> Iterator[None]:
            before, self.state.jobs = self.state.jobs, recomputed
            try:
                yield
            finally:
                self.state.jobs = before

        return as_in_this_forward

    # -- generate ----------------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Note the prompt that a `generate` is given, and yield the arguments to pass on."""
        kwargs = dict(kwargs)
        told = {key: value for key in TOLD if (value := kwargs.pop(key, None)) is not None}
        active = self._active()
        in_use = {**self._in_use(active, in_encoder=False), **self._in_use(active, in_encoder=True)}
        _refuse_stray_subspaces(told, active)
        if not in_use and self.mixed is None:
            yield kwargs
            return
        rows = given_input(model, args, kwargs).shape[0]
        if self.mixed is not None:
            self.mixed.refuse_other_size(rows, repeated=False)
        prompts = None
        if in_use:
            refuse_unknown_prompts(model, kwargs)
            # What an encoder-decoder model is given goes to its encoder, and is no prompt of its decoder.
            prompts = None if self.encoder_parameters else given_prompts(model, args, kwargs, told)
        rests = bool(in_use) and not any(self.rules[name].spec.all_tokens for name in active)
        before = self.state.generation
        self.state.generation = Generation(told, rows, prompts, rests_in_decoding=rests)
        try:
            yield kwargs
        finally:
            self.state.generation = before


def _refuse_stray_subspaces(told: dict[str, Any], active: Configs) -> None:
    if "subspaces" in told and active and not any(config.subspaces for config in active.values()):
        raise ValueError(
            f"subspaces={told['subspaces']!r} was passed, but no adapter in use has subspaces. Set them in ReftConfig, for "
            "example ReftConfig(r=8, subspaces={'style': 4, 'facts': 4}), or leave subspaces out."
        )


class _Generate:
    """The base model's `generate`, with its prompt noted. An object rather than a closure, to be copied and pickled."""

    def __init__(self, context: ForwardContext, model: Any) -> None:
        self.context = context
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context.generating(self.model, args, kwargs) as passed:
            return type(self.model).generate(self.model, *args, **passed)
