"""The sequences of a batch, and the prompts in them.

This module knows tensors of tokens (masks, labels, position ids) and nothing of models, caches or adapters. The rules
are those of docs/positions.md. Everything is computed with cumulative sums over fixed shapes: no loop over tokens or
samples. Two numbers are read back from the device, where they are needed: whether an attention mask of integers
numbers packed sequences, and how many sequences a batch holds that may be packed.

A run is a stretch of prompt tokens that ends where an answer begins. A sequence has one run, or, with
`prompt_boundary="every"`, one for each turn.

A start is a token at which counting begins anew: `start_BS` marks the first token of each row, and of each sequence,
run or response. `start_BS=None` means that counting begins with each row.

Dimensions: B rows of the batch, S tokens of a row, N sequences of the batch, F = B · S tokens of the flattened batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


IGNORED_LABEL = -100  # the label of tokens that the loss leaves out
# The origin of prompts in a batch whose sequences may lack the response template. Labels tell those of the rest.
TEMPLATE_OR_LABELS = "response_template or labels"


@dataclass(frozen=True)
class Sequences:
    """The sequences of a batch: one in each row, or several in a packed row.

    Args:
        real_BS (`torch.BoolTensor`): [B, S], the tokens that are not padding.
        packed_start_BS (`torch.BoolTensor`, *optional*): [B, S], the starts in packed rows: the first token of each
            row, and the first real token of each sequence. None: each row is one sequence.
        count (`int`): N, the number of sequences. B where no row is packed, whether rows are empty or not.
    """

    real_BS: Tensor
    packed_start_BS: Tensor | None
    count: int

    @property
    def packed(self) -> bool:
        """Whether a row holds more than one sequence."""
        return self.packed_start_BS is not None

    @cached_property
    def start_BS(self) -> Tensor:
        """The first token of each row, and the first real token of each sequence."""
        if self.packed_start_BS is not None:
            return self.packed_start_BS
        start_BS = self.real_BS & (self.real_BS.cumsum(dim=1) == 1)
        start_BS[:, 0] = True
        return start_BS

    def spread(self, value_N: Tensor) -> Tensor:
        """Give every token the value of its sequence: [N, ...] becomes [B, S, ...]."""
        rows, width = self.real_BS.shape
        if not self.packed:
            return value_N[:, None].expand(rows, width, *value_N.shape[1:])
        return value_N[self._number_F].unflatten(0, (rows, width))

    def any_of_each(self, masks_KBS: Tensor) -> Tensor:
        """Whether each sequence has a token of a mask, for several masks: [K, B, S] becomes [K, N], bool."""
        if not self.packed:
            return masks_KBS.any(dim=2)
        counts_KN = torch.zeros(masks_KBS.shape[0], self.count, dtype=torch.int64, device=masks_KBS.device)
        return counts_KN.index_add_(1, self._number_F, (masks_KBS & self.real_BS).flatten(1).long()) > 0

    @cached_property
    def _number_F(self) -> Tensor:
        """The number of each token's sequence, from 0, in the flattened batch. Padding has that of its neighbour."""
        opened_F = (self.start_BS & self.real_BS).flatten().cumsum(dim=0)
        return (opened_F - 1).clamp(min=0)


@dataclass(frozen=True)
class Prompts:
    """The prompts of a batch, as runs of tokens.

    Args:
        prompt_BS (`torch.BoolTensor`): [B, S], the tokens that belong to a prompt. Never padding.
        start_BS (`torch.BoolTensor`, *optional*): [B, S], the starts: no run crosses one, and between two of them
            there is at most one run. None: each row has at most one run.
        later_BS (`torch.BoolTensor`, *optional*): [B, S], the tokens after the first run of their sequence. A run
            there has last tokens and no first tokens. None: every sequence has one run.
        runs (`int`, *optional*): An upper bound on the number of runs, where one is known.
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
        device (`torch.device`): The device to compute on.
        attention_mask (`torch.Tensor`, *optional*): [B, S], 0 for padding. Packed rows may number their sequences
            1, 2, 3 ... in it.
        position_ids (`torch.Tensor`, *optional*): [B, S] or [1, S], restarting in packed rows. Vision-language models
            have several positions for each token: of [4, B, S] the first counts the text; [3, B, S] has none that
            does, and is not read.
        cu_seq_lens (`torch.Tensor`, *optional*): [N + 1], cumulative lengths over the flattened batch.

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
    """The prompts where every real token is prompt."""
    return Prompts(sequences.real_BS, sequences.packed_start_BS, None, sequences.count)


def by_lengths(sequences: Sequences, prompt_lengths: Tensor) -> Prompts:
    """The prompts where their lengths are given: the first real tokens of each sequence.

    Args:
        sequences (`Sequences`): The sequences of the batch.
        prompt_lengths (`torch.Tensor`): [N], in tokens.

    Raises:
        ValueError: when there is not one length for each sequence.
    """
    if prompt_lengths.shape != (sequences.count,):
        unit = "sequences in its packed rows" if sequences.packed else "rows"
        raise ValueError(
            f"prompt_lengths has shape {list(prompt_lengths.shape)}, but the batch has {sequences.count} {unit}. Pass "
            f"one length for each: shape [{sequences.count}]."
        )
    rank_BS = count_within(sequences.real_BS, sequences.packed_start_BS)
    length_BS = sequences.spread(prompt_lengths.to(rank_BS.device))
    return replace(whole(sequences), prompt_BS=sequences.real_BS & (rank_BS <= length_BS))


def by_labels(sequences: Sequences, labels: Tensor, every: bool) -> Prompts:
    """The prompts by labels: the tokens before an answer, whose tokens have a label that is not -100.

    Args:
        sequences (`Sequences`): The sequences of the batch.
        labels (`torch.Tensor`): [B, S]. A row without any label is all prompt. In a packed row, a sequence without any
            has no prompt: padding at the end of a row looks the same where position ids alone tell sequences apart.
        every (`bool`): Whether every answer has a prompt of its own, else only the first.
    """
    answer_BS = sequences.real_BS & (labels != IGNORED_LABEL)
    answered_BS = count_within(answer_BS, sequences.packed_start_BS)
    prompt_BS = sequences.real_BS & (answered_BS == 0)
    if sequences.packed:
        prompt_BS &= total_within(answer_BS, sequences.packed_start_BS) > 0
    if not every:
        return replace(whole(sequences), prompt_BS=prompt_BS)
    before_another_BS = answered_BS < total_within(answer_BS, sequences.packed_start_BS)
    prompt_BS = prompt_BS | sequences.real_BS & ~answer_BS & before_another_BS
    # A sequence may begin with an answer: a run after that has no first tokens to edit either.
    return _in_runs(prompt_BS, sequences.start_BS, later_BS=answered_BS > 0)


def by_responses(sequences: Sequences, match_BS: Tensor, end_BS: Tensor, every: bool) -> Prompts:
    """The prompts by the response template: a response begins after each match of it.

    A response ends with its first end token. Where there is none before the next match, no token tells the response
    from the prompt of the next turn, and both are taken for prompt.

    Args:
        sequences (`Sequences`): The sequences of the batch.
        match_BS (`torch.BoolTensor`): [B, S], the last token of each match. A sequence without one is all prompt.
        end_BS (`torch.BoolTensor`): [B, S], the tokens that end a response (`eos_token_id`).
        every (`bool`): Whether every response has a prompt of its own, else only the first.
    """
    match_BS = match_BS & sequences.real_BS
    begun_BS = _before(match_BS, sequences.packed_start_BS)
    prompt_BS = sequences.real_BS & (begun_BS == 0)
    if not every:
        return replace(whole(sequences), prompt_BS=prompt_BS)
    response_start_BS = sequences.start_BS | match_BS.roll(1, dims=1)
    over_BS = _before(end_BS, response_start_BS) > 0
    endless_BS = total_within(end_BS, response_start_BS) == 0
    another_BS = begun_BS < total_within(match_BS, sequences.packed_start_BS)
    prompt_BS = prompt_BS | sequences.real_BS & another_BS & (over_BS | endless_BS)
    return _in_runs(prompt_BS, response_start_BS, later_BS=begun_BS > 0)


def either(sequences: Sequences, first_BS: Tensor, first: Prompts, second: Prompts) -> Prompts:
    """The prompts of two ways of finding them: of the first way in some sequences, of the second in the others.

    Args:
        sequences (`Sequences`): The sequences of the batch.
        first_BS (`torch.BoolTensor`): [B, S], the tokens of the sequences that go by the first way.
        first, second (`Prompts`): The prompts by either way, both with one run in a sequence or both with several.
    """
    prompt_BS = first.prompt_BS.where(first_BS, second.prompt_BS)
    if first.later_BS is None or second.later_BS is None:
        return replace(whole(sequences), prompt_BS=prompt_BS)
    assert first.start_BS is not None and second.start_BS is not None
    start_BS = first.start_BS.where(first_BS, second.start_BS)
    return Prompts(prompt_BS, start_BS, first.later_BS.where(first_BS, second.later_BS), None)


def _in_runs(prompt_BS: Tensor, start_BS: Tensor, later_BS: Tensor) -> Prompts:
    """Cut the prompt tokens into runs: a run begins at a start, and at a prompt token after one that is no prompt."""
    after_prompt_BS = prompt_BS.roll(1, dims=1)
    after_prompt_BS[:, 0] = False
    return Prompts(prompt_BS, start_BS | prompt_BS & ~after_prompt_BS, later_BS, None)


def count_within(mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """For each token, how many tokens of `mask_BS` there are from the latest start through it. int64, [B, S]."""
    return _since_start(mask_BS.cumsum(dim=1), mask_BS, start_BS)


def total_within(mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """For each token, how many tokens of `mask_BS` there are between the starts around it. int64, [B, S]."""
    return count_and_total_within(mask_BS, start_BS)[1].expand_as(mask_BS)


def count_and_total_within(mask_BS: Tensor, start_BS: Tensor | None) -> tuple[Tensor, Tensor]:
    """`count_within` and `total_within`, by one cumulative sum. The total is [B, 1] where there are no starts within
    rows: all tokens of a row then have the same."""
    total_BS = mask_BS.cumsum(dim=1)
    if start_BS is None:
        return total_BS, total_BS[:, -1:]
    count_BS = _since_start(total_BS, mask_BS, start_BS)
    # The cumulative sum at the last token before the next start, carried back to all tokens before it.
    end_BS = start_BS.roll(-1, dims=1)
    end_BS[:, -1] = True
    at_end_BS = torch.where(end_BS, total_BS, total_BS.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return count_BS, count_BS + at_end_BS - total_BS


def _since_start(total_BS: Tensor, mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """Turn the cumulative sum of a mask over the row into its cumulative sum since the latest start."""
    if start_BS is None:
        return total_BS
    return total_BS - torch.where(start_BS, total_BS - mask_BS.long(), 0).cummax(dim=1).values


def _before(mask_BS: Tensor, start_BS: Tensor | None) -> Tensor:
    """For each token, how many tokens of `mask_BS` there are from the latest start up to it, without it."""
    return count_within(mask_BS, start_BS) - mask_BS.long()


def as_batch(name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    """Check the shape of a tensor of the batch, and move it to a device.

    Args:
        name (`str`): The argument, for messages.
        tensor (`torch.Tensor`): [B, S].
        shape (`tuple[int, int]`): (B, S).
        device (`torch.device`): The device to move to.

    Raises:
        ValueError: when it has another shape than the batch.
    """
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but the batch has {shape[0]} rows of {shape[1]} tokens. ReFT "
            f"reads {name} to find the tokens to edit: pass it with shape {list(shape)}, or pass intervention_mask "
            "instead."
        )
    return tensor.to(device)
