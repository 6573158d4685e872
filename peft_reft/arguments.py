"""What the arguments of a call say: those of a transformers model's `forward` and `generate`, by their names.

This module reads arguments into a Batch, and refuses those from which the tokens to edit can't be known.

Dimensions: B rows of the batch, S tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .batch import Batch, Rules, end_ids
from .generation import Generation
from .prompts import IGNORED_LABEL


def forward_batch(rules: Rules, arguments: dict[str, Any], told: dict[str, Any], prefix: str) -> Batch:
    """The tokens in the arguments of a forward: those of a decoder, with its prefix, or of any other model."""
    if arguments.get("cache") is not None and arguments.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"{rules}: continuous batching (generate_batch) mixes prompts and decode steps in one row, and does not say which "
            "token is which. Use generate, or set positions='all'."
        )
    labels = arguments.get("labels") if rules.reads_labels else None
    if labels is not None and prefix:
        # A decoder's input at a place predicts the label of that place: its prompt goes up to the first answer's input.
        labels = nn.functional.pad(labels, (1, -1), value=IGNORED_LABEL)
    input_ids, embeds = arguments.get(f"{prefix}input_ids"), arguments.get(f"{prefix}inputs_embeds")
    tokens = next((t for t in (input_ids, embeds, labels) if t is not None and t.dim() >= 2), None)
    if tokens is None:
        raise ValueError(
            f"{rules} counts tokens, but the model was called without {prefix}input_ids [batch, tokens] or "
            f"{prefix}inputs_embeds. Pass one of them, or set positions='all', which works on any model."
        )
    return Batch(
        (tokens.shape[0], tokens.shape[1]),
        tokens.device,
        input_ids=input_ids,
        attention_mask=arguments.get(f"{prefix}attention_mask"),
        position_ids=arguments.get("position_ids"),
        cu_seq_lens=arguments.get("cu_seq_lens_q"),
        labels=labels,
        prompt_lengths=told.get("prompt_lengths"),
        intervention_mask=told.get("intervention_mask"),
    )


def cache_length(rules: Rules, arguments: dict[str, Any], generation: Generation | None) -> int:
    """How many tokens the cache holds already."""
    cache = arguments.get("past_key_values")
    if arguments.get("cache_params") is None:
        if cache is None:
            return 0
        return int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else cache[0][0].shape[-2]
    if generation is None:
        raise ValueError(
            f"{rules}: this model keeps a recurrent state (cache_params), which does not say how far the prompt has been read. "
            "Use generate, which says it, or set positions='all'."
        )
    return generation.fed


def refuse_several(batch: Batch, past: int) -> None:
    """Outside `generate`, one token after a filled cache is a decode step. Several may be a part of a prompt."""
    if batch.shape[1] > 1:
        raise ValueError(
            f"A forward of {batch.shape[1]} tokens continues a cache of {past}, outside `generate`. Whether they belong to "
            f"the prompt can't be known. Pass prompt_lengths [{batch.shape[0]}], the length of each whole prompt."
        )


def refuse_unknown_prompts(model: Any, kwargs: dict[str, Any]) -> None:
    """Ways to generate that feed the model tokens whose place in the prompt can't be told."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    if kwargs.get("guidance_scale", getattr(config, "guidance_scale", None)) not in (None, 1, 1.0):
        raise ValueError(
            "guidance_scale runs the model on a second prompt within generate, and ReFT can't tell it from the first. Leave "
            "guidance_scale out, or set positions='all'."
        )
    if kwargs.get("cache_params") is not None:
        raise ValueError(
            "cache_params is a recurrent state of an earlier turn, which does not say how many tokens it has read. Give generate "
            "the whole conversation without it, or set positions='all'."
        )


def main_input(model: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a `generate` with these arguments is given: token ids or embeddings, or an encoder's input of another kind.

    Raises:
        ValueError: when it is given nothing.
    """
    names = ("inputs_embeds", "inputs", "input_ids", getattr(model, "main_input_name", "input_ids"))
    given = [kwargs[name] for name in names if kwargs.get(name) is not None] + list(args[:1])
    if not given:
        raise ValueError("generate was given no prompt, but ReFT edits tokens of the prompt. Pass input_ids.")
    return given[0]


def given_prompts(model: Any, args: tuple, kwargs: dict[str, Any], told: dict[str, Any]) -> Batch:
    """The prompts that a `generate` with these arguments is given.

    Fills in an attention mask where there is none, as `generate` itself would, so that both go by the same one.
    """
    tokens = main_input(model, args, kwargs)
    input_ids = tokens if tokens.dim() == 2 else kwargs.get("input_ids")
    shape = (tokens.shape[0], tokens.shape[1])
    if input_ids is not None and input_ids.shape != shape:
        input_ids = None  # embeddings alone
    elif input_ids is tokens and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = _infer_mask(model, input_ids, kwargs)
    return Batch(
        shape,
        tokens.device,
        input_ids=input_ids,
        attention_mask=kwargs.get("attention_mask"),
        prompt_lengths=told.get("prompt_lengths"),
        intervention_mask=told.get("intervention_mask"),
    )


def _infer_mask(model: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The attention mask of prompts that come without one: padding is the pad token, unless it also ends texts."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    pad, eos = (kwargs.get(key, getattr(config, key, None)) for key in ("pad_token_id", "eos_token_id"))
    if pad is None or pad in end_ids(eos):
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()
