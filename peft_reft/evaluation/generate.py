"""Answers to prompts: greedy, in batches of prompts of about the same length, padded on the left.

This module knows tokens, a model and its tokenizer. Which tokens an adapter edits is the adapter's own business: `generate` tells it the
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..tuner.forward.transformers_api import end_ids


def plain_generation(model: Any, tokenizer: Any) -> GenerationConfig:
    """The generation config for greedy decoding: of the model's own only the tokens that end a text are kept.

    A checkpoint's own config may sample, or penalise repetition, and `generate` fills in from it whatever it is not told.
    """
    ends = dict.fromkeys((*end_ids(model.generation_config.eos_token_id), *end_ids(tokenizer.eos_token_id)))
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        eos_token_id=list(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


@dataclass(frozen=True)
class Prompt:
    """A prompt of a batch: its place in the list of prompts, its tokens, and how many tokens its answer may have."""

    index: int
    ids: list[int]
    room: int


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, context: int | None) -> list[Prompt]:
    """The tokens of prompts, as trainers make them: with the special tokens that the tokenizer begins texts with, and no end of text.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer.
        prompts (`Sequence[str]`): The prompts.
        max_new_tokens (`int`): How many tokens an answer may have. Where the model's context has less room, the answer ends there.
        context (`int`, *optional*): How many tokens the model can take.

    Raises:
        ValueError: when a prompt leaves no room for an answer.
    """
    encoded = []
    for index, text in enumerate(prompts):
        ids = tokenizer(text)["input_ids"]
        if ids and ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
        room = max_new_tokens if context is None else min(max_new_tokens, context - len(ids))
        if not ids or room < 1:
            raise ValueError(
                f"Prompt {index + 1} has {len(ids)} tokens, of the {context} that the model can take, and leaves no room for an answer: "
                f"{text!r:.80}. Leave that example out, or take a model with a longer context."
            )
        encoded.append(Prompt(index, ids, room))
    return encoded


def in_batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """The longest first, so that what does not fit into memory is seen at once, and a batch has little padding.

    Prompts whose answers have different room are not in one batch: an answer does not depend on what it is batched with.
    """
    batch: list[Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: (-len(prompt.ids), prompt.index)):
        if batch and (len(batch) == batch_size or batch[0].room != prompt.room):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


@torch.no_grad()
def generate_answers(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int, done: Callable[[int], None]
) -> list[str]:
    """The model's answers, in the order of the prompts.

    Args:
        model (`torch.nn.Module`): A model with a `generate`, whose generation config is that of `plain_generation`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer, with a pad token.
        prompts (`Sequence[Prompt]`): What `encode_prompts` made.
        batch_size (`int`): How many to answer at once.
        done (`Callable[[int], None]`): Called with the number of answers of each batch.
    """
    model.eval()
    ends = set(end_ids(model.generation_config.eos_token_id))
    answers: dict[int, str] = {}
    for batch in in_batches(prompts, batch_size):
        width = max(len(prompt.ids) for prompt in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, width - len(prompt.ids) :] = torch.tensor(prompt.ids)
            mask[row, width - len(prompt.ids) :] = 1
        generated = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), max_new_tokens=batch[0].room
        )
        for prompt, row in zip(batch, generated[:, width:].tolist()):
            length = next((place for place, token in enumerate(row) if token in ends), len(row))
            answers[prompt.index] = tokenizer.decode(row[:length], skip_special_tokens=True)
        done(len(batch))
    return [answers[prompt.index] for prompt in prompts]
