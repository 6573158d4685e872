"""The position language, and the Selection that one batch gives.

This module knows which tokens of a prompt a spec names, and how to index them. Where the prompts are is prompts.py's.
Nothing here waits for the device, but the count of tokens where no bound for it is known.

Dimensions: B rows of the batch, S tokens of a row, T = B * S, G groups of weights, N tokens of one group, R rank.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .prompts import Prompts, as_batch, count_and_total_within


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

    def __str__(self) -> str:
        parts = [f"{letter}{count}" for letter, count in (("f", self.first), ("l", self.last)) if count]
        return repr("all" if self.all_tokens else "+".join(parts))

    @property
    def two_sided(self) -> bool:
        return self.first > 0 and self.last > 0

    def groups(self, share_weights: bool) -> int:
        """G: 2 when the first and the last tokens have weights of their own, else 1."""
        return 2 if self.two_sided and not share_weights else 1


@dataclass(frozen=True)
class Rows:
    """The rows of hidden states that layers of one rank edit.

    Args:
        index_T (`torch.LongTensor`): [G · N], counted over the flattened batch.
        row_T, column_T (`torch.LongTensor`): [G · N], the same as rows and columns of the batch.
        unused_TQ (`torch.BoolTensor`, *optional*): [G · N, Q], the directions, of those of all groups, in which a row is not
            edited. None: each is edited in all.
        spare_T1 (`torch.BoolTensor`, *optional*): [G · N, 1], places that hold no row to edit: all their directions are unused.
    """

    index_T: Tensor
    row_T: Tensor
    column_T: Tensor
    unused_TQ: Tensor | None
    spare_T1: Tensor | None


@dataclass(frozen=True)
class Selection:
    """The tokens of one forward that an adapter edits, as indices into the flattened batch.

    Shapes are fixed by the spec and the batch, not by its content, so that nothing has to be read back from the
    device: a prompt that is too short leaves places to spare, which `spare_GN` marks.

    Args:
        edited_BS (`torch.BoolTensor`): The tokens that are edited.
        index_GN (`torch.LongTensor`, *optional*): Indices into the T tokens. A spare place repeats a token. None: every
            token.
        spare_GN (`torch.BoolTensor`, *optional*): The places that hold no token to edit.
        kept_TR (`torch.BoolTensor`, *optional*): The directions that each token's example uses, where the adapter has
            subspaces. None: all.
        filled (`bool`): Whether it is known that no place is spare.
    """

    edited_BS: Tensor  # for its shape: a tensor's may vary in a compiled model, where a number of Python's may not
    index_GN: Tensor | None
    spare_GN: Tensor | None
    kept_TR: Tensor | None = None
    filled: bool = False

    def rows(self, rank: int) -> Rows | None:
        """The same for layers of some rank to read. None: all rows.

        Args:
            rank (`int`): R.
        """
        if self.index_GN is None or self.spare_GN is None:
            return None
        groups, places = self.index_GN.shape
        index_T, width = self.index_GN.flatten(), self.edited_BS.shape[1]
        if groups == 1 and self.kept_TR is None and self.filled:
            return Rows(index_T, index_T // width, index_T % width, None, None)
        unused_GNR = self.spare_GN[..., None].expand(-1, -1, rank)
        if self.kept_TR is not None:
            unused_GNR = unused_GNR | ~self.kept_TR[self.index_GN]
        unused_GNGR = unused_GNR[:, :, None].expand(-1, -1, groups, -1)
        if groups > 1:
            other_GG = ~torch.eye(groups, dtype=torch.bool, device=index_T.device)
            unused_GNGR = unused_GNGR | other_GG[:, None, :, None]
        return Rows(
            index_T,
            index_T // width,
            index_T % width,
            unused_GNGR.reshape(groups * places, groups * rank),
            self.spare_GN.view(-1, 1),
        )

    def to(self, device: torch.device) -> Selection:
        """The same on another device, for a model that is spread over several."""
        if self.edited_BS.device == device:
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        return Selection(
            self.edited_BS.to(device), move(self.index_GN), move(self.spare_GN), move(self.kept_TR), self.filled
        )

    def in_rows(self, rows: Tensor) -> Selection:
        """The part of it in some rows of the batch.

        Args:
            rows (`torch.LongTensor`): Their indices.
        """
        own_B = torch.zeros(self.edited_BS.shape[0], dtype=torch.bool, device=self.edited_BS.device)
        own_B[rows] = True
        edited_BS = self.edited_BS & own_B[:, None]
        if self.index_GN is None or self.spare_GN is None:
            return replace(self, edited_BS=edited_BS)
        spare_GN = self.spare_GN | ~own_B[self.index_GN // self.edited_BS.shape[1]]
        return replace(self, edited_BS=edited_BS, spare_GN=spare_GN, filled=False)


def first_and_last(prompts: Prompts, spec: PositionSpec) -> tuple[Tensor, Tensor]:
    """The tokens that `spec` names, as two bool masks [B, S]: the first tokens of each sequence, the last of each run.

    A prompt of n < first + last tokens gives its first min(first, n // 2) and its last min(last, n // 2); a one-sided
    spec takes min(count, n), and so does a run after a sequence's first.
    """
    # The rank is 1 for the first token of a run.
    rank_BS, length_BS = count_and_total_within(prompts.prompt_BS, prompts.start_BS)
    if spec.two_sided:
        crowded_BS = length_BS < spec.first + spec.last
        half_BS = length_BS // 2
        first_BS = torch.where(crowded_BS, half_BS.clamp(max=spec.first), spec.first)
        last_BS = torch.where(crowded_BS, half_BS.clamp(max=spec.last), spec.last)
    else:
        first_BS, last_BS = length_BS.clamp(max=spec.first), length_BS.clamp(max=spec.last)
    if prompts.later_BS is not None:  # a later run has last tokens only
        first_BS = first_BS.masked_fill(prompts.later_BS, 0)
        last_BS = torch.where(prompts.later_BS, length_BS.clamp(max=spec.last), last_BS)
    return (
        prompts.prompt_BS & (rank_BS <= first_BS),
        prompts.prompt_BS & (rank_BS > length_BS - last_BS),
    )


def select(first_BS: Tensor, last_BS: Tensor, groups: int, limit: int | None) -> Selection:
    """Turn the masks of the first and the last tokens into a Selection.

    Args:
        first_BS, last_BS (`torch.BoolTensor`): [B, S].
        groups (`int`): 1 to edit both with the same weights, 2 to edit them with weights of their own.
        limit (`int`, *optional*): N, an upper bound on the tokens of a group. None counts them, and waits for the
            device to do so.
    """
    edited_BS = first_BS | last_BS
    mask_GT = torch.stack([first_BS.flatten(), last_BS.flatten()]) if groups == 2 else edited_BS.view(1, -1)
    count_GT = mask_GT.cumsum(dim=1)
    if limit is None:
        limit = round_up(int(count_GT[:, -1].max()))
    # The n-th selected token is where the running count first reaches n.
    wanted_N = torch.arange(1, limit + 1, device=mask_GT.device)
    index_GN = torch.searchsorted(count_GT, wanted_N.expand(groups, limit).contiguous())
    spare_GN = index_GN == mask_GT.shape[1]
    # Spare places repeat a token that is edited anyway rather than, say, padding, whose state may not be finite.
    index_GN = torch.where(spare_GN, index_GN[:, :1], index_GN).clamp(max=mask_GT.shape[1] - 1)
    filled = spare_GN.is_cpu and not bool(spare_GN.any())  # to ask a GPU would be to wait for it
    return Selection(edited_BS, index_GN, spare_GN, filled=filled)


def places(spec: PositionSpec, groups: int, runs: int) -> int:
    """N: at most this many tokens of a group are selected in so many runs."""
    return runs * (max(spec.first, spec.last) if groups == 2 else spec.first + spec.last)


def round_up(count: int) -> int:
    """The next power of two: few different sizes, for a compiled model not to be compiled again for each."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


def masks_from_intervention_mask(
    intervention_mask: Tensor, shape: tuple[int, int], groups: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split an `intervention_mask` [B, S] into the tokens of the first and of the second group of weights.

    Raises:
        ValueError: when its shape is not the batch's, or when it is bool and the adapter has two groups of weights.
    """
    mask_BS = as_batch("intervention_mask", intervention_mask, shape, device)
    if mask_BS.dtype == torch.bool:
        if groups == 2:
            raise ValueError(
                "intervention_mask is bool, but this adapter has separate weights for the first and the last tokens "
                "(share_weights=False). Pass an integer mask: 0 no edit, 1 the first tokens' weights, 2 the last's."
            )
        return mask_BS, torch.zeros_like(mask_BS)
    return mask_BS == 1, mask_BS == 2
