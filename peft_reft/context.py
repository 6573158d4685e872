"""The bridge between a call of the model and its edited layers: one Selection per forward.

This module knows how a batch reaches a transformers model: the arguments of `forward`, the cache, and `generate`. It
reads them, takes out what only ReFT reads (`prompt_lengths`, `intervention_mask`), has positions.py find the tokens to
edit, and keeps the result where the layers look it up for as long as the call lasts.

A forward alone cannot tell the prompt while generating: with `use_cache=False` every step is a full pass, and a chunked
prefill is several. So `generate` is wrapped, and the prompt is what it was given: its tokens are numbered once, and
every forward in it edits those of them that it is given.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import TaskType
from torch import Tensor, nn

from .checkpointing import bind_checkpoints, unbind_checkpoints
from .config import ReftConfig
from .layer import ReftLayer, retract_stale
from .positions import (
    Prompts,
    Selection,
    find_prompts,
    first_and_last,
    masks_from_intervention_mask,
    select,
)


TOLD = ("prompt_lengths", "intervention_mask")


@dataclass(frozen=True)
class Generation:
    """What a running `generate` was given.

    Args:
        shape (`tuple[int, int]`): (B, P), rows and padded width of the prompts.
        prompts (`Prompts`, *optional*): The prompts, None when `intervention_mask` tells the tokens.
        intervention_mask (`torch.Tensor`, *optional*): [B, P].
    """

    shape: tuple[int, int]
    prompts: Prompts | None
    intervention_mask: Tensor | None


class _CallState(threading.local):
    """What belongs to the call that a thread is in. Threads may run one model, as `torch.nn.DataParallel` does."""

    generation: Generation | None = None
    selections: dict[str, Selection | None] | None = None


class ForwardContext:
    """Builds the Selection of every forward of one model, for all its ReftLayers.

    Args:
        model (`torch.nn.Module`): The base model, whose calls are watched from `attach` to `detach`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.layers: list[ReftLayer] = []
        self.parameters = tuple(inspect.signature(model.forward).parameters)
        # Where the task is not given: labels of a transformers model that can't generate are no answers.
        self.labels_are_answers = bool(getattr(model, "can_generate", lambda: True)())
        self._state = _CallState()
        self._handles: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_state"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _state=_CallState())

    @classmethod
    def of(cls, model: nn.Module) -> ForwardContext:
        """The context of a model that has ReftLayers already, else a new one."""
        for module in model.modules():
            if isinstance(module, ReftLayer) and isinstance(module.context, cls):
                return module.context
        return cls(model)

    def attach(self, model: nn.Module) -> None:
        """Watch the calls of the model. Does nothing when it is watched already."""
        if not self._handles:
            self._handles = [
                model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
                model.register_forward_hook(self._after_forward, always_call=True),
            ]
            if hasattr(model, "generate"):
                model.generate = _Generate(self, model)  # type: ignore[assignment]

    def detach(self, model: nn.Module) -> None:
        """Leave the model as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        unbind_checkpoints(model.modules())
        model.__dict__.pop("generate", None)

    def selection(self, adapter_name: str, layer_name: str) -> Selection | None:
        """The Selection of the running forward for an adapter, None where it has nothing to edit.

        Raises:
            RuntimeError: when no forward of the model is running, so that the tokens to edit are unknown.
        """
        selections = self._state.selections
        if selections is None or adapter_name not in selections:
            raise RuntimeError(
                f"{layer_name!r} ran without a Selection: it was called outside a forward of the whole model, so ReFT can't "
                "know which tokens to edit. Call the PeftModel (or its base model), not a part of it. If the call came "
                "from the backward pass of activation checkpointing, leave target_modules out: whole blocks are edited "
                "outside the part that is recomputed."
            )
        return selections[adapter_name]

    # -- forward -----------------------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        batch = {**dict(zip(self.parameters, args)), **kwargs}
        kwargs = {key: value for key, value in kwargs.items() if key not in TOLD}
        self._state.selections = {}
        retract_stale(self.layers)
        if model.training and not all(layer.is_block for layer in self.layers):
            bind_checkpoints(model.modules(), self._remember)
        by_kind: dict[tuple, Selection | None] = {}
        for name, config in self._positioned().items():
            kind = (config.spec, config.groups, config.task_type)
            if kind not in by_kind:
                by_kind[kind] = self._select(model, config, batch)
            self._state.selections[name] = by_kind[kind]
        return args, kwargs

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

    def _positioned(self) -> dict[str, ReftConfig]:
        """The adapters in use that edit chosen positions, rather than all."""
        layer = next((layer for layer in self.layers if not layer.disable_adapters), None)
        if layer is None:
            return {}
        configs = {name: config for other in self.layers for name, config in other.reft_config.items()}
        return {
            name: configs[name]
            for name in layer.active_adapters
            if name in configs and not configs[name].spec.all_tokens
        }

    def _after_forward(self, model: nn.Module, args: tuple, output: Any) -> None:
        self._state.selections = None

    def _select(self, model: nn.Module, config: ReftConfig, batch: dict[str, Any]) -> Selection | None:
        """The Selection of a forward with these arguments."""
        shape, device = _token_shape(config, batch)
        past = _cache_length(batch)
        if self._state.generation is not None:
            return _select_in_generation(self._state.generation, config, shape, past, device, batch)
        told = {key: batch[key] for key in TOLD if batch.get(key) is not None}
        if past > 0 and not told:
            if shape[1] == 1:
                return None  # a decode step
            raise ValueError(
                f"A forward of {shape[1]} tokens continues a cache of {past}, outside `generate`. Whether they belong to "
                f"the prompt can't be known. Pass prompt_lengths [{shape[0]}], the length of each whole prompt."
            )
        width = past + shape[1]
        if "intervention_mask" in told:
            first_BS, last_BS = masks_from_intervention_mask(told["intervention_mask"], shape, config.groups, device)
            if model.training:
                _refuse_empty(first_BS | last_BS, config, "intervention_mask")
            return select(first_BS, last_BS, config.groups, None)
        labels = self._labels(config, batch)
        if labels is None and not told and model.training and self._reads_labels(config):
            raise ValueError(
                "A training batch without labels does not say where its prompts end, and ReFT edits tokens of the prompt. "
                "Pass labels (-100 at the prompt), or prompt_lengths [batch], or set positions='all'."
            )
        prompts = find_prompts(
            (shape[0], width),
            device,
            attention_mask=_mask_of_width(batch.get("attention_mask"), (shape[0], width)),
            position_ids=batch.get("position_ids") if past == 0 else None,
            cu_seq_lens=batch.get("cu_seq_lens_q"),
            labels=labels,
            prompt_lengths=told.get("prompt_lengths"),
        )
        first_BS, last_BS = first_and_last(prompts, config.spec)
        if labels is not None or told:
            _refuse_empty(prompts.prompt_BS, config, "prompt_lengths" if told else "labels")
        places = None if prompts.sequences is None else _places(config, shape[0])
        return select(first_BS[:, past:], last_BS[:, past:], config.groups, places)

    def _reads_labels(self, config: ReftConfig) -> bool:
        if config.task_type is not None:
            return config.task_type == TaskType.CAUSAL_LM
        return self.labels_are_answers

    def _labels(self, config: ReftConfig, batch: dict[str, Any]) -> Tensor | None:
        return batch.get("labels") if self._reads_labels(config) else None

    # -- generate ----------------------------------------------------------------------------------------------------

    @contextmanager
    def generating(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Note the prompt that a `generate` is given, and yield the arguments to pass on."""
        kwargs = dict(kwargs)
        told = {key: kwargs.pop(key, None) for key in TOLD}
        if not self._positioned():
            yield kwargs
            return
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        embeds = kwargs.get("inputs_embeds")
        tokens = embeds if embeds is not None else inputs
        if tokens is None:
            raise ValueError("generate was given no prompt, but ReFT edits tokens of the prompt. Pass input_ids.")
        shape = (tokens.shape[0], tokens.shape[1])
        if kwargs.get("attention_mask") is None and embeds is None:
            # Decide here what is padding, as generate itself would, so that both go by the same mask.
            kwargs["attention_mask"] = _infer_mask(model, inputs, kwargs)
        prompts = None
        if told["intervention_mask"] is None:
            prompts = find_prompts(
                shape,
                tokens.device,
                attention_mask=_mask_of_width(kwargs.get("attention_mask"), shape),
                prompt_lengths=told["prompt_lengths"],
            )
        before = self._state.generation
        self._state.generation = Generation(shape, prompts, told["intervention_mask"])
        try:
            yield kwargs
        finally:
            self._state.generation = before


class _Generate:
    """The base model's `generate`, with its prompt noted. An object rather than a closure, to be copied and pickled."""

    def __init__(self, context: ForwardContext, model: Any) -> None:
        self.context = context
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.context.generating(self.model, args, kwargs) as passed:
            return type(self.model).generate(self.model, *args, **passed)


def _select_in_generation(
    generation: Generation,
    config: ReftConfig,
    shape: tuple[int, int],
    past: int,
    device: torch.device,
    batch: dict[str, Any],
) -> Selection | None:
    """The tokens of the prompt that a forward inside `generate` is given: those in columns past to past + S."""
    rows, width = generation.shape
    if batch.get("cache_params") is not None:
        raise ValueError(
            f"positions={config.positions!r}: this model generates with a recurrent state (cache_params), which does not say "
            "how far the prompt has been read. Set positions='all', or generate with use_cache=False."
        )
    if past >= width:
        return None  # a decode step
    if shape[0] % rows != 0:
        raise ValueError(
            f"generate was given {rows} prompts, but runs {shape[0]} rows at once: ReFT can't tell whose."
        )
    if generation.intervention_mask is not None:
        masks = masks_from_intervention_mask(generation.intervention_mask, generation.shape, config.groups, device)
    else:
        assert generation.prompts is not None
        masks = first_and_last(generation.prompts, config.spec)
    # Beams and returned sequences repeat each row; columns after the prompt hold what has been generated.
    here = [mask[:, past : past + shape[1]].repeat_interleave(shape[0] // rows, dim=0).to(device) for mask in masks]
    first_BS, last_BS = (nn.functional.pad(mask, (0, shape[1] - mask.shape[1])) for mask in here)
    return select(first_BS, last_BS, config.groups, _places(config, shape[0]) if generation.prompts else None)


def _places(config: ReftConfig, rows: int) -> int:
    """N: at most this many tokens of a group are selected in rows of one sequence each."""
    spec = config.spec
    return rows * (max(spec.first, spec.last) if config.groups == 2 else spec.first + spec.last)


def _token_shape(config: ReftConfig, batch: dict[str, Any]) -> tuple[tuple[int, int], torch.device]:
    """(B, S) of a batch, and its device."""
    for key in ("input_ids", "inputs_embeds"):
        tokens = batch.get(key)
        if tokens is not None and tokens.dim() >= 2:
            return (tokens.shape[0], tokens.shape[1]), tokens.device
    raise ValueError(
        f"positions={config.positions!r} counts tokens, but the model was called without input_ids [batch, tokens] or "
        "inputs_embeds. Pass one of them, or set positions='all', which works on any model."
    )


def _cache_length(batch: dict[str, Any]) -> int:
    """How many tokens the cache holds already."""
    cache = batch.get("past_key_values")
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        return int(cache.get_seq_length())
    return cache[0][0].shape[-2]


def _mask_of_width(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """The part of an attention mask that is about (B, width) tokens. A static cache brings a wider one."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise ValueError(
            f"attention_mask is {'of shape ' + str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__}, "
            "from which ReFT can't tell padding. Pass one of shape [batch, tokens] with 0 for padding, or say which tokens "
            "to edit with intervention_mask."
        )
    return mask[:, : shape[1]]


def _infer_mask(model: nn.Module, input_ids: Any, kwargs: dict[str, Any]) -> Tensor:
    """The attention mask of prompts that come without one: padding is the pad token, unless it also ends texts."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    pad, eos = (kwargs.get(key, getattr(config, key, None)) for key in ("pad_token_id", "eos_token_id"))
    ends = [eos] if isinstance(eos, int) else list(eos or ())
    if pad is None or pad in ends:
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


EMPTY = {
    "labels": "no label of -100 stands before an answer (is train_on_inputs set, or is this plain text?)",
    "prompt_lengths": "prompt_lengths is 0 for every row",
    "intervention_mask": "intervention_mask is 0 everywhere",
}


def _refuse_empty(mask_BS: Tensor, config: ReftConfig, source: str) -> None:
    """A batch that is to be edited and has nothing to edit."""
    if not torch.compiler.is_compiling() and not bool(mask_BS.any()):
        raise ValueError(
            f"positions={config.positions!r}: the batch has no prompt tokens to edit: {EMPTY[source]}. Mask the prompt with -100 in "
            "labels, or pass prompt_lengths [batch], or set positions='all'."
        )
