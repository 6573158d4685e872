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
    for basis, value in zip(bases, retracted(bases)):
        basis.copy_(value)


@torch.no_grad()
def retracted(bases: Sequence[Tensor]) -> list[Tensor]:
    """Every basis with its rows orthonormalized, by one QR factorization for each shape.

    Robust for any parameter, a rank-deficient one included: Householder QR always gives orthonormal rows. A basis
    whose rows are orthonormal already, up to rounding, stays as it is, to the bit: so it does not matter by which way a
    saved basis comes into a model, and retracting twice is retracting once.

    Args:
        bases (`Sequence[torch.Tensor]`): Of shape [G, r, D] with r <= D, of any floating dtype.
    """
    results = list(bases)
    by_kind: dict[tuple, list[int]] = defaultdict(list)
    for index, basis in enumerate(bases):
        by_kind[(basis.shape[-2:], basis.dtype, basis.device)].append(index)
    for same in by_kind.values():
        stacked = torch.cat([bases[index].reshape(-1, *bases[index].shape[-2:]) for index in same])
        # QR exists in single and double precision only.
        wide = stacked if stacked.dtype == torch.float64 else stacked.float()
        q, upper = torch.linalg.qr(wide.mT)
        # Choose signs so that the map is continuous, and leaves orthonormal rows alone.
        diagonal = upper.diagonal(dim1=-2, dim2=-1)
        q = q * torch.where(diagonal < 0, -1.0, 1.0)[..., None, :]
        # Of what QR gives, the inner products are off by its own rounding and by that to the dtype of the parameter.
        rounding = 32 * torch.finfo(wide.dtype).eps + 2 * torch.finfo(stacked.dtype).eps
        off = (wide @ wide.mT - torch.eye(wide.shape[-2], dtype=wide.dtype, device=wide.device)).abs()
        kept = off.amax(dim=(-2, -1), keepdim=True) <= rounding
        parts = torch.where(kept, stacked, q.mT.to(stacked.dtype)).split([bases[index].shape[0] for index in same])
        for index, part in zip(same, parts):
            results[index] = part
    return results
