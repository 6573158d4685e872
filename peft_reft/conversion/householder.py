"""R <-> the two tensors that torch's orthogonal parametrization saves of R.

pyreft and adapters keep R orthonormal by `torch.nn.utils.parametrizations.orthogonal`. A checkpoint then holds a free
parameter X (`original`, [D, r]) and a fixed orthogonal matrix B (`base`, [D, D]), and R is a function of both:

    D > r:  Q = H_1 ... H_r [:, :r] diag(s),  H_i = I − 2 a_i a_iᵀ / a_iᵀa_i,  Rᵀ = B Q
            a_i: the i-th column of X below the diagonal, with 1 on the diagonal and 0 above it
            s: the diagonal of X, truncated to whole numbers
    D = r:  Rᵀ = B exp(L − Lᵀ), L the lower triangle of X

The first is torch's map "householder", the second its "matrix_exp": its defaults for these shapes.

Dimensions: R rank, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def basis_of(original_DR: Tensor, base_DD: Tensor) -> Tensor:
    """R from X and B.

    Args:
        original_DR (`torch.Tensor`): X, [D, r] with r <= D.
        base_DD (`torch.Tensor`): B, [D, D].

    Returns:
        `torch.Tensor`: R, [r, D], computed in float64, in the dtype of X.
    """
    width, rank = original_DR.shape
    dtype, original_DR, base_DD = original_DR.dtype, original_DR.double(), base_DD.double()
    if width == rank:
        lower = original_DR.tril()
        return (base_DD @ torch.matrix_exp(lower - lower.mT)).mT.to(dtype).contiguous()
    below = original_DR.tril(-1)
    factors = 2.0 / (1.0 + below.square().sum(dim=0))
    signs = original_DR.diagonal().trunc()
    return (base_DD @ (torch.linalg.householder_product(below, factors) * signs)).mT.to(dtype).contiguous()


def parameters_of(R_RD: Tensor) -> tuple[Tensor, Tensor]:
    """X and B that give R to the bit, and that pyreft can train on from.

    X = −I: each reflection H_i then negates one axis and s negates it back, so that Rᵀ is the first r columns of B.
    Where D = r, X = 0, so that Rᵀ = B.

    Args:
        R_RD (`torch.Tensor`): R with orthonormal rows, [r, D].

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: X, [D, r], and B, [D, D], in the dtype of R.
    """
    rank, width = R_RD.shape
    if rank == width:
        return torch.zeros_like(R_RD), R_RD.mT.contiguous()
    complete, _ = torch.linalg.qr(R_RD.mT, mode="complete")
    base = torch.cat([R_RD.mT, complete[:, rank:]], dim=1).contiguous()
    return -torch.eye(width, rank, dtype=R_RD.dtype), base
