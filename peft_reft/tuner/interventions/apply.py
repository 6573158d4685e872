"""The hot path of ReFT: an adapter's edit of one layer's hidden states, from top to bottom.

`edit_state` is what a ReftLayer calls in each forward. For each adapter it gathers the selected rows h, computes the coefficients c,
and adds Rᵀc back. Everything that does not depend on h has been looked up before the first layer runs (forward/plan.py), so a layer is
a short row of torch's own operations: Python functions in backward would cost more than they save.

Dimensions: B rows of the batch, S tokens of a row, T tokens to edit, G groups of weights, R rank, Q = G · R directions of all groups,
P projections, D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..positions.selection import Selection
from . import orthogonal
from .formulas import Intervention, affine_source


@dataclass(frozen=True)
class Edit:
    """What an adapter does to each selected row of a layer.

    Args:
        intervention (`Intervention`): The formula.
        act: Activation function of its source, None for the identity.
        dropout (`float`): The part of an edited state that is dropped.
    """

    intervention: Intervention
    act: Callable[[Tensor], Tensor] | None = None
    dropout: float = 0.0


class EditWeights(NamedTuple):
    """The weights of an edit as `coefficients` reads them, of one layer or, with a dimension in front, of several.

    The groups stand side by side, so that the tokens of all groups are edited by the same few products. `delta` then masks the
    coefficients of the groups that a token does not belong to.

    Args:
        R_QD (`torch.Tensor`): [Q, D], the directions of all groups.
        source_DP (`torch.Tensor`, *optional*): [D, P], all that h is projected on: P is Q, or 2Q where an activation function keeps
            Wh and Rh apart.
        bias_P (`torch.Tensor`, *optional*): [P].
    """

    R_QD: Tensor
    source_DP: Tensor | None
    bias_P: Tensor | None

    @classmethod
    def of(cls, edit: Edit, R_GRD: Tensor, W_GRD: Tensor | None, b_GR: Tensor | None) -> EditWeights:
        """The weights of an edit with these parameters, in their dtype, as a part of their graph.

        Args:
            edit (`Edit`): The edit.
            R_GRD, W_GRD, b_GR (`torch.Tensor`): Its parameters; None for those that the edit does not have.
        """
        source_GRD, bias_GR = (W_GRD, b_GR) if edit.act else affine_source(edit.intervention, R_GRD, W_GRD, b_GR)
        R_QD = R_GRD.flatten(-3, -2)
        source_PD = None if source_GRD is None else source_GRD.flatten(-3, -2)
        bias_P = None if bias_GR is None else bias_GR.flatten(-2)
        if edit.act is not None and edit.intervention.replaces and source_PD is not None:
            bias_P = None if bias_P is None else nn.functional.pad(bias_P, (0, source_PD.shape[-2]))
            source_PD = torch.cat([source_PD, R_QD], dim=-2)
        return cls(R_QD, None if source_PD is None else source_PD.mT, bias_P)

    def to(self, dtype: torch.dtype) -> EditWeights:
        """The same in another dtype."""
        return EditWeights(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]

    def unbind(self) -> list[EditWeights]:
        """Those of each of several layers."""
        return list(map(EditWeights, *(repeat(None) if t is None else t.unbind() for t in self)))


def edit_weights(edit: Edit, R_GRD: Tensor, W_GRD: Tensor | None, b_GR: Tensor | None) -> EditWeights:
    """`EditWeights.of`, with the gradient of an orthonormal R projected on the directions that keep its rows orthonormal."""
    if edit.intervention.orthonormal and torch.is_grad_enabled() and R_GRD.requires_grad:
        R_GRD = orthogonal.tangent(R_GRD)
    return EditWeights.of(edit, R_GRD, W_GRD, b_GR)


@dataclass(eq=False)
class Job:
    """One adapter's edit of one layer's output, in one forward.

    Args:
        layer_name (`str`): The layer, for messages.
        adapter_name (`str`): The adapter.
        edit (`Edit`): What is done to each row.
        selection (`Selection`, *optional*): Which rows. None: all of them, in all directions.
        examples (`Callable`, *optional*): In a mixed batch, gives the indices of the rows of h [B, ..., D] that belong to the adapter's
            examples, for B and a device. None: all.
        weights (`EditWeights`, *optional*): With what, in the dtype of the parameters. None: the layer reads its parameters when it runs.
        in_bfloat16 (`Callable`, *optional*): Gives the same in bfloat16, where no gradient of them is needed.
    """

    layer_name: str
    adapter_name: str
    edit: Edit
    selection: Selection | None
    examples: Callable[[int, torch.device], Tensor] | None
    weights: EditWeights | None
    in_bfloat16: Callable[[], EditWeights] | None


Read = Callable[[str], tuple[Tensor, Tensor | None, Tensor | None]]  # R, W and b of an adapter, by its name


def edit_state(h: Tensor, jobs: Sequence[Job], read: Read, writable: bool) -> Tensor:
    """Edit the output of a layer by each of its adapters in turn.

    Args:
        h (`torch.Tensor`): [B, S, D] or [B · S, D]; any leading dimensions for jobs without a selection.
        jobs (`Sequence[Job]`): What to do.
        read (`Callable`): Gives the parameters of the layer that runs, which may be a copy of the one that was planned for.
        writable (`bool`): Whether h may be edited in place: its owner and autograd allow it.

    Returns:
        `torch.Tensor`: The edited state, h itself where it was writable and contiguous.

    Raises:
        ValueError: when h does not hold one state for each token of the batch.
    """
    for job in jobs:
        weights = _weights(job, read, h.dtype)
        selection = job.selection
        if selection is not None and h.shape[:-1] != selection.edited_BS.shape:
            _check_shape(h, job.layer_name, selection)
        if selection is None or selection.index_T is None:
            edited = _edit_all(h, job, weights, in_place=writable)
            writable, h = writable or edited is not h, edited
            continue
        if not (writable and h.is_contiguous()):
            writable, h = True, h.clone(memory_format=torch.contiguous_format)
        h_TD = h.view(-1, h.shape[-1]).index_select(0, selection.index_T)
        h = _add_to_rows(h, selection, delta(h_TD, job.edit, weights, selection.unused_TGR, selection.empty_T1))
    return h


def _weights(job: Job, read: Read, dtype: torch.dtype) -> EditWeights:
    """Those to edit states of some dtype with: without a graph, bfloat16 states are edited in bfloat16. float16 has no room for what a
    projection of large states may come to, and is edited in the dtype of the weights."""
    if job.weights is None:
        return edit_weights(job.edit, *read(job.adapter_name))
    return job.in_bfloat16() if dtype == torch.bfloat16 and job.in_bfloat16 is not None else job.weights


def delta(
    h_TD: Tensor,
    edit: Edit,
    weights: EditWeights,
    unused_TGR: Tensor | None = None,
    empty_T1: Tensor | None = None,
) -> Tensor:
    """What an edit adds to rows: Rᵀc.

    Args:
        h_TD (`torch.Tensor`): [T, D], the rows.
        edit (`Edit`): What is done to them.
        weights (`EditWeights`): With what, in the dtype to compute in.
        unused_TGR (`torch.BoolTensor`, *optional*): [T, G, R], [T, G, 1] or [T, 1, R], the directions in which a row is not edited.
        empty_T1 (`torch.BoolTensor`, *optional*): [T, 1], the slots that hold no row. All their directions are unused.

    Returns:
        `torch.Tensor`: [T, D], in the dtype of the rows.
    """
    if torch.is_autocast_enabled(h_TD.device.type):
        with torch.autocast(h_TD.device.type, enabled=False):  # in the dtype of the weights
            return delta(h_TD, edit, weights, unused_TGR, empty_T1)
    wide_TD = h_TD.to(weights.R_QD.dtype)
    c_TQ = coefficients(edit, wide_TD, weights)
    if unused_TGR is not None:
        directions = c_TQ.shape[1]
        c_TGR = c_TQ.view(len(c_TQ), unused_TGR.shape[1], -1)
        c_TQ = c_TGR.masked_fill(unused_TGR, 0.0).view(-1, directions)
    delta_TD = c_TQ.mm(weights.R_QD)
    if edit.dropout > 0:
        delta_TD = nn.functional.dropout(wide_TD + delta_TD, edit.dropout) - wide_TD
        if empty_T1 is not None:
            delta_TD = delta_TD.masked_fill(empty_T1, 0.0)
    return delta_TD.to(h_TD.dtype)


def coefficients(edit: Edit, h_TD: Tensor, weights: EditWeights) -> Tensor:
    """c in h + Rᵀc, for each row and the directions of all groups. For LoReFT it is Wh + b − Rh, which makes the edit
    h + Rᵀ(Wh + b − Rh), arXiv 2404.03592, equation 1; formulas.py has c of each of the six.

    Args:
        edit (`Edit`): The edit.
        h_TD (`torch.Tensor`): [T, D], the hidden states to edit, in the dtype of the weights.
        weights (`EditWeights`): The weights of the edit.

    Returns:
        `torch.Tensor`: [T, Q], in the dtype of the weights.
    """
    if weights.source_DP is None:
        assert weights.bias_P is not None
        return weights.bias_P.expand(h_TD.shape[0], -1)
    projected_TP = h_TD.mm(weights.source_DP)
    if weights.bias_P is not None:
        projected_TP.add_(weights.bias_P)  # quicker on a CPU than addmm, forward and backward
    if edit.act is None:
        return projected_TP
    if not edit.intervention.replaces:
        return edit.act(projected_TP)
    directions = weights.R_QD.shape[0]
    return edit.act(projected_TP[:, :directions]) - projected_TP[:, directions:]


def _add_to_rows(h: Tensor, selection: Selection, delta_TD: Tensor) -> Tensor:
    """Add to the selected rows of h, in place. A row that is listed twice gets both."""
    index_T, row_T, column_T = selection.index_T, selection.row_T, selection.column_T
    assert index_T is not None and row_T is not None and column_T is not None
    if h.is_cpu:
        # The quickest here. On a GPU index_put_ sorts the indices, and waits for the device to check them.
        slots = (index_T,) if h.dim() == 2 else (row_T, column_T)
        return h.index_put_(slots, delta_TD, accumulate=True)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _AddToRows.apply(h, index_T, delta_TD)
    h.view(-1, h.shape[-1]).index_add_(0, index_T, delta_TD)
    return h


class _AddToRows(torch.autograd.Function):
    """`index_add_` over the leading dimensions of h. Autograd would see a write to a view there, and copy the gradient of the
    whole state to let it through; here the gradient passes as it is."""

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


def _edit_all(h: Tensor, job: Job, weights: EditWeights, in_place: bool) -> Tensor:
    """Edit every row of h [..., D], or, in a mixed batch, of the examples that use the adapter."""
    unused = (
        None if job.selection is None or job.selection.unused_TGR is None else job.selection.unused_TGR.to(h.device)
    )
    if job.examples is None:
        # Backward reads the states as they were before the edit.
        before = h.clone() if in_place and torch.is_grad_enabled() else h
        added = delta(before.reshape(-1, h.shape[-1]), job.edit, weights, unused).view(h.shape)
        return h.add_(added) if in_place else h + added
    rows = job.examples(h.shape[0], h.device)
    if unused is not None:
        unused = unused.view(*h.shape[:-1], *unused.shape[1:])[rows].flatten(0, -3)
    h_own = h[rows]
    added = delta(h_own.reshape(-1, h.shape[-1]), job.edit, weights, unused).view(h_own.shape)
    return h.index_add_(0, rows, added) if in_place else h.index_add(0, rows, added)


def _check_shape(h: Tensor, layer_name: str, selection: Selection) -> None:
    rows, width = selection.edited_BS.shape
    if h.shape[:-1] not in ((rows, width), (rows * width,)):
        raise ValueError(
            f"{layer_name!r} returns shape {list(h.shape)}, which does not hold one state for each of the batch's "
            f"{rows} x {width} tokens. Choose in target_modules a module that works token by token, or set "
            "positions='all'."
        )
