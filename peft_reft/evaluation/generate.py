"""Greedy answers to prompts, in batches of prompts of about the same length, padded on the left.

This module knows tokens, a model and its tokenizer. An adapter finds the prompt tokens that it edits by itself: it
sees the arguments of `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..tuner.forward.transformers_api import end_ids


def plain_generation(model: Any, tokenizer: Any) -> GenerationConfig:
    """A generation config for greedy decoding, with the end tokens of the model's own config and of the tokenizer.

    It replaces the model's own config, which may sample or penalise repetition: `generate` takes from the model's
    config every setting that it is not passed.
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
    """A prompt as tokens.

    Args:
        index (`int`): Its index in the list of all prompts.
        ids (`list[int]`): Its tokens.
        room (`int`): How many tokens its answer may have.
    """

    index: int
    ids: list[int]
    room: int


def encode_prompts(tokenizer: Any, prompts: Sequence[str], max_new_tokens: int, context: int | None) -> list[Prompt]:
    """Tokenize prompts as trainers do: with the special tokens at the beginning, without an end-of-text token.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer.
        prompts (`Sequence[str]`): The prompts.
        max_new_tokens (`int`): How many tokens an answer may have. A prompt that leaves less of the context gets less.
        context (`int`, *optional*): How many tokens the model can take. None: any number.

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
                f"Prompt {index + 1} has {len(ids)} tokens, of the {context} that the model can take, and leaves no "
                f"room for an answer: {text!r:.80}. Leave that example out, or take a model with a longer context."
            )
        encoded.append(Prompt(index, ids, room))
    return encoded


def in_batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """Batches of prompts, the longest first: a batch that does not fit into memory fails at once, and padding is
    little.

    A batch has one limit for its answers, so prompts with different room are never together: an answer must not depend
    on the other prompts of its batch.
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
        prompts (`Sequence[Prompt]`): The prompts, from `encode_prompts`.
        batch_size (`int`): How many to answer at once.
        done (`Callable[[int], None]`): Called after each batch with its number of answers.
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
            length = next((index for index, token in enumerate(row) if token in ends), len(row))
            answers[prompt.index] = tokenizer.decode(row[:length], skip_special_tokens=True)
        done(len(batch))
    return [answers[prompt.index] for prompt in prompts]
