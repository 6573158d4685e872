"""The bridge between a call of the model and its edited layers: one Selection per forward.

This module knows how a call reaches a transformers model: the arguments of `forward`, the cache, and `generate`. It takes
out what only ReFT reads (`prompt_lengths`, `intervention_mask`, `subspaces`), has batch.py and generation.py find the tokens
to edit, and keeps the result where the layers look it up for as long as the call lasts.

An encoder-decoder model has two streams of tokens. Its encoder's are found when the encoder is called, which `generate` does
outside any forward of the model; its decoder's when the model is.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import sharding
from .arguments import (
    cache_length,
    forward_batch,
    given_prompts,
    main_input,
    refuse_several,
    refuse_unknown_prompts,
)
from .bases import retract_before_forward, watch_steps
from .batch import Batch, Rules, locate
from .checkpointing import bind_checkpoints, unbind_checkpoints
from .config import ReftConfig
from .generation import Generation
from .layer import ReftLayer
from .loading import check_state_dict, check_weights
from .mixed import MixedBatch
from .positions import Selection, places, round_up, select
from .subspaces import kept_directions
from .targets import encoder_of


TOLD = ("prompt_lengths", "intervention_mask", "subspaces")
UNTOLD_EVALUATION = (
    "A batch without labels is evaluated after training on batches with them: all its tokens are taken for prompt, and the last "
    "of them are edited. If it holds answers, that is not what training edited. Set response_template in ReftConfig, or pass "
    "prompt_lengths, for both to agree."
)


class _CallState(threading.local):
    """What belongs to the call that a thread is in. Threads may run one model, as `torch.nn.DataParallel` does."""

    mixed: MixedBatch | None = None
    generation: Generation | None = None
    told: dict[str, Any] | None = None
    # By adapter, and whether in the encoder of an encoder-decoder model.
    selections: dict[tuple[str, bool], Selection | None] | None = None
    encoder_alone: bool = False


class ForwardContext:
    """Builds the Selection of every forward of one model, for all its ReftLayers.

    Args:
        model (`torch.nn.Module`): The base model, whose calls are watched from the first adapter to `detach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[ReftLayer] = []
        self.rules: dict[str, Rules] = {}
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        self.encoder_parameters: tuple[str, ...] = ()
        self._configs: dict[str, ReftConfig] = {}
        self._sides: dict[str, set[bool]] = {}  # whether an adapter edits the encoder, the rest, or both
        self._stacks: list[nn.ModuleList] = []  # the lists that edited blocks stand in
        self._saw_labels = False
        self._checked: dict[str, int] = {}  # the basis that an adapter had when its weights were last known to be good
        self._state = _CallState()
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_state"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _state=_CallState())
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
        self._handles.append(model.register_load_state_dict_pre_hook(self._before_loading))
        encoder = encoder_of(model)
        if encoder is not None:
            self.encoder_parameters = tuple(inspect.signature(encoder.forward).parameters)
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
        model.__dict__.pop("generate", None)

    def selection(self, adapter_name: str, layer: ReftLayer) -> Selection | None:
        """The Selection of the running forward for an adapter, None where it has nothing to edit.

        Raises:
            RuntimeError: when no forward of the model is running, so that the tokens to edit are unknown.
        """
        selections = self._state.selections
        if selections is None or (adapter_name, layer.in_encoder) not in selections:
            raise RuntimeError(
                f"{layer.name!r} ran without a Selection: it was called outside a forward of the whole model, so ReFT can't "
                "know which tokens to edit. Call the PeftModel (or its base model), not a part of it. If the call came "
                "from the backward pass of activation checkpointing, leave target_modules out: whole blocks are edited "
                "outside the part that is recomputed."
            )
        return selections[adapter_name, layer.in_encoder]

    # -- mixed batches -----------------------------------------------------------------------------------------------

    @property
    def mixed(self) -> MixedBatch | None:
        """The adapters of the examples, where each has its own."""
        return self._state.mixed

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
        before, self._state.mixed = self._state.mixed, mixed
        try:
            yield mixed
        finally:
            self._state.mixed = before

    # -- loading -----------------------------------------------------------------------------------------------------

    def _before_loading(self, model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        check_state_dict(model, self.layers, self.rules, state_dict, prefix)

    def _check_replaced(self) -> None:
        """Check weights that came with no state dict: transformers' load_adapter puts new parameters in place of a layer's. Of
        each adapter one is looked at, in every forward."""
        for name in self._active():
            layer = next(layer for layer in self.layers if name in layer.reft_R)
            if self._checked.get(name) != id(layer.reft_R[name]):
                check_weights(self.layers, name)
                self._checked[name] = id(layer.reft_R[name])

    # -- forward -----------------------------------------------------------------------------------------------------
    # torch.compile leaves what is decorated out of its graphs: it reads the cache, the batch and the state of the weights,
    # and its result, index tensors of few different shapes, is an input to the compiled layers.

    @torch.compiler.disable
    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        arguments = {**dict(zip(self.parameters, args)), **kwargs}
        told = {key: arguments[key] for key in TOLD if arguments.get(key) is not None}
        generation = self._state.generation
        self._state.told = told or (generation.told if generation is not None else {})
        self._state.selections = {}
        self._settle_weights(model)
        if model.training:
            bind_checkpoints(self._around_edits(model), self._remember)
        self._refuse_stray_subspaces(told)
        if self.mixed is not None:
            first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.mixed.refuse_other_size(first.shape[0], repeated=generation is not None)
        self._select_all(arguments, model.training, in_encoder=False)
        if generation is not None:
            generation.advance()
        return args, {key: value for key, value in kwargs.items() if key not in TOLD}

    def _settle_weights(self, model: nn.Module) -> None:
        """See that the weights are where and as the layers read them."""
        for layer in self.layers:
            layer.keep_weights()
        self._check_replaced()
        retract_before_forward(model, self.layers)

    @torch.compiler.disable
    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._state.selections = None
        self._state.told = None

    @torch.compiler.disable
    def _before_encoder(self, encoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._state.encoder_alone = self._state.selections is None  # as generate calls it
        if self._state.selections is None:
            self._state.selections = {}
            generation = self._state.generation
            self._state.told = generation.told if generation is not None else {}
            self._settle_weights(encoder)
        self._select_all({**dict(zip(self.encoder_parameters, args)), **kwargs}, encoder.training, in_encoder=True)

    @torch.compiler.disable
    def _after_encoder(self, encoder: nn.Module, args: tuple, output: Any) -> None:
        if self._state.encoder_alone:
            self._state.selections = None
            self._state.told = None

    def _select_all(self, arguments: dict[str, Any], training: bool, in_encoder: bool) -> None:
        """Note the Selection of every adapter in use that needs one."""
        selections = self._state.selections
        assert selections is not None
        in_use = self._in_use(in_encoder)
        if in_use and sharding.is_distributed():
            sharding.refuse_split_sequences()
        by_rules: dict[tuple[Rules, Any], Selection | None] = {}
        for name, config in in_use.items():
            groups = None if config.subspaces is None else tuple(config.subspaces.items())
            kind = (self.rules[name], groups)
            if kind not in by_rules:
                by_rules[kind] = self._select(name, config, arguments, training, in_encoder)
            selection = by_rules[kind]
            if self.mixed is not None and selection is not None:
                rows, device = selection.edited_BS.shape[0], selection.edited_BS.device
                selection = selection.of_rows(self.mixed.rows(name, rows, device))
            selections[name, in_encoder] = selection

    def _active(self) -> dict[str, ReftConfig]:
        """The adapters that are switched on, or that the examples of a mixed batch use, by name."""
        enabled = [layer for layer in self.layers if not layer.disable_adapters]
        if not enabled:
            return {}
        active = (name for layer in enabled for name in layer.active_adapters)  # single layers may have others
        names = dict.fromkeys(active) if self.mixed is None else self.mixed.adapters
        return {name: self._configs[name] for name in names if name in self._configs}

    def _in_use(self, in_encoder: bool) -> dict[str, ReftConfig]:
        """Those of them whose edit depends on the token."""
        return {
            name: config
            for name, config in self._active().items()
            if in_encoder in self._sides[name]
            and (not self.rules[name].spec.all_tokens or config.subspaces is not None)
        }

    def _select(
        self, name: str, config: ReftConfig, arguments: dict[str, Any], training: bool, in_encoder: bool
    ) -> Selection | None:
        """The Selection of an adapter in a call with these arguments."""
        rules, generation = self.rules[name], self._state.generation
        told = self._state.told or {}
        if in_encoder:
            rules = replace(rules, reads_labels=False)
        elif not rules.spec.all_tokens and generation is not None and generation.decodes(arguments):
            return None
        if self.encoder_parameters and not in_encoder and True in self._sides[name]:
            told = {}  # what is told of an encoder-decoder model's prompts is about its encoder's tokens, if it edits any
        batch = forward_batch(rules, arguments, told, "decoder_" if self.encoder_parameters and not in_encoder else "")
        training = training and generation is None
        selection: Selection | None
        if rules.spec.all_tokens:
            everything_BS = torch.ones(batch.shape, dtype=torch.bool, device=batch.device)
            selection = Selection(everything_BS, None, None)
        elif in_encoder:
            selection = self._select_in_batch(rules, batch, training)
        else:
            past = cache_length(rules, arguments, generation)
            if generation is not None:
                selection = generation.select(rules, batch, past)
            elif past > 0 and batch.told is None:
                refuse_several(batch, past)
                selection = None  # a decode step
            else:
                selection = self._select_in_batch(rules, batch, training, past)
        if selection is None or config.subspaces is None:
            return selection
        given = (self._state.told or {}).get("subspaces")
        return replace(selection, kept_TR=_kept(config.subspaces, given, batch, generation, training))

    def _select_in_batch(self, rules: Rules, batch: Batch, training: bool, past: int = 0) -> Selection:
        """The tokens of a batch, or, where it continues a cache of `past` tokens and its prompts are told, of the rest."""
        if past > 0 and batch.intervention_mask is None:
            whole = (batch.shape[0], past + batch.shape[1])
            located = locate(
                rules,
                Batch(
                    whole,
                    batch.device,
                    attention_mask=batch.attention_mask,
                    prompt_lengths=batch.prompt_lengths,
                ),
                training,
            )
        else:
            past, located = 0, locate(rules, batch, training)
        if located.source == "labels":
            self._saw_labels |= training
        elif located.source == "all tokens" and rules.reads_labels and self._saw_labels:
            self._saw_labels = False  # say it once
            warnings.warn(UNTOLD_EVALUATION)
        limit = None
        if located.runs is not None:
            packed = located.runs != batch.shape[0]
            limit = places(rules.spec, rules.groups, round_up(located.runs) if packed else located.runs)
        return select(located.first_BS[:, past:], located.last_BS[:, past:], rules.groups, limit)

    def _remember(self) -> Callable[[], AbstractContextManager]:
        """For a recompute in backward: a context in which this forward's selections hold."""
        selections = self._state.selections

        @contextmanager
        def as_in_this_forward() -> Iterator[None]:
            before, self._state.selections = self._state.selections, selections
            try:
                yield
            finally:
                self._state.selections = before

        return as_in_this_forward

    # -- generate ----------------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Note the prompt that a `generate` is given, and yield the arguments to pass on."""
        kwargs = dict(kwargs)
        told = {key: value for key in TOLD if (value := kwargs.pop(key, None)) is not None}
        in_use = {**self._in_use(in_encoder=False), **self._in_use(in_encoder=True)}
        self._refuse_stray_subspaces(told)
        if not in_use and self.mixed is None:
            yield kwargs
            return
        rows = main_input(model, args, kwargs).shape[0]
        if self.mixed is not None:
            self.mixed.refuse_other_size(rows, repeated=False)
        prompts = None
        if in_use:
            refuse_unknown_prompts(model, kwargs)
            # What an encoder-decoder model is given goes to its encoder, and is no prompt of its decoder.
            prompts = None if self.encoder_parameters else given_prompts(model, args, kwargs, told)
        before = self._state.generation
        self._state.generation = Generation(told, rows, prompts)
        try:
            yield kwargs
        finally:
            self._state.generation = before

    def _refuse_stray_subspaces(self, told: dict[str, Any]) -> None:
        active = self._active().values()
        if "subspaces" in told and active and not any(config.subspaces for config in active):
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


def _kept(
    groups: dict[str, int], given: Any, batch: Batch, generation: Generation | None, training: bool
) -> Tensor | None:
    """The directions that each token's example uses, [T, R]. None: all of them, where nothing is said."""
    if given is None:
        if training:
            raise ValueError(
                f"The adapter has subspaces ({', '.join(groups)}), and the training batch does not say which its examples use. "
                "Pass subspaces [batch] with it: numbers of groups, or names."
            )
        return None
    if generation is None:
        kept_QR = kept_directions(given, groups, batch.sequences.count, batch.device)
        return batch.sequences.spread(kept_QR).flatten(0, 1)
    kept_QR = kept_directions(given, groups, generation.rows, batch.device)
    return kept_QR.repeat_interleave(batch.shape[0] // generation.rows * batch.shape[1], dim=0)
