"""Hooks on a model, its encoder and its `generate`: each call of the model becomes one plan for its layers.

This module knows when a call begins and ends. What a call says of its tokens is selector.py's, what layers do about it plan.py's, and
the state that layers read is plan.py's ModelState. It takes out of the arguments what only ReFT reads (`prompt_lengths`,
`intervention_mask`, `subspaces`).

An encoder-decoder model has two streams of tokens. Its encoder's are found when the encoder is called, which `generate` does
outside any forward of the model; its decoder's when the model is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..parameters import distributed
from ..parameters.bases import Bases, retract_before_forward, watch_steps
from ..parameters.loading import check_state_dict, check_weights
from ..parameters.stacked import LayerAdapter, Stacked, can_be_stacked, needs_gradient
from ..positions.batch import TOLD, Batch
from ..positions.selection import Selection
from ..positions.spec import Rules
from .checkpointing import BackwardStop, bind_checkpoints, unbind_checkpoints
from .generation import Generation, given_input, given_prompts, refuse_unknown_prompts
from .mixed import MixedBatch
from .plan import Layer, ModelState, plan, with_own_weights
from .saving import SaveHook
from .selector import Call, Selector
from .transformers_api import forward_parameters


class ForwardContext:
    """Plans every forward of one model, for all its ReftLayers.

    Args:
        model (`torch.nn.Module`): The base model, whose calls are watched from the first adapter to `detach`.
        encoder (`torch.nn.Module`, *optional*): Its encoder, if it is an encoder-decoder model.
    """

    ATTRIBUTE = "_reft_context"  # of the base model, as long as it is watched

    def __init__(self, model: nn.Module, encoder: nn.Module | None) -> None:
        self.layers: list[Layer] = []
        self.rules: dict[str, Rules] = {}
        self.state = ModelState()
        self.has_encoder = encoder is not None
        self._encoder_parameters = () if encoder is None else forward_parameters(encoder)
        self._parameters = forward_parameters(model)
        self._sides: dict[str, set[bool]] = {}  # whether an adapter edits the encoder, the rest, or both
        self._stacks: list[nn.ModuleList] = []  # the lists that edited blocks stand in
        self._selector = Selector(self.state.checks)
        self._stop = BackwardStop()
        self._validated: dict[str, int] = {}  # adapter name -> id of the R parameter that was last validated
        self._handles: list[Any] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch_steps(self)

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext | None:
        """The context of a model that has ReftLayers, or of the base model inside it. None: it has none."""
        found = (vars(module).get(cls.ATTRIBUTE) for module in model.modules())
        return next((context for context in found if context is not None), None)

    def add_adapter(
        self, model: nn.Module, encoder: nn.Module | None, layers: list[Any], adapter_name: str, rules: Rules
    ) -> None:
        """Serve an adapter, and watch the calls of the model.

        Args:
            model (`torch.nn.Module`): The base model.
            encoder (`torch.nn.Module`, *optional*): Its encoder.
            layers (`list[ReftLayer]`): All its edited modules.
            adapter_name (`str`): The adapter, which is in the layers already.
            rules (`Rules`): How it finds its tokens.
        """
        self.layers = layers
        self.rules[adapter_name] = rules
        self._stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and any(c in layers for c in m)]
        self._sides[adapter_name] = {layer.in_encoder for layer in layers if adapter_name in layer.reft_config}
        if self._handles:
            return
        setattr(model, self.ATTRIBUTE, self)
        watch_steps(self)
        self._watch(model, self._before_forward, self._after_forward)
        self._handles += SaveHook(self.state, self._all_layers).watch(model)
        self._handles.append(model.register_load_state_dict_pre_hook(self._before_loading))
        if encoder is not None:
            self._watch(encoder, self._before_encoder, self._after_encoder)
        if hasattr(model, "generate"):
            model.generate = _Generate(self, model)  # type: ignore[assignment]

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
        for name in ("generate", self.ATTRIBUTE):
            model.__dict__.pop(name, None)

    # -- what others ask -----------------------------------------------------------------------------------------------

    def all_bases(self) -> list[Bases]:
        """The bases of all layers, for the hook of optimizer steps."""
        return [layer.bases for layer in self.layers]

    def _all_layers(self) -> list[Layer]:
        return self.layers

    def forget_weights(self) -> None:
        """What has been stacked of the weights may not be what they are."""
        self.state.weights.forget()

    def rules_in_use(self) -> list[Rules]:
        """The rules of the adapters that are switched on and edit some tokens of a prompt of a decoder, not all."""
        names = dict.fromkeys(answer.adapter_name for answer in self._ask() if not answer.in_encoder)
        return [rules for name in names if not (rules := self.rules[name]).spec.all_tokens]

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
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. Loaded are: "
                f"{', '.join(sorted(loaded))}."
            )
        call = self.state.call
        before, call.mixed = call.mixed, mixed
        try:
            yield mixed
        finally:
            call.mixed = before

    def _before_loading(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        check_state_dict(model, self.layers, self.rules, state_dict, prefix)

    # -- forward -----------------------------------------------------------------------------------------------------
    # torch.compile leaves what is decorated out of its graphs: it reads the cache, the batch and the state of the weights,
    # and its result, index tensors of few different shapes, is an input to the compiled layers.

    @torch.compiler.disable
    def _before_forward(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        call, generation = self.state.call, self.state.call.generation
        if generation is not None and generation.skips_decoding and generation.decodes(kwargs):
            call.jobs, call.skipped = {}, True
            return None
        arguments = {**dict(zip(self._parameters, args)), **kwargs}
        told = {key: value for key in TOLD if (value := arguments.pop(key, None)) is not None}
        call.told = told or (generation.told if generation is not None else {})
        call.jobs = {}
        self._begin(model)
        if model.training:
            bind_checkpoints(self._around_edits(model), self._remember)
            self._stop.watch(model)
        self._refuse_stray_subspaces(told, call.active)
        if call.mixed is not None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            call.mixed.refuse_other_size(first.shape[0], repeated=generation is not None)
        self._plan(model, arguments, in_encoder=False)
        if generation is not None:
            generation.advance()
        return args, {key: value for key, value in kwargs.items() if key not in TOLD}

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        self.state.call.clear()

    @torch.compiler.disable
    def _before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = self.state.call
        call.encoder_alone = call.jobs is None  # as generate calls it
        if call.jobs is None:
            call.jobs = {}
            call.told = call.generation.told if call.generation is not None else {}
            self._begin(encoder)
        self._plan(encoder, {**dict(zip(self._encoder_parameters, args)), **kwargs}, in_encoder=True)

    @torch.compiler.disable
    def _after_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        if self.state.call.encoder_alone:
            self.state.call.clear()

    def _begin(self, model: nn.Module) -> None:
        """Ask each layer once for its adapters in use, and see that their weights are as the layers are to read them."""
        self.state.checks.settle()
        call = self.state.call
        call.answers = self._ask()
        call.active = {}
        for answer in call.answers:
            call.active.setdefault(answer.adapter_name, answer)
        for name, first in call.active.items():
            # transformers' load_adapter puts new parameters in a layer, past the state dict and its checks.
            if self._validated.get(name) != id(first.R):
                check_weights(self.layers, name)
                self._validated[name] = id(first.R)
        retract_before_forward(model, self.all_bases())

    def _ask(self) -> list[LayerAdapter]:
        """The adapters in use in each layer."""
        mixed = self.state.call.mixed
        names = None if mixed is None else mixed.adapters
        return [answer for layer in self.layers for answer in layer.adapters_in_use(names)]

    def _plan(self, module: nn.Module, arguments: dict[str, Any], in_encoder: bool) -> None:
        """Find what every adapter in use edits in a call of the model or its encoder, stack the weights of those that have something to
        edit, and note each layer's part."""
        call = self.state.call
        # DataParallel's copies on other devices have weights of their own, which these layers are not.
        replica = getattr(module, "_is_replica", False)
        by_adapter: dict[str, list[LayerAdapter]] = {}
        answers = [answer for answer in call.answers or () if answer.in_encoder == in_encoder]
        for answer in answers:
            by_adapter.setdefault(answer.adapter_name, []).append(answer)
        selections: dict[str, Selection | None] = {}
        stacked: dict[str, tuple[Stacked, bool]] = {}
        by_rules: dict[tuple[Rules, bool], Selection | None] = {}
        for name, own in by_adapter.items():
            rules = self.rules[name]
            if rules.depend_on_batch:
                if distributed.is_distributed():
                    distributed.refuse_split_sequences()
                kind = (rules, True in self._sides[name])
                if kind not in by_rules:
                    by_rules[kind] = self._selector.select(rules, self._call(name, module, arguments, in_encoder))
                selection = by_rules[kind]
                if selection is not None and call.mixed is not None:
                    rows, device = selection.edited_BS.shape[0], selection.edited_BS.device
                    selection = selection.in_rows(call.mixed.rows(name, rows, device))
                selections[name] = selection
                if selection is None:  # a decode step
                    continue
            if not replica and (weights := self._stack(own, in_graph=rules.depend_on_batch)) is not None:
                stacked[name] = weights
        names = [layer.name for layer in self.layers if layer.in_encoder == in_encoder]
        assert call.jobs is not None
        call.jobs.update(plan(names, answers, selections, stacked, call.mixed, on_own_devices=not replica))
        call.recomputed = None

    def _call(self, name: str, module: nn.Module, arguments: dict[str, Any], in_encoder: bool) -> Call:
        """A call as the rules of an adapter see it."""
        state = self.state.call
        told, prefix = state.told or {}, ""
        if self.has_encoder and not in_encoder:
            prefix = "decoder_"
            if True in self._sides[name]:  # what is told of prompts is about the encoder's tokens, if it edits any
                told = {key: value for key, value in told.items() if key == "subspaces"}
        batch = Batch.from_inputs({**arguments, **told}, prefix)
        generation, model_name = state.generation, type(module).__name__
        return Call(
            model_name, arguments, batch, prefix, told.get("subspaces"), module.training, generation, in_encoder
        )

    def _stack(self, layers: list[LayerAdapter], in_graph: bool) -> tuple[Stacked, bool] | None:
        """The weights of an adapter for the forward, and whether they have a gradient. None: each layer reads its own.

        They are a part of the graph only where edits depend on the batch: others run in whatever a user may checkpoint by himself,
        and in its recompute, outside any forward, each layer reads its own weights. The two would not save the same tensors.
        """
        if not can_be_stacked(layers):
            return None
        if not torch.is_grad_enabled() or not needs_gradient(layers):
            return self.state.weights.of(layers), False
        return (Stacked(layers), True) if in_graph else None

    def _around_edits(self, model: nn.Module) -> Iterable[nn.Module]:
        """The modules that may run an edit again in backward: all, or, where only whole blocks are edited, what may have
        been wrapped around a block since."""
        if all(layer.is_block for layer in self.layers):
            return (member for stack in self._stacks for member in stack)
        return model.modules()

    def _remember(self) -> Callable[[], AbstractContextManager]:
        """For what is checkpointed, which runs now and again in backward: a context in which this forward's plan holds. Its
        layers read their own weights: what is stacked for all is a part of the graph outside."""
        call = self.state.call
        if call.recomputed is None:
            call.recomputed = with_own_weights(call.jobs or {})
        recomputed = call.recomputed

        @contextmanager
        def as_in_this_forward() -> Iterator[None]:
            before, call.jobs = call.jobs, recomputed
            try:
                yield
            finally:
                call.jobs = before

        return as_in_this_forward

    def _refuse_stray_subspaces(self, told: dict[str, Any], active: Iterable[str]) -> None:
        if "subspaces" in told and active and not any(self.rules[name].subspaces for name in active):
            raise ValueError(
                f"subspaces={told['subspaces']!r} was passed, but no adapter in use has subspaces. Set them in "
                "ReftConfig, for example ReftConfig(r=8, subspaces={'style': 4, 'facts': 4}), or leave subspaces out."
            )

    # -- generate ----------------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Note the prompt that a `generate` is given, and yield the arguments to pass on."""
        call, kwargs = self.state.call, dict(kwargs)
        told = {key: value for key in TOLD if (value := kwargs.pop(key, None)) is not None}
        active = {answer.adapter_name: answer for answer in self._ask()}
        in_use = [self.rules[name] for name in active if self.rules[name].depend_on_batch]
        self._refuse_stray_subspaces(told, active)
        if not in_use and call.mixed is None:
            yield kwargs
            return
        rows = given_input(model, args, kwargs).shape[0]
        if call.mixed is not None:
            call.mixed.refuse_other_size(rows, repeated=False)
        prompts = None
        if in_use:
            refuse_unknown_prompts(model, kwargs)
            # What an encoder-decoder model is given goes to its encoder, and is no prompt of its decoder.
            prompts = None if self.has_encoder else given_prompts(model, args, kwargs, told)
        skips = bool(in_use) and not any(self.rules[name].spec.all_tokens for name in active)
        before, call.generation = call.generation, Generation(told, rows, prompts, skips_decoding=skips)
        try:
            yield kwargs
        finally:
            call.generation = before


class _Generate:
    """The base model's `generate`, with its prompt noted. An object rather than a closure, to be copied and pickled."""

    def __init__(self, context: ForwardContext, model: Any) -> None:
        self.context = context
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context.generating(self.model, args, kwargs) as passed:
            return type(self.model).generate(self.model, *args, **passed)
