"""Orthonormal bases that stay orthonormal while an ordinary optimizer trains them.

This module knows matrices with orthonormal rows and nothing of layers or models.

The parameter itself is the basis: what is in memory, and so what is saved, has orthonormal rows. An optimizer step
leaves the manifold of such matrices; `retract` brings the parameters of all layers back, in a few batched operations,
before the next forward. In backward, `tangent` lets through only the part of a gradient that the manifold allows.

pyreft keeps an unconstrained parameter and forms a product of Householder reflections for each access to R. Keeping the
basis itself costs two small products a layer, needs no library to read a saved file, and resumes exactly.

Dimensions: G groups of weights, R rank, D width of the hidden state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Tangent(torch.autograd.Function):
    """R, with the gradient projected on the tangent space of the manifold of matrices with orthonormal rows."""

    @staticmethod
    def forward(R_GRD: Tensor) -> Tensor:
        return R_GRD.view_as(R_GRD)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient_GRD: Tensor) -> Tensor:
        (R_GRD,) = ctx.saved_tensors
        product_GRR = gradient_GRD @ R_GRD.mT
        return gradient_GRD - 0.5 * (product_GRR + product_GRR.mT) @ R_GRD


def tangent(R_GRD: Tensor) -> Tensor:
    """R itself, with its gradient projected on the directions that keep the rows orthonormal.

    The gradient is that of the polar factor of R at orthonormal rows: for a gradient E it is E − sym(E Rᵀ)R (Edelman,
    Arias and Smith 1998, section 2.2). The value is R to the bit, so that training and inference see the same edit.

    Args:
        R_GRD (`torch.Tensor`): [G, r, D] with orthonormal rows.
    """
    return _Tangent.apply(R_GRD)


@torch.no_grad()
def retract(bases: Iterable[Tensor]) -> None:
    """Orthonormalize the rows of every basis in place, as `retracted` does.

    Args:
        bases (`Iterable[torch.Tensor]`): Of shape [G, r, D] with r <= D, of any floating dtype.
    """
    bases = list(bases)
    if bases:
        torch._foreach_copy_(bases, retracted(bases))


@torch.no_grad()
def retracted(bases: Sequence[Tensor]) -> list[Tensor]:
    """Every basis with its rows orthonormalized, in a few operations for each shape, none of which waits for the device.

    The rows become those of Q in R = LQ, with a lower triangular L of positive diagonal: what Gram and Schmidt's procedure gives. A
    basis whose rows are orthonormal already, up to rounding, stays as it is, to the bit: so it does not matter by which way a
    saved basis comes into a model, and retracting twice is retracting once.

    Args:
        bases (`Sequence[torch.Tensor]`): Of shape [G, r, D] with r <= D, of any floating dtype.
    """
    results = list(bases)
    by_kind: dict[tuple, list[int]] = defaultdict(list)
    for index, basis in enumerate(bases):
        by_kind[basis.shape[1:], basis.dtype, basis.device].append(index)
    for same in by_kind.values():
        orthonormal_NRD = _orthonormal_rows(torch.cat([bases[index] for index in same]))
        for index, part in zip(same, orthonormal_NRD.split([bases[index].shape[0] for index in same])):
            results[index] = part
    return results


# Rows that depend on each other up to this are pushed apart: below what training makes of them, and so far above what double
# precision rounds away that one factorization is exact enough.
INDEPENDENT = 1e-4


def _orthonormal_rows(R_NRD: Tensor) -> Tensor:
    """L⁻¹R, with Cholesky's L of R Rᵀ, in double precision.

    Householder's reflections need no such precision, but they are many small steps for each matrix, which a GPU takes one after
    another. This way is as robust: a little of the first r unit vectors is added to rows that are not linearly independent.
    """
    wide_NRD = R_NRD.to("cpu" if R_NRD.device.type == "mps" else R_NRD.device, torch.float64, copy=True)
    gram_NRR = wide_NRD.bmm(wide_NRD.mT)
    eye_RR = torch.eye(gram_NRR.shape[-1], dtype=gram_NRR.dtype, device=gram_NRR.device)
    # Of what is orthonormal, the inner products are off by its rounding to the dtype of the parameter, and by that of the
    # single-precision factorization with which it may have been made.
    rounding = 2 * torch.finfo(R_NRD.dtype).eps
    rounding += 32 * torch.finfo(torch.promote_types(R_NRD.dtype, torch.float32)).eps
    kept_N11 = (gram_NRR - eye_RR).abs().amax(dim=(-2, -1), keepdim=True) <= rounding

    lower_NRR, failed_N = torch.linalg.cholesky_ex(gram_NRR)
    size_N = gram_NRR.amax(dim=(-2, -1)).sqrt()
    independent_N = (failed_N == 0) & (lower_NRR.diagonal(dim1=-2, dim2=-1).amin(dim=-1) > INDEPENDENT * size_N)
    if not independent_N.is_cpu or not bool(independent_N.all()):  # to ask a GPU would be to wait for it
        nudge_N = torch.where(size_N > 0, INDEPENDENT * size_N, 1.0).masked_fill(independent_N, 0.0)
        wide_NRD[..., : eye_RR.shape[0]] += nudge_N[:, None, None] * eye_RR
        lower_NRR, _ = torch.linalg.cholesky_ex(wide_NRD.bmm(wide_NRD.mT))
    wide_NRD = torch.linalg.solve_triangular(lower_NRR, wide_NRD, upper=False)
    if R_NRD.dtype == torch.float64:  # once is as exact as single precision can tell
        lower_NRR, _ = torch.linalg.cholesky_ex(wide_NRD.bmm(wide_NRD.mT))
        wide_NRD = torch.linalg.solve_triangular(lower_NRR, wide_NRD, upper=False)
    return torch.where(kept_N11, R_NRD, wide_NRD.to(R_NRD.device, R_NRD.dtype))
