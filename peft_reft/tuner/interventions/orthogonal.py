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
from collections.abc import Iterable, Iterator, Sequence
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
    for same, R_NRD in _alike(bases):
        for index, part in zip(same, _orthonormal_rows(R_NRD).split([bases[index].shape[0] for index in same])):
            results[index] = part
    return results


@torch.no_grad()
def not_orthonormal(bases: Sequence[Tensor]) -> list[int]:
    """Which bases `retracted` would change: their indices. A GPU is waited for, once for each shape.

    Args:
        bases (`Sequence[torch.Tensor]`): Of shape [G, r, D] with r <= D, of any floating dtype.
    """
    found = []
    for same, R_NRD in _alike(bases):
        kept_N = _is_orthonormal(_gram(wide(R_NRD)), R_NRD.dtype)
        parts = kept_N.cpu().split([bases[index].shape[0] for index in same])
        found += [index for index, part in zip(same, parts) if not part.all()]
    return sorted(found)


@torch.no_grad()
def nearest(R_GRD: Tensor) -> Tensor:
    """The matrices with orthonormal rows that are nearest to the given ones, in the dtype and on the device of those.

    They are the polar factors UVᵀ of R = UΣVᵀ, nearest in every norm that rotations leave alone (Fan and Hoffman 1955). No row is
    preferred, as by Gram and Schmidt's procedure: of a mean of bases, each row moves as little as the others do.

    Args:
        R_GRD (`torch.Tensor`): [G, r, D] with r <= D, finite, of any floating dtype.
    """
    U_GRR, _, Vh_GRD = torch.linalg.svd(wide(R_GRD), full_matrices=False)
    return (U_GRR @ Vh_GRD).to(R_GRD.device, R_GRD.dtype)


def _alike(bases: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """The indices of bases of one kind, and their matrices in one batch."""
    by_kind: dict[tuple, list[int]] = defaultdict(list)
    for index, basis in enumerate(bases):
        by_kind[basis.shape[1:], basis.dtype, basis.device].append(index)
    for same in by_kind.values():
        yield same, torch.cat([bases[index] for index in same])


def wide(R_NRD: Tensor) -> Tensor:
    """A copy in double precision, which MPS does not have."""
    return R_NRD.to("cpu" if R_NRD.device.type == "mps" else R_NRD.device, torch.float64, copy=True)


def _gram(R_NRD: Tensor) -> Tensor:
    return R_NRD.bmm(R_NRD.mT)


def _is_orthonormal(gram_NRR: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether rows with these inner products are orthonormal [N], up to the rounding of their dtype, and to that of the
    single-precision factorization with which they may have been made."""
    rounding = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    eye_RR = torch.eye(gram_NRR.shape[-1], dtype=gram_NRR.dtype, device=gram_NRR.device)
    return (gram_NRR - eye_RR).abs().amax(dim=(-2, -1)) <= rounding


# Rows that depend on each other up to this are pushed apart: below what training makes of them, and so far above what double
# precision rounds away that one factorization is exact enough.
INDEPENDENT = 1e-4


def _orthonormal_rows(R_NRD: Tensor) -> Tensor:
    """L⁻¹R, with Cholesky's L of R Rᵀ, in double precision.

    Householder's reflections need no such precision, but they are many small steps for each matrix, which a GPU takes one after
    another. This way is as robust: a little of the first r unit vectors is added to rows that are not linearly independent.
    """
    wide_NRD = wide(R_NRD)
    gram_NRR = _gram(wide_NRD)
    eye_RR = torch.eye(gram_NRR.shape[-1], dtype=gram_NRR.dtype, device=gram_NRR.device)
    kept_N = _is_orthonormal(gram_NRR, R_NRD.dtype)

    lower_NRR, failed_N = torch.linalg.cholesky_ex(gram_NRR)
    size_N = gram_NRR.amax(dim=(-2, -1)).sqrt()
    independent_N = (failed_N == 0) & (lower_NRR.diagonal(dim1=-2, dim2=-1).amin(dim=-1) > INDEPENDENT * size_N)
    if not independent_N.is_cpu or not bool(independent_N.all()):  # to ask a GPU would be to wait for it
        nudge_N = torch.where(size_N > 0, INDEPENDENT * size_N, 1.0).masked_fill(independent_N, 0.0)
        wide_NRD[..., : eye_RR.shape[0]] += nudge_N[:, None, None] * eye_RR
        lower_NRR, _ = torch.linalg.cholesky_ex(_gram(wide_NRD))
    wide_NRD = torch.linalg.solve_triangular(lower_NRR, wide_NRD, upper=False)
    if R_NRD.dtype == torch.float64:  # once is as exact as single precision can tell
        lower_NRR, _ = torch.linalg.cholesky_ex(_gram(wide_NRD))
        wide_NRD = torch.linalg.solve_triangular(lower_NRR, wide_NRD, upper=False)
    return torch.where(kept_N.to(R_NRD.device)[:, None, None], R_NRD, wide_NRD.to(R_NRD.device, R_NRD.dtype))
