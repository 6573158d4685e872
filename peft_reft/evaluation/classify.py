"""The classes that a classifier predicts for texts, in batches of texts of about the same length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


@torch.no_grad()
def classify(
    model: Any, tokenizer: Any, texts: Sequence[tuple[str, ...]], batch_size: int, done: Callable[[int], None]
) -> tuple[list[float], int]:
    """The class of each text, or, of a model with one output, the predicted number.

    Args:
        model (`torch.nn.Module`): A model for sequence classification.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a pad token.
        texts (`Sequence[tuple[str, ...]]`): For each example one text, or a pair.
        batch_size (`int`): How many examples at once.
        done (`Callable[[int], None]`): Called after each batch with its number of examples.

    Returns:
        `tuple[list[float], int]`: Class or number for each example, in their order, and how many examples were cut off
            because they have more tokens than the model takes.
    """
    model.eval()
    limit = max_length(model, tokenizer)
    whole = [tokenizer(*text)["input_ids"] for text in texts]
    order = sorted(range(len(texts)), key=lambda index: -len(whole[index]))
    found: dict[int, float] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        pairs = [list(column) for column in zip(*(texts[index] for index in indices))]
        batch = tokenizer(*pairs, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        logits = model(**batch.to(model.device)).logits.float()
        classes = logits[:, 0] if logits.shape[1] == 1 else logits.argmax(dim=1)
        found.update(zip(indices, classes.tolist()))
        done(len(indices))
    return [found[index] for index in range(len(texts))], sum(len(ids) > limit for ids in whole)


def max_length(model: Any, tokenizer: Any) -> int:
    """How many tokens a text may have: the tokenizer's limit or the model's number of positions, whichever is less.

    RoBERTa and its kin count positions from pad_token_id + 1 on, so a text may have that many tokens less.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and model.config.model_type in ("roberta", "xlm-roberta", "camembert", "longformer"):
        positions -= model.config.pad_token_id + 1
    return min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
