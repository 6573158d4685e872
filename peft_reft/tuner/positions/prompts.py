"""Where the sequences and the prompts of a batch lie.

This module knows tensors of tokens (masks, labels, position ids) and nothing of models, caches or adapters. The rules
are those of docs/positions.md. Everything is computed with cumulative sums over fixed shapes: no loop over tokens or
samples. The one thing that is read back from the device is how many sequences a batch holds that may be packed.

A run is a stretch of prompt tokens that ends where an answer begins. A sequence has one, or, with
`prompt_boundary="every"`, one for each turn.

Dimensions: B rows of the batch, S tokens of a row, Q sequences of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


IGNORED_LABEL = -100


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch: one in a row, or several in a packed one.

    Args:
        real_BS (`torch.BoolTensor`): The tokens that are not padding.
        first_BS (`torch.BoolTensor`, *optional*): The first token of each row, and the first real token of each sequence. None: each
            row is one sequence.
        count (`int`): Q, how many there are. B, for rows of at most one.
    """

    real_BS: Tensor
    first_BS: Tensor | None
    count: int

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one."""
        return self.first_BS is not None

    @cached_property
    def start_BS(self) -> Tensor:
        """The first token of each row, and the first real token of each sequence."""
        if self.first_BS is not None:
            return self.first_BS
        start_BS = self.real_BS & (self.real_BS.cumsum(dim=1) == 1)
        start_BS[:, 0] = True
        return start_BS

    @property
    def bounds_BS(self) -> Tensor | None:
        """Where counting begins anew, for `count_within` and its kin. None: with each row."""
        return self.first_BS

    def spread(self, value_Q: Tensor) -> Tensor:
        """Give every token the value of its sequence: [Q, ...] becomes [B, S, ...]."""
        rows, width = self.real_BS.shape
        if not self.packed:
            return value_Q[:, None].expand(rows, width, *value_Q.shape[1:])
        opened_T = (self.start_BS & self.real_BS).flatten().cumsum(dim=0)
        return value_Q[(opened_T - 1).clamp(min=0)].unflatten(0, (rows, width))


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, as runs of tokens.

    Args:
        prompt_BS (`torch.BoolTensor`): The tokens that belong to a prompt. Never padding.
        start_BS (`torch.BoolTensor`, *optional*): Where a run may begin: a token with it begins one, and no run crosses it. None:
            with each row.
        later_BS (`torch.BoolTensor`, *optional*): The tokens after a sequence's first run. A run there has last tokens
            and no first ones. None: every sequence has one run.
        runs (`int`, *optional*): How many runs there are at most, where that is known.
    """

    prompt_BS: Tensor
    start_BS: Tensor | None
    later_BS: Tensor | None
    runs: int | None


def find_sequences(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
) -> Sequences:
    """Split the rows of a batch into sequences.

    Args:
        shape (`tuple[int, int]`): (B, S).
        device (`torch.device`): Where to compute.
        attention_mask (`torch.Tensor`, *optional*): [B, S], 0 for padding. Packed rows may number their sequences
            1, 2, 3 ... in it.
        position_ids (`torch.Tensor`, *optional*): [B, S] or [1, S], restarting in packed rows. Of several rows of
            positions [4, B, S], as vision-language models have them, the first counts the text; [3, B, S] has no such
            row, and is not read.
        cu_seq_lens (`torch.Tensor`, *optional*): [Q + 1], cumulative lengths over the flattened batch.

    Raises:
        ValueError: when a tensor has another shape than the batch.
    """
    if position_ids is not None and position_ids.dim() == 3 and position_ids.shape[0] == 4:
        position_ids = position_ids[0]
    counted = position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == shape[1]
    number_BS = None
    if attention_mask is not None:
        number_BS = as_batch("attention_mask", attention_mask, shape, device)
        if number_BS.dtype == torch.bool or (not counted and cu_seq_lens is None and int(number_BS.amax()) <= 1):
            real_BS, number_BS = number_BS != 0, None
        else:
            real_BS = number_BS != 0
    else:
        real_BS = torch.ones(shape, dtype=torch.bool, device=device)
    if number_BS is None and not counted and cu_seq_lens is None:
        return Sequences(real_BS, None, count=shape[0])

    start_BS = Sequences(real_BS, None, count=shape[0]).start_BS
    if number_BS is not None:
        # A number larger than all before it opens a sequence.
        before_BS = number_BS.cummax(dim=1).values.roll(1, dims=1)
        before_BS[:, 0] = 0
        start_BS |= number_BS > before_BS
    if position_ids is not None and counted:
        position_BS = as_batch("position_ids", position_ids.expand(shape), shape, device)
        start_BS[:, 1:] |= real_BS[:, 1:] & (position_BS[:, 1:] <= position_BS[:, :-1])
    if cu_seq_lens is not None:
        ends = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=device)
        start_BS |= ends.index_fill_(0, cu_seq_lens.to(device).long(), True)[:-1].view(shape)
    opened_B = (start_BS & real_BS).sum(dim=1)
    most, total = torch.stack([opened_B.max(), opened_B.sum()]).tolist()
    return Sequences(real_BS, start_BS, total) if most > 1 else Sequences(real_BS, None, shape[0])


def whole(sequences: Sequences) -> Prompts:
    """Every real token is prompt."""
    return Prompts(sequences.real_BS, sequences.bounds_BS, None, sequences.count)


def by_lengths(sequences: Sequences, prompt_lengths: Tensor) -> Prompts:
    """The first `prompt_lengths` [Q] real tokens of each sequence are its prompt.

    Raises:
        ValueError: when there is not one length for each sequence.
    """
    if prompt_lengths.shape != (sequences.count,):
        unit = "sequences in its packed rows" if sequences.packed else "rows"
        raise ValueError(
            f"prompt_lengths has shape {list(prompt_lengths.shape)}, but the batch has {sequences.count} {unit}. Pass one "
            f"length for each: shape [{sequences.count}]."
        )
    rank_BS = count_within(sequences.real_BS, sequences.bounds_BS)
    length_BS = sequences.spread(prompt_lengths.to(rank_BS.device))
    return replace(whole(sequences), prompt_BS=sequences.real_BS & (rank_BS <= length_BS))


def by_labels(sequences: Sequences, labels: Tensor, every: bool) -> Prompts:
    """The tokens before an answer are prompt; an answer's tokens have a label that is not -100.

    Args:
        sequences (`Sequences`): Those of the batch.
        labels (`torch.Tensor`): [B, S]. A row without any label is all prompt. In a packed row, a sequence without any is
            left out: padding at the end of a row looks like that where position ids alone tell sequences apart.
        every (`bool`): Whether every answer has a prompt of its own, else the first only.
    """
    answer_BS = sequences.real_BS & (labels != IGNORED_LABEL)
    answered_BS = count_within(answer_BS, sequences.bounds_BS)
    prompt_BS = sequences.real_BS & (answered_BS == 0)
    if sequences.packed:
        prompt_BS &= total_within(answer_BS, sequences.bounds_BS) > 0
    if not every:
        return replace(whole(sequences), prompt_BS=prompt_BS)
    before_another_BS = answered_BS < total_within(answer_BS, sequences.bounds_BS)
    prompt_BS = prompt_BS | sequences.real_BS & ~answer_BS & before_another_BS
    # A sequence may begin with an answer: what follows it has no first tokens to edit either.
    return _in_runs(prompt_BS, sequences.start_BS, later_BS=answered_BS > 0)


def by_responses(sequences: Sequences, match_BS: Tensor, end_BS: Tensor, every: bool) -> Prompts:
    """A response begins after each match of the response template.

    A response ends with its first end token. Where a sequence has none before its next match, the next turn is taken to
    begin with the response.

    Args:
        sequences (`Sequences`): Those of the batch.
        match_BS (`torch.BoolTensor`): The last token of each match. A sequence without one is all prompt.
        end_BS (`torch.BoolTensor`): The tokens that end a text, as `generate` stops at them.
        every (`bool`): Whether every response has a prompt of its own, else the first only.
    """
    match_BS = match_BS & sequences.real_BS
    begun_BS = _before(match_BS, sequences.bounds_BS)
    prompt_BS = sequences.real_BS & (begun_BS == 0)
    if not every:
        return replace(whole(sequences), prompt_BS=prompt_BS)
    response_start_BS = sequences.start_BS | match_BS.roll(1, dims=1)
    over_BS = _before(end_BS, response_start_BS) > 0
    endless_BS = total_within(end_BS, response_start_BS) == 0
    another_BS = begun_BS < total_within(match_BS, sequences.bounds_BS)
    prompt_BS = prompt_BS | sequences.real_BS & another_BS & (over_BS | endless_BS)
    return _in_runs(prompt_BS, response_start_BS, later_BS=begun_BS > 0)


def _in_runs(prompt_BS: Tensor, start_BS: Tensor, later_BS: Tensor) -> Prompts:
    """Cut the prompt tokens into runs, at the starts and wherever a prompt begins again."""
    after_prompt_BS = prompt_BS.roll(1, dims=1)
    after_prompt_BS[:, 0] = False
    return Prompts(prompt_BS, start_BS | prompt_BS & ~after_prompt_BS, later_BS, None)


def count_within(mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """How many tokens of `mask_BS` there are from the latest start up to each token, itself included. None: from the row's start."""
    return _since_start(mask_BS.cumsum(dim=1), mask_BS, start_BS)


def total_within(mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """How many tokens of `mask_BS` there are between the starts around each token."""
    return count_and_total_within(mask_BS, start_BS)[1]


def count_and_total_within(mask_BS: Tensor, start_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """What `count_within` gives, and what `total_within` gives."""
    total_BS = mask_BS.cumsum(dim=1)
    if start_BS is None:
        return total_BS, total_BS[:, -1:].expand_as(total_BS)
    count_BS = _since_start(total_BS, mask_BS, start_BS)
    # The count where a stretch ends, carried back to its start.
    end_BS = start_BS.roll(-1, dims=1)
    end_BS[:, -1] = True
    at_end_BS = torch.where(end_BS, total_BS, total_BS.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return count_BS, count_BS + at_end_BS - total_BS


def _since_start(total_BS: Tensor, mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    if start_BS is None:
        return total_BS
    return total_BS - torch.where(start_BS, total_BS - mask_BS.long(), 0).cummax(dim=1).values


def _before(mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """How many tokens of `mask_BS` there are from the latest start up to each token, itself left out."""
    return count_within(mask_BS, start_BS) - mask_BS.long()


def as_batch(name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Put a tensor on a device.

    Raises:
        ValueError: when it has another shape than the batch.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but the batch has {shape[0]} rows of {shape[1]} tokens. ReFT reads "
            f"{name} to find the tokens to edit: pass it with shape {list(shape)}, or pass intervention_mask instead."
        )
    return tensor.to(device)
