"""Hooks on a model, its encoder and its `generate`: each call of the model becomes one plan for its layers.

This module knows when a call begins and ends, and removes the arguments that only ReFT reads (`prompt_lengths`,
`intervention_mask`, `subspaces`) before the base model sees them. selector.py finds the tokens of a call, plan.py
makes the jobs of the layers, and plan.ModelState is the state that layers read.

An encoder-decoder model has two streams of tokens. The encoder's tokens are found when the encoder is called, which
`generate` does outside any forward of the model; the decoder's tokens when the model is called.
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
from ..parameters.stacked import Stacked, can_be_stacked, needs_gradient
from ..positions.batch import REFT_ARGUMENTS, Batch
from ..positions.selection import Selection
from ..positions.spec import Rules
from .checkpointing import BackwardStop, bind_checkpoints, unbind_checkpoints
from .generation import Generation, given_input, given_prompts, refuse_unknown_prompts
from .graphs import outside_graphs, refuse_export
from .in_use import AdaptersInUse
from .mixed import MixedBatch
from .plan import Layer, ModelState, plan, with_own_weights
from .probe import UnconfirmedLayouts
from .reuse import make_cache_fit, mark_cache
from .saving import SaveHook
from .selector import Call, Selector
from .transformers_api import forward_parameters


class ForwardContext:
    """Plans every forward of one model, for all its ReftLayers.

    Args:
        model (`torch.nn.Module`): The base model. It has this module's hooks from the first `add_adapter` to `detach`.
        encoder (`torch.nn.Module`, *optional*): Its encoder, if it is an encoder-decoder model.
    """

    ATTRIBUTE = "_reft_context"  # the base model's attribute that holds its context, while the hooks are on

    def __init__(self, model: nn.Module, encoder: nn.Module | None) -> None:
        self.layers: list[Layer] = []
        self.rules: dict[str, Rules] = {}
        self.state = ModelState()
        self.has_encoder = encoder is not None
        self._encoder_parameters = () if encoder is None else forward_parameters(encoder)
        self._parameters = forward_parameters(model)
        self._sides: dict[str, set[bool]] = {}  # adapter name -> `in_encoder` of its layers
        self._block_lists: list[nn.ModuleList] = []  # the lists of modules that have edited blocks as members
        self._selector = Selector(self.state.unedited)
        self._stop = BackwardStop()
        self._validated: dict[str, int] = {}  # adapter name -> id of the R parameter that was last validated
        self._handles: list[Any] = []
        self._unconfirmed = UnconfirmedLayouts()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        watch_steps(self)

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext | None:
        """The context of a model, or of the first of its modules that has one. None: it has no ReftLayers."""
        found = (vars(module).get(cls.ATTRIBUTE) for module in model.modules())
        return next((context for context in found if context is not None), None)

    def add_adapter(
        self, model: nn.Module, encoder: nn.Module | None, layers: list[Any], adapter_name: str, rules: Rules
    ) -> None:
        """Plan forwards for an adapter, too. The first call registers the hooks on the model.

        Args:
            model (`torch.nn.Module`): The base model.
            encoder (`torch.nn.Module`, *optional*): Its encoder.
            layers (`list[ReftLayer]`): All ReftLayers of the model.
            adapter_name (`str`): The adapter. Its weights are in the layers already.
            rules (`Rules`): The rules by which the adapter finds its tokens.
        """
        self.layers = layers
        self.rules[adapter_name] = rules
        self._block_lists = [
            m for m in model.modules() if isinstance(m, nn.ModuleList) and any(c in layers for c in m)
        ]
        self._unconfirmed.add(layers)
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
        """Remove all hooks and attributes of ReFT from the model.

        Args:
            model (`torch.nn.Module`): The base model.
        """
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        unbind_checkpoints(model.modules())
        self._stop.remove()
        for name in ("generate", self.ATTRIBUTE):
            model.__dict__.pop(name, None)

    # -- for other modules --------------------------------------------------------------------------------------------

    def all_bases(self) -> list[Bases]:
        """The R of all layers. The hook of optimizer steps (parameters/bases.py) calls this."""
        return [layer.bases for layer in self.layers]

    def _all_layers(self) -> list[Layer]:
        return self.layers

    def forget_weights(self) -> None:
        """Drop what was computed from the parameters, as they may have changed. The hook of optimizer steps calls
        this."""
        self.state.forget()

    def rules_in_use(self) -> list[Rules]:
        """The rules of the adapters in use that edit some tokens, not all, and not of an encoder."""
        names = self._adapters_in_use().by_name[False]
        return [rules for name in names if not (rules := self.rules[name]).spec.all_tokens]

    @contextmanager
    def mixing(self, adapter_names: Any) -> Iterator[MixedBatch]:
        """Calls inside this context use an adapter for each example of the batch.

        Args:
            adapter_names (`Sequence[str]`): The name of an adapter for each example, `"__base__"` for none.

        Raises:
            ValueError: when no adapter of such a name is loaded.
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
    # These hooks are not compiled: they read the cache, the batch and the state of the weights. Their results, index
    # tensors of few different shapes, are inputs of the compiled layers.

    @outside_graphs
    def _before_forward(
        self, model: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]] | None:
        refuse_export()
        call, generation = self.state.call, self.state.call.generation
        if generation is not None and generation.skips_decoding and generation.decodes(kwargs):
            call.jobs, call.skipped = {}, True
            return None
        arguments = {**dict(zip(self._parameters, args)), **kwargs}
        given = {key: value for key in REFT_ARGUMENTS if (value := arguments.pop(key, None)) is not None}
        call.given = given or (generation.given if generation is not None else {})
        call.jobs = {}
        in_use = self._begin(model)
        if model.training:
            bind_checkpoints(self._may_checkpoint_edits(model), self._remember)
            self._stop.watch(model)
        self._refuse_unused_subspaces(given, in_use.first)
        if call.mixed is not None:
            tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            call.mixed.refuse_other_size(tensor.shape[0], repeated=generation is not None)
        self._plan(model, arguments, in_encoder=False)
        if generation is not None:
            generation.advance()
        return args, {key: value for key, value in kwargs.items() if key not in REFT_ARGUMENTS}

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        call = self.state.call
        if call.edits and call.in_use is not None and not model.training:
            used = {name: call.edits.get(self.rules[name]) for name in call.in_use.first}
            mark_cache(output, {name: tokens for name, tokens in used.items() if tokens is not None})
        call.clear()
        if self._unconfirmed:
            self._unconfirmed.after_call(succeeded=output is not None)

    @torch.compiler.disable
    def _before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._unconfirmed.probing:
            return
        call = self.state.call
        call.encoder_alone = call.jobs is None  # as generate calls it
        if call.jobs is None:
            call.jobs = {}
            call.given = call.generation.given if call.generation is not None else {}
            self._begin(encoder)
        self._plan(encoder, {**dict(zip(self._encoder_parameters, args)), **kwargs}, in_encoder=True)

    @torch.compiler.disable
    def _after_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        if self.state.call.encoder_alone:
            self.state.call.clear()

    def _begin(self, model: nn.Module) -> AdaptersInUse:
        """Find the adapters in use, with their R orthonormal. Where a layer or a parameter has changed since the last
        forward, ask each layer once, check weights that were replaced, and retract stale R."""
        state = self.state
        state.checks.settle()
        era = state.era
        state.call.edits = {}
        state.call.in_use = in_use = self._adapters_in_use()
        if in_use is not state.in_use:
            for name, adapter in in_use.first.items():
                # transformers' load_adapter sets new parameters without load_state_dict, whose hook would check them.
                if self._validated.get(name) != id(adapter.R):
                    check_weights(self.layers, name)
                    self._validated[name] = id(adapter.R)
            retract_before_forward(model, self.all_bases())
            # In training, each step changes what the answers depend on. Engines gather parameters for each forward.
            if not (model.training or distributed.is_distributed()):
                in_use.remember(self.layers, era)
                state.in_use = in_use
        return in_use

    def _adapters_in_use(self) -> AdaptersInUse:
        """The adapters in use: `ModelState.in_use` where its answers hold, else what the layers answer now."""
        known, mixed = self.state.in_use, self.state.call.mixed_adapters
        if known is not None and known.hold(mixed, self.state.era):
            return known
        return AdaptersInUse(self.layers, mixed)

    def _plan(self, module: nn.Module, arguments: dict[str, Any], in_encoder: bool) -> None:
        """Make the jobs of the layers of a module for its call.

        For each adapter in use, find the tokens that it edits and, if there are any, stack its weights.

        Args:
            module (`torch.nn.Module`): The base model, or its encoder.
            arguments (`dict`): The arguments of the call, by name, without those that only ReFT reads.
            in_encoder (`bool`): Whether the module is the encoder.
        """
        call = self.state.call
        # A replica of DataParallel runs copies of the layers with weights of their own, on another device than
        # self.layers.
        replica = getattr(module, "_is_replica", False)
        in_use = call.in_use
        assert in_use is not None and call.jobs is not None
        selections: dict[str, Selection | None] = {}
        stacked: dict[str, tuple[Stacked, bool]] = {}
        by_rules: dict[tuple[Rules, bool], Selection | None] = {}
        for name in in_use.by_name[in_encoder]:
            rules = self.rules[name]
            if rules.depend_on_batch:
                if distributed.is_distributed():
                    distributed.refuse_split_sequences()
                key = (rules, True in self._sides[name])  # adapters with the same key edit the same tokens
                if key not in by_rules:
                    by_rules[key] = self._selector.select(rules, self._call(name, module, arguments, in_encoder))
                selection = by_rules[key]
                if selection is not None and call.mixed is not None:
                    rows, device = selection.edited_BS.shape[0], selection.edited_BS.device
                    selection = selection.in_rows(call.mixed.rows(name, rows, device))
                selections[name] = selection
                if selection is None:  # a decode step
                    continue
            if not replica and (weights := self._stack(in_use, name, in_encoder)) is not None:
                stacked[name] = weights
        names = in_use.layer_names[in_encoder]
        selected = next((selection for selection in selections.values() if selection is not None), None)
        if self._unconfirmed and selected is not None and not replica:
            self._unconfirmed.before_edits(module, names, selected.edited_BS.shape, call)
        own = in_use.by_side[in_encoder]
        call.jobs.update(plan(names, own, selections, stacked, call.mixed, on_own_devices=not replica))
        call.recomputed = None

    def _call(self, name: str, module: nn.Module, arguments: dict[str, Any], in_encoder: bool) -> Call:
        """A call of a module, with the arguments that an adapter of that name may read. For the rest see `_plan`."""
        state = self.state.call
        given, prefix = state.given or {}, ""
        if self.has_encoder and not in_encoder:
            prefix = "decoder_"
            # If the adapter edits the encoder, prompt_lengths and intervention_mask are about the encoder's tokens.
            if True in self._sides[name]:
                given = {key: value for key, value in given.items() if key == "subspaces"}
        batch = Batch.from_inputs({**arguments, **given}, prefix)
        name, by_example = type(module).__name__, given.get("subspaces")
        return Call(
            name, arguments, batch, prefix, by_example, module.training, state.generation, in_encoder, state.edits
        )

    def _stack(self, in_use: AdaptersInUse, name: str, in_encoder: bool) -> tuple[Stacked, bool] | None:
        """The stacked weights of an adapter, and whether they are a part of the graph. None: each layer reads its own.

        Trained weights are stacked only where the edits depend on the batch. An edit that does not may run inside a
        function that a user checkpoints with `torch.utils.checkpoint`. Its recompute runs outside any forward, without
        a plan, so each layer reads its own parameters there; a forward with stacked weights would have saved other
        tensors for backward, and torch would raise an error.
        """
        layers = in_use.by_name[in_encoder][name]
        if not can_be_stacked(layers):
            return None
        if torch.is_grad_enabled() and needs_gradient(layers):
            return (Stacked(layers), True) if self.rules[name].depend_on_batch else None
        stacked = in_use.stacked.get((name, in_encoder))
        if stacked is None:
            stacked = in_use.stacked[name, in_encoder] = self.state.weights.of(layers)
        return stacked, False

    def _may_checkpoint_edits(self, model: nn.Module) -> Iterable[nn.Module]:
        """The modules that may checkpoint an edit: all modules of the model. Where only whole blocks are edited, only
        a wrapper that was put around a ReftLayer can, so the members of the lists of blocks are enough."""
        if all(layer.is_block for layer in self.layers):
            return (member for blocks in self._block_lists for member in blocks)
        return model.modules()

    def _remember(self) -> Callable[[], AbstractContextManager]:
        """Keep the plan of the running forward for a recompute.

        Returns:
            `Callable`: Makes a context manager in which layers read this plan, in the forward and in the recompute. In
                it each layer reads its own parameters: stacked weights are a part of the graph outside the
                checkpointed function.
        """
        call = self.state.call
        if call.recomputed is None:
            call.recomputed = with_own_weights(call.jobs or {})
        recomputed = call.recomputed

        @contextmanager
        def with_this_plan() -> Iterator[None]:
            before, call.jobs = call.jobs, recomputed
            try:
                yield
            finally:
                call.jobs = before

        return with_this_plan

    def _refuse_unused_subspaces(self, given: dict[str, Any], active: Iterable[str]) -> None:
        """Raise a ValueError when the caller passes subspaces and no adapter in use has any."""
        if "subspaces" in given and active and not any(self.rules[name].subspaces for name in active):
            raise ValueError(
                f"subspaces={given['subspaces']!r} was passed, but no adapter in use has subspaces. Set them in "
                "ReftConfig, for example ReftConfig(r=8, subspaces={'style': 4, 'facts': 4}), or leave subspaces out."
            )

    # -- generate ----------------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Forwards inside this context belong to a `generate` with these arguments. Yields the keyword arguments to
        pass to the base model's `generate`.

        Args:
            model (`torch.nn.Module`): The base model.
            args (`tuple`): The positional arguments of `generate`.
            kwargs (`dict`): Its keyword arguments.

        Raises:
            ValueError: when an adapter edits tokens of prompts and `generate` has none, or can't be matched to them.
        """
        call, kwargs = self.state.call, dict(kwargs)
        given = {key: value for key in REFT_ARGUMENTS if (value := kwargs.pop(key, None)) is not None}
        active = self._adapters_in_use().first
        depend_on_batch = any(self.rules[name].depend_on_batch for name in active)
        self._refuse_unused_subspaces(given, active)
        if not depend_on_batch and call.mixed is None:
            yield kwargs
            return
        rows = given_input(model, args, kwargs).shape[0]
        if call.mixed is not None:
            call.mixed.refuse_other_size(rows, repeated=False)
        prompts = past = None
        if depend_on_batch:
            past = refuse_unknown_prompts(model, kwargs)
            # The input of an encoder-decoder model's generate goes to its encoder. It is no prompt of the decoder.
            prompts = None if self.has_encoder else given_prompts(model, args, kwargs, given)
        skips = depend_on_batch and not any(self.rules[name].spec.all_tokens for name in active)
        generation = Generation(given, rows, prompts, skips, self.state.unedited)
        if past is not None and prompts is not None and call.mixed is None:
            chosen = {name: self.rules[name] for name in active if not self.rules[name].spec.all_tokens}
            wanted = {name: generation.tokens(rules) for name, rules in chosen.items()}
            make_cache_fit(past, kwargs[past.argument], wanted)
        before, call.generation = call.generation, generation
        try:
            yield kwargs
        finally:
            call.generation = before


class _Generate:
    """The base model's `generate` inside `ForwardContext.generating`. An object rather than a closure, because it is
    copied and pickled with the model."""

    def __init__(self, context: ForwardContext, model: Any) -> None:
        self.context = context
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context.generating(self.model, args, kwargs) as passed:
            return type(self.model).generate(self.model, *args, **passed)
