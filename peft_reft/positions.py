"""Which tokens are edited: the position language, and the Selection that one batch gives.

This module knows tensors of tokens (masks, labels, position ids) and nothing of models, caches or adapters. The rules
are those of docs/positions.md: padding is never selected, packed rows are split into their sequences, and the first
and the last tokens of a prompt never overlap.

Everything here is computed with cumulative sums over fixed shapes: no loop over tokens or samples, and nothing that
waits for the device, but for the one check that a batch selects something at all.

Dimensions: B rows of the batch, S tokens of a row, G groups of weights, N tokens selected for one group.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


IGNORED_LABEL = -100
POSITION_EXAMPLES = "'f7+l7' (first 7 and last 7 tokens of the prompt), 'f3', 'l1' or 'all'"


@dataclass(frozen=True)
class PositionSpec:
    """A parsed `positions` string.

    Args:
        first (`int`): How many tokens from the start of the prompt.
        last (`int`): How many tokens back from the end of the prompt.
        all_tokens (`bool`): `"all"`: every token, of the prompt or not.
    """

    first: int = 0
    last: int = 0
    all_tokens: bool = False

    @classmethod
    def parse(cls, text: str) -> PositionSpec:
        """Read `"f7+l7"`, `"f3"`, `"l1"` or `"all"`.

        Raises:
            ValueError: for any other text, naming the field, the text and what is allowed.
        """
        if text == "all":
            return cls(all_tokens=True)
        counts: dict[str, int] = {}
        for part in text.split("+") if isinstance(text, str) else [""]:
            match = re.fullmatch(r"([fl])([1-9][0-9]*)", part.strip())
            if match is None or match[1] in counts:
                raise ValueError(f"positions={text!r} does not parse. Write {POSITION_EXAMPLES}.")
            counts[match[1]] = int(match[2])
        return cls(first=counts.get("f", 0), last=counts.get("l", 0))

    @property
    def two_sided(self) -> bool:
        return self.first > 0 and self.last > 0

    def groups(self, share_weights: bool) -> int:
        """G: 2 when the first and the last tokens have weights of their own, else 1."""
        return 2 if self.two_sided and not share_weights else 1


@dataclass(frozen=True)
class Selection:
    """The tokens of one forward that an adapter edits, as indices into the flattened batch.

    Shapes are fixed by the spec and the batch, not by its content, so that nothing has to be read back from the
    device: a prompt that is too short leaves places to spare, which `spare_GN` marks.

    Args:
        shape (`tuple[int, int]`): (B, S) of the forward.
        index_GN (`torch.LongTensor`): Indices into the B * S tokens. A spare place repeats a token.
        spare_GN (`torch.BoolTensor`): The places that hold no token to edit.
    """

    shape: tuple[int, int]
    index_GN: Tensor
    spare_GN: Tensor

    def to(self, device: torch.device) -> Selection:
        """The same on another device, for a model that is spread over several."""
        if self.index_GN.device == device:
            return self
        return Selection(self.shape, self.index_GN.to(device), self.spare_GN.to(device))


@dataclass(frozen=True)
class Prompts:
    """Where the prompts of a batch lie.

    Args:
        prompt_BS (`torch.BoolTensor`): The tokens that belong to a prompt. Never padding.
        start_BS (`torch.BoolTensor`): The first token of every sequence, more than one in a packed row.
        sequences (`int`, *optional*): How many sequences the rows hold at most, when known without reading the device.
    """

    prompt_BS: Tensor
    start_BS: Tensor
    sequences: int | None


def find_prompts(
    shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
) -> Prompts:
    """Find the prompt of every sequence of a batch.

    In this order: `prompt_lengths`, then `labels` (the tokens before the first label that is not -100), else all real
    tokens.

    Args:
        shape (`tuple[int, int]`): (B, S).
        device (`torch.device`): Where to compute.
        attention_mask (`torch.Tensor`, *optional*): [B, S], 0 for padding. Packed rows may number their sequences
            1, 2, 3 ... in it.
        position_ids (`torch.Tensor`, *optional*): [B, S] or [1, S]. Packed rows restart in it.
        cu_seq_lens (`torch.Tensor`, *optional*): [sequences + 1], cumulative lengths over the flattened batch.
        labels (`torch.Tensor`, *optional*): [B, S], -100 where there is no loss.
        prompt_lengths (`torch.Tensor`, *optional*): [B], real tokens in each prompt.

    Raises:
        ValueError: when a tensor has another shape than the batch.
    """
    real_BS = torch.ones(shape, dtype=torch.bool, device=device)
    start_BS = torch.zeros(shape, dtype=torch.bool, device=device)
    start_BS[:, 0] = True
    packed = False
    if attention_mask is not None:
        number_BS = _as_batch("attention_mask", attention_mask, shape, device).long()
        real_BS = number_BS != 0
        # A number larger than all before it opens a sequence; an ordinary 0/1 mask opens one, at its first real token.
        before_BS = number_BS.cummax(dim=1).values.roll(1, dims=1)
        before_BS[:, 0] = 0
        start_BS |= number_BS > before_BS
        packed = attention_mask.dtype != torch.bool
    if position_ids is not None and position_ids.dim() == 2 and position_ids.shape[1] == shape[1]:
        position_BS = _as_batch("position_ids", position_ids.expand(shape), shape, device)
        start_BS[:, 1:] |= real_BS[:, 1:] & (position_BS[:, 1:] <= position_BS[:, :-1])
        packed = True
    if cu_seq_lens is not None:
        ends = torch.zeros(shape[0] * shape[1] + 1, dtype=torch.bool, device=device)
        start_BS |= ends.index_fill_(0, cu_seq_lens.to(device).long(), True)[:-1].view(shape)
        packed = True

    if prompt_lengths is not None:
        if prompt_lengths.shape != (shape[0],):
            raise ValueError(
                f"prompt_lengths has shape {list(prompt_lengths.shape)}, but the batch has {shape[0]} rows. Pass one "
                f"length for each row: shape [{shape[0]}]."
            )
        prompt_BS = real_BS & (real_BS.cumsum(dim=1) <= prompt_lengths.to(device)[:, None])
    elif labels is not None:
        answered_BS = _as_batch("labels", labels, shape, device) != IGNORED_LABEL
        prompt_BS = real_BS & (_count_within(answered_BS, start_BS) == 0)
    else:
        prompt_BS = real_BS
    return Prompts(prompt_BS, start_BS, None if packed else shape[0])


def first_and_last(prompts: Prompts, spec: PositionSpec) -> tuple[Tensor, Tensor]:
    """The tokens that `spec` names, as two bool masks [B, S]: the first tokens of each prompt, and the last.

    A prompt of n < first + last tokens gives its first min(first, n // 2) and its last min(last, n // 2); a one-sided
    spec takes min(count, n).
    """
    rank_BS = _count_within(prompts.prompt_BS, prompts.start_BS)  # 1 for the first token of a prompt
    # The length of a prompt, at each of its tokens: the count where its sequence ends, carried back to its start.
    end_BS = prompts.start_BS.roll(-1, dims=1)
    end_BS[:, -1] = True
    total_BS = prompts.prompt_BS.cumsum(dim=1)
    at_end_BS = torch.where(end_BS, total_BS, total_BS.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    length_BS = rank_BS + at_end_BS - total_BS
    if spec.two_sided:
        crowded_BS = length_BS < spec.first + spec.last
        half_BS = length_BS // 2
        first_BS = torch.where(crowded_BS, half_BS.clamp(max=spec.first), spec.first)
        last_BS = torch.where(crowded_BS, half_BS.clamp(max=spec.last), spec.last)
    else:
        first_BS, last_BS = length_BS.clamp(max=spec.first), length_BS.clamp(max=spec.last)
    return (
        prompts.prompt_BS & (rank_BS <= first_BS),
        prompts.prompt_BS & (rank_BS > length_BS - last_BS),
    )


def select(first_BS: Tensor, last_BS: Tensor, groups: int, places: int | None) -> Selection:
    """Turn the masks of the first and the last tokens into a Selection.

    Args:
        first_BS, last_BS (`torch.BoolTensor`): [B, S].
        groups (`int`): 1 to edit both with the same weights, 2 to edit them with weights of their own.
        places (`int`, *optional*): N, an upper bound on the tokens of a group. None counts them, and waits for the
            device to do so.
    """
    mask_GT = torch.stack([first_BS.flatten(), last_BS.flatten()]) if groups == 2 else (first_BS | last_BS).view(1, -1)
    count_GT = mask_GT.cumsum(dim=1)
    if places is None:
        places = int(count_GT[:, -1].max())
    # The n-th selected token is where the running count first reaches n.
    wanted_N = torch.arange(1, places + 1, device=mask_GT.device)
    index_GN = torch.searchsorted(count_GT, wanted_N.expand(groups, places).contiguous())
    spare_GN = index_GN == mask_GT.shape[1]
    # Spare places repeat a token that is edited anyway rather than, say, padding, whose state may not be finite.
    index_GN = torch.where(spare_GN, index_GN[:, :1], index_GN).clamp(max=mask_GT.shape[1] - 1)
    return Selection((first_BS.shape[0], first_BS.shape[1]), index_GN, spare_GN)


def masks_from_intervention_mask(
    intervention_mask: Tensor, shape: tuple[int, int], groups: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split an `intervention_mask` [B, S] into the tokens of the first and of the second group of weights.

    Raises:
        ValueError: when its shape is not the batch's, or when it is bool and the adapter has two groups of weights.
    """
    mask_BS = _as_batch("intervention_mask", intervention_mask, shape, device)
    if mask_BS.dtype == torch.bool:
        if groups == 2:
            raise ValueError(
                "intervention_mask is bool, but this adapter has separate weights for the first and the last tokens "
                "(share_weights=False). Pass an integer mask: 0 no edit, 1 the first tokens' weights, 2 the last's."
            )
        return mask_BS, torch.zeros_like(mask_BS)
    return mask_BS == 1, mask_BS == 2


def _count_within(mask_BS: Tensor, start_BS: Tensor) -> Tensor:
    """How many tokens of `mask_BS` the sequence of each token has had up to it, itself included."""
    total_BS = mask_BS.cumsum(dim=1)
    before_BS = torch.where(start_BS, total_BS - mask_BS.long(), 0).cummax(dim=1).values
    return total_BS - before_BS


def _as_batch(name: str, tensor: Tensor, shape: tuple[int, int], device: torch.device) -> Tensor:
    if tuple(tensor.shape) != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}, but the batch has {shape[0]} rows of {shape[1]} tokens. ReFT reads "
            f"{name} to find the tokens to edit: pass it with shape {list(shape)}, or pass intervention_mask instead."
        )
    return tensor.to(device)
