"""From masks of tokens to a Selection: index tensors of few different shapes.

This module knows masks and indices. spec.py and prompts.py find the tokens that the masks mark. A GPU is waited for
only to count the tokens of a mask where no upper bound on them is known.

Index tensors have slots: one for each token that may have to be edited. An empty slot has none.

Dimensions: B rows of the batch, S tokens of a row, F = B · S tokens of the flattened batch, G groups of weights, N
slots of one group, T = G · N slots for tokens to edit, R rank.
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
        edited_BS (`torch.BoolTensor`): [B, S], the tokens that are edited.
        index_T (`torch.LongTensor`, *optional*): Indices of the tokens to edit into the flattened batch: the N slots
            of the first group, then those of the second. An empty slot repeats a token. None: every token of the
            batch, in order, so that T = F in the tensors below.
        row_T, column_T (`torch.LongTensor`, *optional*): The same indices as rows and columns of the batch.
        unused_TGR (`torch.BoolTensor`, *optional*): The directions in which a token is not edited, as [T, G, 1], [T,
            1, R] or [T, G, R]: those of the group that the token does not belong to, those of the subspaces that its
            example does not use, and all directions of an empty slot. None: each token is edited in all directions.
        empty_T1 (`torch.BoolTensor`, *optional*): [T, 1], the empty slots. None: no slot is empty.
    """

    edited_BS: Tensor  # read for its shape too: torch.compile lets a tensor's shape vary, and fixes Python's numbers
    index_T: Tensor | None = None
    row_T: Tensor | None = None
    column_T: Tensor | None = None
    unused_TGR: Tensor | None = None
    empty_T1: Tensor | None = None

    @classmethod
    def of_slots(cls, edited_BS: Tensor, index_GN: Tensor, empty_GN: Tensor) -> Selection:
        """A Selection from the slots of each group of weights.

        Args:
            edited_BS (`torch.BoolTensor`): [B, S], the tokens that are edited.
            index_GN (`torch.LongTensor`): [G, N], indices into the flattened batch.
            empty_GN (`torch.BoolTensor`): [G, N], the empty slots.
        """
        groups, slots = index_GN.shape
        index_T, width = index_GN.flatten(), edited_BS.shape[1]
        empty_T1 = empty_GN.view(-1, 1)
        unused_TGR = empty_T1[..., None]
        if groups > 1:
            other_GG = ~torch.eye(groups, dtype=torch.bool, device=index_T.device)
            other_TG1 = other_GG[:, None].expand(-1, slots, -1).reshape(-1, groups, 1)
            unused_TGR = unused_TGR | other_TG1
        return cls(edited_BS, index_T, index_T // width, index_T % width, unused_TGR, empty_T1)

    def in_directions(self, used_FR: Tensor) -> Selection:
        """The same tokens, each edited only in the directions that its example uses.

        Args:
            used_FR (`torch.BoolTensor`): [F, R], the directions that each token's example uses.
        """
        used_TR = used_FR if self.index_T is None else used_FR[self.index_T]
        unused_T1R = ~used_TR[:, None]
        return replace(self, unused_TGR=unused_T1R if self.unused_TGR is None else self.unused_TGR | unused_T1R)

    def in_rows(self, rows: Tensor) -> Selection:
        """The selected tokens in some rows of the batch: the slots of other rows become empty.

        Args:
            rows (`torch.LongTensor`): The indices of the rows, of any number.
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
        """The same Selection on another device, for a model whose layers lie on several."""
        if self.edited_BS.device == device:
            return self
        moved = (None if tensor is None else tensor.to(device) for tensor in vars(self).values())
        return Selection(*moved)  # type: ignore[arg-type]


def selection_from_masks(first_BS: Tensor, last_BS: Tensor, groups: int, limit: int | None) -> Selection:
    """Turn the masks of the first and the last tokens into a Selection.

    Args:
        first_BS, last_BS (`torch.BoolTensor`): [B, S], the first and the last tokens to edit.
        groups (`int`): G, 1 to edit both with the same weights, 2 to edit each with weights of its own.
        limit (`int`, *optional*): N, an upper bound on the tokens of a group. None: they are counted, which waits for
            a GPU.
    """
    edited_BS = first_BS | last_BS
    if groups == 1 and edited_BS.is_cpu:  # on a GPU, to count the tokens is to wait
        # Where no slot is empty, as in most batches, the slots are the tokens.
        row_T, column_T = edited_BS.nonzero(as_tuple=True)
        tokens = row_T.shape[0]
        if tokens == (round_up(tokens) if limit is None else limit):
            return Selection(edited_BS, column_T.add(row_T, alpha=edited_BS.shape[1]), row_T, column_T)
    mask_GF = torch.stack([first_BS.flatten(), last_BS.flatten()]) if groups == 2 else edited_BS.view(1, -1)
    count_GF = mask_GF.cumsum(dim=1)
    if limit is None:
        limit = round_up(int(count_GF[:, -1].max()))
    # The n-th token of a mask is the one at which the cumulative count first reaches n.
    wanted_N = torch.arange(1, limit + 1, device=mask_GF.device)
    index_GN = torch.searchsorted(count_GF, wanted_N.expand(groups, limit).contiguous())
    empty_GN = index_GN == mask_GF.shape[1]
    # An empty slot repeats a token of its group, which is edited anyway: the state of padding, say, may not be finite.
    index_GN = torch.where(empty_GN, index_GN[:, :1], index_GN).clamp(max=mask_GF.shape[1] - 1)
    return Selection.of_slots(edited_BS, index_GN, empty_GN)


def max_slots(spec: PositionSpec, groups: int, runs: int) -> int:
    """N: an upper bound on the tokens of a group that a spec selects in some number of runs of prompt tokens."""
    return runs * (max(spec.first, spec.last) if groups == 2 else spec.first + spec.last)


def round_up(count: int) -> int:
    """The next power of two: a compiled model is compiled again for each size, so there are to be few."""
    return 1 << (count - 1).bit_length() if count > 0 else 0
