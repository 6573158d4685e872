"""Matrices R whose rows stay orthonormal while an ordinary optimizer trains them.

This module knows matrices with orthonormal rows and nothing of layers or models.

The parameter holds R itself, so R is orthonormal in memory and in saved files. An optimizer step leaves the manifold
of such matrices; `retract` brings the parameters of all layers back to it, in a few batched operations, before the
next forward. In backward, `tangent` projects the gradient of R on the tangent space of the manifold.

pyreft trains an unconstrained parameter, and computes R as a product of Householder reflections whenever it is read.
Training R itself costs two small products a layer in backward; a saved file is read without a library, and training
resumes exactly.

Dimensions: G groups of weights, R rank (r in formulas), D width of the hidden state, N matrices of one kind in a
batch.
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

    A gradient E becomes E − sym(E Rᵀ)R (Edelman, Arias and Smith 1998, section 2.2), which is the gradient through the
    polar factor of R where the rows of R are orthonormal. The value is R to the bit, so that training and inference
    compute the same edit.

    Args:
        R_GRD (`torch.Tensor`): [G, R, D] with orthonormal rows, of any floating dtype.
    """
    return _Tangent.apply(R_GRD)


@torch.no_grad()
def retract(matrices: Iterable[Tensor]) -> None:
    """Orthonormalize the rows of matrices in place, as `retracted` does.

    Args:
        matrices (`Iterable[torch.Tensor]`): [G, R, D] each with R <= D, of any floating dtype.
    """
    matrices = list(matrices)
    if matrices:
        torch._foreach_copy_(matrices, retracted(matrices))


@torch.no_grad()
def retracted(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Copies of matrices with orthonormal rows.

    The matrices of each kind take a few operations together, none of which waits for a GPU.

    The rows become those of the orthonormal factor in R = LQ, with a lower triangular L of positive diagonal, as by
    Gram and Schmidt's procedure. Rows that are orthonormal already, up to rounding, stay as they are to the bit: so
    the edit does not depend on how a saved R is loaded, and a second retraction changes nothing.

    Args:
        matrices (`Sequence[torch.Tensor]`): [G, R, D] each with R <= D, of any floating dtype.

    Returns:
        `list[torch.Tensor]`: In the order, shapes, dtypes and devices of `matrices`.
    """
    results = list(matrices)
    for same, R_NRD in _alike(matrices):
        for index, part in zip(same, _orthonormal_rows(R_NRD).split([matrices[index].shape[0] for index in same])):
            results[index] = part
    return results


@torch.no_grad()
def not_orthonormal(matrices: Sequence[Tensor]) -> list[int]:
    """The indices of the matrices that `retracted` would change. A GPU is waited for, once for each kind of matrix.

    Args:
        matrices (`Sequence[torch.Tensor]`): [G, R, D] each with R <= D, of any floating dtype.
    """
    found = []
    for same, R_NRD in _alike(matrices):
        orthonormal_N = _is_orthonormal(_gram(wide(R_NRD)), R_NRD.dtype)
        parts = orthonormal_N.cpu().split([matrices[index].shape[0] for index in same])
        found += [index for index, part in zip(same, parts) if not part.all()]
    return sorted(found)


@torch.no_grad()
def nearest(R_GRD: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows.

    They are the polar factors UVᵀ of R = UΣVᵀ, nearest in every unitarily invariant norm (Fan and Hoffman 1955). Gram
    and Schmidt's procedure would keep the first row and move the last one most; this treats all rows alike, as the
    mean of several R needs it.

    Args:
        R_GRD (`torch.Tensor`): [G, R, D] with R <= D, finite, of any floating dtype.

    Returns:
        `torch.Tensor`: [G, R, D], in the dtype and on the device of `R_GRD`.
    """
    U_GRR, _, Vh_GRD = torch.linalg.svd(wide(R_GRD), full_matrices=False)
    return (U_GRR @ Vh_GRD).to(R_GRD.device, R_GRD.dtype)


def _alike(matrices: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Group matrices by kind (shape, dtype and device): the indices of each kind, and its matrices in one batch."""
    by_kind: dict[tuple, list[int]] = defaultdict(list)
    for index, R_GRD in enumerate(matrices):
        by_kind[R_GRD.shape[1:], R_GRD.dtype, R_GRD.device].append(index)
    for same in by_kind.values():
        yield same, torch.cat([matrices[index] for index in same])


def wide(R_NRD: Tensor) -> Tensor:
    """A copy in double precision. On the CPU for MPS, which has no double precision."""
    return R_NRD.to("cpu" if R_NRD.device.type == "mps" else R_NRD.device, torch.float64, copy=True)


def _gram(R_NRD: Tensor) -> Tensor:
    """R Rᵀ, the inner products of the rows."""
    return R_NRD.bmm(R_NRD.mT)


def _is_orthonormal(gram_NRR: Tensor, dtype: torch.dtype) -> Tensor:
    """Whether rows with these inner products are orthonormal, bool [N], up to the rounding of their dtype and of a
    factorization in single precision that may have made them."""
    rounding = 2 * torch.finfo(dtype).eps + 32 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    eye_RR = torch.eye(gram_NRR.shape[-1], dtype=gram_NRR.dtype, device=gram_NRR.device)
    return (gram_NRR - eye_RR).abs().amax(dim=(-2, -1)) <= rounding


# A row is taken for linearly dependent on the rows before it where its part orthogonal to them is shorter than this
# times the longest row. Training does not get there, and above it one factorization in double
# precision is exact enough.
INDEPENDENT = 1e-4


def _orthonormal_rows(R_NRD: Tensor) -> Tensor:
    """L⁻¹R, with the Cholesky factor L of R Rᵀ, in double precision.

    Householder reflections would do in single precision, but they are many small steps for each matrix, which a GPU
    takes one after another. To be as robust, small multiples of the first r unit vectors are added to rows that are
    not linearly independent.
    """
    wide_NRD = wide(R_NRD)
    gram_NRR = _gram(wide_NRD)
    eye_RR = torch.eye(gram_NRR.shape[-1], dtype=gram_NRR.dtype, device=gram_NRR.device)
    orthonormal_N = _is_orthonormal(gram_NRR, R_NRD.dtype)

    lower_NRR, failed_N = torch.linalg.cholesky_ex(gram_NRR)
    size_N = gram_NRR.amax(dim=(-2, -1)).sqrt()
    independent_N = (failed_N == 0) & (lower_NRR.diagonal(dim1=-2, dim2=-1).amin(dim=-1) > INDEPENDENT * size_N)
    if not independent_N.is_cpu or not bool(independent_N.all()):  # to read this from a GPU is to wait
        nudge_N = torch.where(size_N > 0, INDEPENDENT * size_N, 1.0).masked_fill(independent_N, 0.0)
        wide_NRD[..., : eye_RR.shape[0]] += nudge_N[:, None, None] * eye_RR
        lower_NRR, _ = torch.linalg.cholesky_ex(_gram(wide_NRD))
    wide_NRD = torch.linalg.solve_triangular(lower_NRR, wide_NRD, upper=False)
    if R_NRD.dtype == torch.float64:  # one factorization is exact to single precision only
        lower_NRR, _ = torch.linalg.cholesky_ex(_gram(wide_NRD))
        wide_NRD = torch.linalg.solve_triangular(lower_NRR, wide_NRD, upper=False)
    return torch.where(orthonormal_N.to(R_NRD.device)[:, None, None], R_NRD, wide_NRD.to(R_NRD.device, R_NRD.dtype))
