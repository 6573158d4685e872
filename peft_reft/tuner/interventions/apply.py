"""The hot path of ReFT: an adapter's edit of one layer's hidden states, from top to bottom.

A ReftLayer calls `edit_state` in each forward. For each adapter it gathers the hidden states h of the selected tokens,
computes the coefficients c, and adds Rᵀc to h. Everything that does not depend on h is looked up before the first
layer runs (forward/plan.py), so a layer runs a few operations of torch. Their own backward is used wherever it can be:
a backward written in Python costs more time than it saves.

Dimensions: B rows of the batch, S tokens of a row, T tokens to edit, G groups of weights, R rank, Q = G · R directions
of all groups, P projections of h, D width of the hidden state.
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
from .formulas import Intervention, affine_form


@dataclass(frozen=True)
class Edit:
    """What an adapter does to the hidden state of each selected token of a layer.

    Args:
        intervention (`Intervention`): The formula.
        act (`Callable`, *optional*): The activation function of the source act(Wh + b). None: the identity.
        dropout (`float`): The probability with which an entry of the edited state is dropped.
        scale (`float`): The strength of the edit, a factor of what it adds to the state.
    """

    intervention: Intervention
    act: Callable[[Tensor], Tensor] | None = None
    dropout: float = 0.0
    scale: float = 1.0


class EditWeights(NamedTuple):
    """The weights of an edit as `coefficients` reads them, of one layer or, with a dimension in front, of several.

    The groups lie side by side, so that the tokens of all groups are edited by the same few products. `delta` then
    masks the coefficients of the groups that a token does not belong to.

    Args:
        R_QD (`torch.Tensor`): [Q, D], the directions of all groups.
        projection_DP (`torch.Tensor`, *optional*): [D, P], the matrix that h is multiplied by: (W − R)ᵀ, Wᵀ or −Rᵀ
            with P = Q, or, where an activation function keeps Wh and Rh apart, Wᵀ and Rᵀ with P = 2Q. None for
            lobireft.
        bias_P (`torch.Tensor`, *optional*): [P].
    """

    R_QD: Tensor
    projection_DP: Tensor | None
    bias_P: Tensor | None

    @classmethod
    def of(cls, edit: Edit, R_GRD: Tensor, W_GRD: Tensor | None, b_GR: Tensor | None) -> EditWeights:
        """Compute them from parameters, in the dtype of these and with their gradient.

        Args:
            edit (`Edit`): The edit.
            R_GRD, W_GRD, b_GR (`torch.Tensor`): [G, R, D], [G, R, D] and [G, R], or each with a dimension of layers in
                front. None for W or b where the edit has none.
        """
        projection_GRD, bias_GR = (W_GRD, b_GR) if edit.act else affine_form(edit.intervention, R_GRD, W_GRD, b_GR)
        R_QD = R_GRD.flatten(-3, -2)
        projection_PD = None if projection_GRD is None else projection_GRD.flatten(-3, -2)
        bias_P = None if bias_GR is None else bias_GR.flatten(-2)
        if edit.act is not None and edit.intervention.replaces and projection_PD is not None:
            bias_P = None if bias_P is None else nn.functional.pad(bias_P, (0, projection_PD.shape[-2]))
            projection_PD = torch.cat([projection_PD, R_QD], dim=-2)
        return cls(R_QD, None if projection_PD is None else projection_PD.mT, bias_P)

    def to(self, dtype: torch.dtype) -> EditWeights:
        """The same weights in another dtype."""
        return EditWeights(*(None if t is None else t.to(dtype) for t in self))  # type: ignore[arg-type]

    def unbind(self) -> list[EditWeights]:
        """Split the weights of several layers into those of each."""
        return list(map(EditWeights, *(repeat(None) if t is None else t.unbind() for t in self)))


def edit_weights(edit: Edit, R_GRD: Tensor, W_GRD: Tensor | None, b_GR: Tensor | None) -> EditWeights:
    """`EditWeights.of`, with the gradient of an orthonormal R projected on the directions that keep it orthonormal."""
    if edit.intervention.orthonormal and torch.is_grad_enabled() and R_GRD.requires_grad:
        R_GRD = orthogonal.tangent(R_GRD)
    return EditWeights.of(edit, R_GRD, W_GRD, b_GR)


@dataclass(eq=False)
class Job:
    """One adapter's edit of one layer's output, in one forward.

    Args:
        layer_name (`str`): The layer, for messages.
        adapter_name (`str`): The adapter.
        edit (`Edit`): The edit of each token.
        selection (`Selection`, *optional*): The tokens to edit. None: all of them, in all directions.
        examples (`Callable`, *optional*): In a batch whose examples use different adapters, takes B and a device and
            returns the indices of the rows of the batch that use this adapter. None: all rows do.
        weights (`EditWeights`, *optional*): The weights, in the dtype of the parameters. None: the layer reads its
            parameters when it runs.
        in_bfloat16 (`Callable`, *optional*): Takes the name of the layer and returns the weights in bfloat16. None
            where their gradient is needed.
    """

    layer_name: str
    adapter_name: str
    edit: Edit
    selection: Selection | None
    examples: Callable[[int, torch.device], Tensor] | None
    weights: EditWeights | None
    in_bfloat16: Callable[[str], EditWeights] | None


Read = Callable[[str], tuple[Tensor, Tensor | None, Tensor | None]]  # an adapter's name -> its R, W and b


def edit_state(h: Tensor, jobs: Sequence[Job], read: Read, writable: bool) -> Tensor:
    """Edit the output of a layer by each of its adapters in turn.

    Args:
        h (`torch.Tensor`): [B, S, D] or [B · S, D]; any leading dimensions for jobs without a selection.
        jobs (`Sequence[Job]`): The edits, one for each adapter.
        read (`Callable`): Returns the parameters of the layer that runs, for jobs without weights.
        writable (`bool`): Whether h may be edited in place: its owner and autograd allow it.

    Returns:
        `torch.Tensor`: The edited state, in the shape and dtype of h; h itself where it was writable and contiguous.

    Raises:
        ValueError: when h does not hold one state for each token of the batch.
    """
    for job in jobs:
        weights, selection = job.weights, job.selection
        if weights is None or weights.R_QD.dtype is not h.dtype:
            weights = _weights(job, read, h.dtype)
        if selection is not None and h.shape[:-1] != selection.edited_BS.shape:
            _check_shape(h, job.layer_name, selection)
        if selection is None or selection.index_T is None:
            edited = _edit_all(h, job, weights, in_place=writable)
            writable, h = writable or edited is not h, edited
            continue
        if not (writable and h.is_contiguous()):
            writable, h = True, h.clone(memory_format=torch.contiguous_format)
        h_TD = h.view(-1, h.shape[-1]).index_select(0, selection.index_T)
        delta_TD = delta(h_TD, job.edit, weights, selection.unused_TGR, selection.empty_T1)
        # Add in place. A token that has two slots gets the sum of both.
        if h.is_cpu:
            indices = (selection.index_T,) if h.dim() == 2 else (selection.row_T, selection.column_T)
            h = h.index_put_(indices, delta_TD, accumulate=True)
        else:
            h = _add_on_device(h, selection.index_T, delta_TD)
    return h


def _weights(job: Job, read: Read, dtype: torch.dtype) -> EditWeights:
    """The weights for hidden states of a dtype. Where no gradient is needed, bfloat16 states are edited in bfloat16.
    float16 states are edited in the dtype of the weights: a projection of large states overflows float16."""
    if job.weights is None:
        return edit_weights(job.edit, *read(job.adapter_name))
    if dtype == torch.bfloat16 and job.in_bfloat16 is not None:
        return job.in_bfloat16(job.layer_name)
    return job.weights


def delta(
    h_TD: Tensor,
    edit: Edit,
    weights: EditWeights,
    unused_TGR: Tensor | None = None,
    empty_T1: Tensor | None = None,
) -> Tensor:
    """What an edit adds to hidden states: Rᵀc, times the scale of the edit.

    Args:
        h_TD (`torch.Tensor`): [T, D], the hidden states.
        edit (`Edit`): The edit.
        weights (`EditWeights`): Its weights, in the dtype to compute in.
        unused_TGR (`torch.BoolTensor`, *optional*): [T, G, R], [T, G, 1] or [T, 1, R], the directions in which a token
            is not edited.
        empty_T1 (`torch.BoolTensor`, *optional*): [T, 1], the slots that hold no token to edit. All their directions
            are unused; dropout would change their states without this mask.

    Returns:
        `torch.Tensor`: [T, D], in the dtype of `h_TD`.
    """
    device_type = "cpu" if h_TD.is_cpu else h_TD.device.type  # asking a tensor for its device costs more
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):  # compute in the dtype of the weights
            return delta(h_TD, edit, weights, unused_TGR, empty_T1)
    # `Tensor.to` takes a microsecond where there is nothing to convert, and a deep model runs this for each layer.
    dtype = weights.R_QD.dtype
    wide_TD = h_TD if h_TD.dtype is dtype else h_TD.to(dtype)
    c_TQ = coefficients(edit, wide_TD, weights)
    if unused_TGR is not None:
        tokens, directions = c_TQ.shape
        groups = unused_TGR.shape[1]
        c_TGR = c_TQ.view(tokens, groups, directions // groups)  # no -1: there may be no token
        c_TQ = c_TGR.masked_fill(unused_TGR, 0.0).view(tokens, directions)
    delta_TD = c_TQ.mm(weights.R_QD)
    if edit.dropout > 0:
        delta_TD = nn.functional.dropout(wide_TD + delta_TD, edit.dropout) - wide_TD
        if empty_T1 is not None:
            delta_TD = delta_TD.masked_fill(empty_T1, 0.0)
    if edit.scale != 1.0:
        delta_TD = delta_TD * edit.scale
    return delta_TD if h_TD.dtype is dtype else delta_TD.to(h_TD.dtype)


def coefficients(edit: Edit, h_TD: Tensor, weights: EditWeights) -> Tensor:
    """c in h + Rᵀc, for each token and the directions of all groups. For LoReFT c = Wh + b − Rh, which makes the edit

        h + Rᵀ(Wh + b − Rh)    (arXiv 2404.03592, section 3.2)

    formulas.py has c of each of the six edits.

    Args:
        edit (`Edit`): The edit.
        h_TD (`torch.Tensor`): [T, D], the hidden states to edit, in the dtype of the weights.
        weights (`EditWeights`): The weights of the edit.

    Returns:
        `torch.Tensor`: [T, Q], in the dtype of the weights.
    """
    if weights.projection_DP is None:
        assert weights.bias_P is not None
        return weights.bias_P.expand(h_TD.shape[0], -1)
    projected_TP = h_TD.mm(weights.projection_DP)
    if weights.bias_P is not None:
        projected_TP.add_(weights.bias_P)  # faster on a CPU than addmm, forward and backward
    if edit.act is None:
        return projected_TP
    if not edit.intervention.replaces:
        return edit.act(projected_TP)
    directions = weights.R_QD.shape[0]
    return edit.act(projected_TP[:, :directions]) - projected_TP[:, directions:]


def _add_on_device(h: Tensor, index_T: Tensor, delta_TD: Tensor) -> Tensor:
    """Add to the hidden states of the selected tokens, in place, on a device that is no CPU. There `index_put_` would
    sort the indices, and wait for the device to check them."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _AddToStates.apply(h, index_T, delta_TD)
    h.view(-1, h.shape[-1]).index_add_(0, index_T, delta_TD)
    return h


class _AddToStates(torch.autograd.Function):
    """`index_add_` to h with its leading dimensions flattened. To autograd that is a write to a view, whose backward
    copies the gradient of the whole hidden state; this backward passes the gradient on without a copy."""

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
    """Edit all tokens of h [..., D], or, where `job.examples` is given, all tokens of those rows of the batch."""
    unused = (
        None if job.selection is None or job.selection.unused_TGR is None else job.selection.unused_TGR.to(h.device)
    )
    if job.examples is None:
        # Backward needs the states of before the edit.
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
    """
    Raises:
        ValueError: when h does not hold one state for each token of the batch.
    """
    rows, width = selection.edited_BS.shape
    if h.shape[:-1] not in ((rows, width), (rows * width,)):
        raise ValueError(
            f"{layer_name!r} returns shape {list(h.shape)}, which does not hold one state for each of the batch's "
            f"{rows} x {width} tokens. Choose in target_modules a module that works token by token, or set "
            "positions='all'."
        )
