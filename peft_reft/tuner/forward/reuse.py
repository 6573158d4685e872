"""Caches that were filled by another prompt than the one they are used for, such as a system prompt that is read once.

A forward outside `generate` takes what it reads for a whole prompt and edits its last tokens. Where that was only the
beginning of a prompt, those tokens are none of the prompt's last, and every later token has read them. So a cache is
marked with what was edited when it was filled. When `generate` is given the cache with the whole prompt, the columns
from the first on that should have been edited otherwise are removed from the cache, and `generate` reads them again.

This module knows caches and masks of tokens. What `generate` itself wrote to a cache is left as it is.

Dimensions: B rows of the batch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..positions.batch import SelectedTokens
from .transformers_api import Cache, Past, crop_cache


ATTRIBUTE = "_reft_edited"  # the attribute of a cache that holds its mark; copies of the cache have it, too


def mark_cache(output: Any, edited: Mapping[str, SelectedTokens]) -> None:
    """Note on the cache that a forward outside `generate` returns which of its tokens were edited.

    Args:
        output: The output of the forward.
        edited (`Mapping[str, SelectedTokens]`): Adapter name -> the tokens that it edited, from the first token of the
            cache on or, where the caller named them by an intervention_mask, from the first token of the forward on.

    Raises:
        ValueError: when the forward has read the rest of prompts by their lengths, and their beginning was edited as a
            prompt of its own.
    """
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
    for cache in values:
        if isinstance(cache, Cache):
            before: dict[str, Tensor] = getattr(cache, ATTRIBUTE, {})
            if before and any(tokens.origin == "intervention_mask" for tokens in edited.values()):
                continue  # such a mask counts from the first token of this forward, not of the cache
            marks = {name: _groups(tokens) for name, tokens in edited.items()}
            for name, mark_BS in marks.items() if before else ():
                read = min(mark_BS.shape[1], next(iter(before.values())).shape[1])
                if _agreeing_columns(before.get(name), mark_BS, read) < read:
                    raise ValueError(
                        f"The cache of this forward holds {read} tokens that were read as a prompt of their own, and "
                        "by prompt_lengths they are the beginning of a longer one, of which other tokens are edited. "
                        "Pass prompt_lengths [batch], the length of each whole prompt, with its first part, too."
                    )
            setattr(cache, ATTRIBUTE, marks)


def make_cache_fit(past: Past, cache: Any, wanted: Mapping[str, SelectedTokens]) -> None:
    """Remove from a cache what was read for another prompt than the one that `generate` uses it for.

    Args:
        past (`Past`): The cache among the arguments of `generate`.
        cache: The cache. Nothing is done to one without a mark.
        wanted (`Mapping[str, SelectedTokens]`): Adapter name -> the tokens that it edits in the whole prompts.

    Raises:
        ValueError: when the cache holds such columns, and they can't be removed.
    """
    marks: dict[str, Tensor] | None = getattr(cache, ATTRIBUTE, None)
    if marks is None or not past.length:
        return
    # From now on the cache holds what this generate reads.
    delattr(cache, ATTRIBUTE)
    agreeing = past.length
    for name in {*marks, *wanted}:
        mark_BS, wanted_BS = marks.get(name), _groups(wanted[name]) if name in wanted else None
        agreeing = min(agreeing, _agreeing_columns(mark_BS, wanted_BS, past.length))
    if agreeing < past.length and not crop_cache(cache, past.length - agreeing):
        raise ValueError(
            f"{past.argument} ({type(cache).__name__}) holds {past.length} tokens that were read as a prompt of their "
            f"own, and of the whole prompt of this generate other tokens are edited from token {agreeing} on. They "
            "can't be removed from a cache of this kind. Give generate the whole prompt without a cache, or use a "
            "DynamicCache of a model without sliding windows and recurrent states."
        )


def _groups(tokens: SelectedTokens) -> Tensor:
    """int8, [B, S]: 1 for a first token, 2 for a last token, 0 for a token that is not edited."""
    return tokens.first_BS.to(torch.int8) + 2 * tokens.last_BS.to(torch.int8)


def _agreeing_columns(mark_BS: Tensor | None, wanted_BS: Tensor | None, length: int) -> int:
    """The number of the first columns, of `length` at most, in which two masks agree in every row. None: no token."""
    masks = [
        nn.functional.pad(one, (0, max(0, length - one.shape[1])))[:, :length].cpu()
        for one in (mark_BS, wanted_BS)
        if one is not None
    ]
    if len(masks) == 1:
        masks.append(torch.zeros_like(masks[0]))
    one_BS, other_BS = masks
    if one_BS.shape[0] not in (1, other_BS.shape[0]):  # the rows of the cache are not those of the prompts
        return 0
    differs_S = (one_BS != other_BS).any(dim=0)
    return int(differs_S.int().argmax()) if bool(differs_S.any()) else length
