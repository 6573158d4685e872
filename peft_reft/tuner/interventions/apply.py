"""The edit of rows of a hidden state: read them, edit them, write them back.

This module knows what reading and writing cost, and leaves the formulas to interventions.py. A step of a deep model runs it once a
layer, so it is a short row of torch's own operations: Python functions in backward would cost more than they save.

Dimensions: B rows of the batch, S tokens, T tokens to edit, Q directions, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..positions.selection import Rows
from .formulas import EditWeights, Intervention, coefficients


@dataclass(frozen=True)
class Edit:
    """What is done to each row.

    Args:
        intervention (`Intervention`): The formula.
        act: Activation function of its source, None for the identity.
        dropout (`float`): The part of an edited state that is dropped.
    """

    intervention: Intervention
    act: Callable[[Tensor], Tensor] | None = None
    dropout: float = 0.0


def edit_rows(h: Tensor, rows: Rows, edit: Edit, weights: EditWeights) -> Tensor:
    """Edit rows of a hidden state in place.

    Args:
        h (`torch.Tensor`): [B, S, D] or [B · S, D], contiguous, and such as autograd lets be written to.
        rows (`Rows`): Which rows.
        edit (`Edit`): What is done to them.
        weights (`EditWeights`): With what, in the dtype to compute in.

    Returns:
        `torch.Tensor`: h.
    """
    h_TD = h.view(-1, h.shape[-1]).index_select(0, rows.index_T)
    return _add_to_rows(h, rows, delta(h_TD, edit, weights, rows.unused_TQ, rows.spare_T1))


def _add_to_rows(h: Tensor, rows: Rows, delta_TD: Tensor) -> Tensor:
    """Add to rows of h, in place. One that is listed twice gets both."""
    if h.is_cpu:
        # The quickest here. On a GPU it sorts the indices, and waits for the device to check them.
        places = (rows.index_T,) if h.dim() == 2 else (rows.row_T, rows.column_T)
        return h.index_put_(places, delta_TD, accumulate=True)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _AddToRows.apply(h, rows.index_T, delta_TD)
    h.view(-1, h.shape[-1]).index_add_(0, rows.index_T, delta_TD)
    return h


class _AddToRows(torch.autograd.Function):
    """`index_add_` over the leading dimensions of h. Autograd would see a write to a view there, and copy the gradient of the
    whole state to let it through; it passes as it is."""

    @staticmethod
    def forward(h: Tensor, index_T: Tensor, delta_TD: Tensor) -> Tensor:
        h.view(-1, h.shape[-1]).index_add_(0, index_T, delta_TD)
        return h

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.mark_dirty(inputs[0])
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor]:
        (index_T,) = ctx.saved_tensors
        return gradient, None, gradient.reshape(-1, gradient.shape[-1]).index_select(0, index_T)


def delta(
    h_TD: Tensor, edit: Edit, weights: EditWeights, unused_TQ: Tensor | None = None, spare_T1: Tensor | None = None
) -> Tensor:
    """What an edit adds to rows.

    Args:
        h_TD (`torch.Tensor`): [T, D], the rows.
        edit (`Edit`): What is done to them.
        weights (`EditWeights`): With what, in the dtype to compute in.
        unused_TQ (`torch.BoolTensor`, *optional*): The directions in which a row is not edited.
        spare_T1 (`torch.BoolTensor`, *optional*): The places that hold no row. All their directions are unused.

    Returns:
        `torch.Tensor`: [T, D], in the dtype of the rows.
    """
    if torch.is_autocast_enabled(h_TD.device.type):
        with torch.autocast(h_TD.device.type, enabled=False):  # in the dtype of the weights
            return delta(h_TD, edit, weights, unused_TQ, spare_T1)
    wide_TD = h_TD.to(weights.R_QD.dtype)
    c_TQ = coefficients(edit.intervention, wide_TD, weights, edit.act)
    if unused_TQ is not None:
        c_TQ = c_TQ.masked_fill(unused_TQ, 0.0)
    delta_TD = c_TQ.mm(weights.R_QD)
    if edit.dropout > 0:
        delta_TD = nn.functional.dropout(wide_TD + delta_TD, edit.dropout) - wide_TD
        if spare_T1 is not None:
            delta_TD = delta_TD.masked_fill(spare_T1, 0.0)
    return delta_TD.to(h_TD.dtype)
