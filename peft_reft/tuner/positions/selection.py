"""The Selection that one batch gives: masks of tokens turned into index tensors, of few different shapes.

This module knows tensors of tokens. Which tokens those are is spec.py's and prompts.py's to say. Nothing here waits for the device,
but the count of tokens where no bound for it is known.

Dimensions: B rows of the batch, S tokens of a row, T slots for tokens to edit, G groups of weights, N slots of one group, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .spec import PositionSpec


@dataclass(frozen=True)
class Selection:
    """The tokens that an adapter edits in one forward.

    Args:
        edited_BS (`torch.BoolTensor`): The tokens that are edited.
        index_T (`torch.LongTensor`, *optional*): Indices of the tokens to edit into the flattened batch: the N slots of the first
            group, then those of the second. An empty slot repeats a token. None: every token of the batch, in order.
        row_T, column_T (`torch.LongTensor`, *optional*): The same as rows and columns of the batch.
        unused_TGR (`torch.BoolTensor`, *optional*): The directions in which a token is not edited, as [T, G, 1], [T, 1, R] or [T, G, R]:
            those of the group that the token does not belong to, those of the subspaces that its example does not use, and all of an
            empty slot's. None: each token is edited in all.
        empty_T1 (`torch.BoolTensor`, *optional*): [T, 1], the slots that hold no token to edit. None: no slot is empty.
    """

    edited_BS: Tensor  # for its shape: a tensor's may vary in a compiled model, where a number of Python's may not
    index_T: Tensor | None = None
    row_T: Tensor | None = None
    column_T: Tensor | None = None
    unused_TGR: Tensor | None = None
    empty_T1: Tensor | None = None

    @classmethod
    def of_slots(cls, edited_BS: Tensor, index_GN: Tensor, empty_GN: Tensor | None) -> Selection:
        """A Selection of indexed tokens.

        Args:
            edited_BS (`torch.BoolTensor`): The tokens that are edited.
            index_GN (`torch.LongTensor`): Indices into the flattened batch, for each group of weights.
            empty_GN (`torch.BoolTensor`, *optional*): The slots that hold no token. None: none is empty.
        """
        groups, slots = index_GN.shape
        index_T, width = index_GN.flatten(), edited_BS.shape[1]
        empty_T1 = None if empty_GN is None else empty_GN.view(-1, 1)
        unused_TGR = None if empty_T1 is None else empty_T1[..., None]
        if groups > 1:
            other_GG = ~torch.eye(groups, dtype=torch.bool, device=index_T.device)
            other_TG1 = other_GG[:, None].expand(-1, slots, -1).reshape(-1, groups, 1)
            unused_TGR = other_TG1 if unused_TGR is None else unused_TGR | other_TG1
        return cls(edited_BS, index_T, index_T // width, index_T % width, unused_TGR, empty_T1)

    def in_directions(self, kept_R_of_tokens: Tensor) -> Selection:
        """The same edited in some directions only.

        Args:
            kept_R_of_tokens (`torch.BoolTensor`): [B · S, R], the directions that each token's example uses.
        """
        kept_TR = kept_R_of_tokens if self.index_T is None else kept_R_of_tokens[self.index_T]
        unused_T1R = ~kept_TR[:, None]
        return replace(self, unused_TGR=unused_T1R if self.unused_TGR is None else self.unused_TGR | unused_T1R)

    def in_rows(self, rows: Tensor) -> Selection:
        """The part of it in some rows of the batch: the slots of other rows become empty.

        Args:
            rows (`torch.LongTensor`): Their indices.
        """
        own_B = torch.zeros(self.edited_BS.shape[0], dtype=torch.bool, device=self.edited_BS.device)
        own_B[rows] = True
        edited_BS = self.edited_BS & own_B[:, None]
        if self.row_T is None:
            return replace(self, edited_BS=edited_BS)
        other_T1 = ~own_B[self.row_T][:, None]
        return replace(
            self,
            edited_BS=edited_BS,
            unused_TGR=other_T1[..., None] if self.unused_TGR is None else self.unused_TGR | other_T1[..., None],
            empty_T1=other_T1 if self.empty_T1 is None else self.empty_T1 | other_T1,
        )

    def to(self, device: torch.device) -> Selection:
        """The same on another device, for a model that is spread over several."""
        if self.edited_BS.device == device:
            return self
        return Selection(*(None if tensor is None else tensor.to(device) for tensor in vars(self).values()))  # type: ignore[arg-type]


def select(first_BS: Tensor, last_BS: Tensor, groups: int, limit: int | None) -> Selection:
    """Turn the masks of the first and the last tokens into a Selection.

    Args:
        first_BS, last_BS (`torch.BoolTensor`): [B, S].
        groups (`int`): G, 1 to edit both with the same weights, 2 to edit them with weights of their own.
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
    empty_GN = index_GN == mask_GT.shape[1]
    # An empty slot repeats a token that is edited anyway rather than, say, padding, whose state may not be finite.
    index_GN = torch.where(empty_GN, index_GN[:, :1], index_GN).clamp(max=mask_GT.shape[1] - 1)
    # With two groups there is a mask in any case. To ask a GPU would be to wait for it.
    none_empty = groups == 1 and empty_GN.is_cpu and not bool(empty_GN.any())
    return Selection.of_slots(edited_BS, index_GN, None if none_empty else empty_GN)


def slots(spec: PositionSpec, groups: int, runs: int) -> int:
    """N: at most this many tokens of a group are selected in so many runs of prompt tokens."""
    return runs * (max(spec.first, spec.last) if groups == 2 else spec.first + spec.last)


def round_up(count: int) -> int:
    """The next power of two: few different sizes, for a compiled model not to be compiled again for each."""
    return 1 << (count - 1).bit_length() if count > 0 else 0
