"""What torch saves of a matrix with orthonormal rows or columns, and the matrix itself.

pyreft and adapters keep R by `torch.nn.utils.parametrizations.orthogonal`. It saves a free parameter X (`original`) and a fixed
orthogonal matrix B (`base`, [D, D]); the matrix is a function of both:

    D > r:  Q = H_1 ... H_r [:, :r] diag(s),  H_i = I − 2 a_i a_iᵀ / a_iᵀa_i,  Rᵀ = B Q
            a_i: the i-th column of X below its diagonal, after a 1 on it, 0 above; s: the diagonal of X, as whole numbers
    D = r:  Rᵀ = B exp(L − Lᵀ), L the lower triangle of X

Dimensions: R rank, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def basis_of(original_DR: Tensor, base_DD: Tensor) -> Tensor:
    """R [r, D], of the dtype of the parameter, computed in float64.

    Args:
        original_DR (`torch.Tensor`): X, [D, r] with r <= D.
        base_DD (`torch.Tensor`): B, [D, D].
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
    """X [D, r] and B [D, D] that give R, to the bit, and from which training goes on as it began.

    X = −I, for which every reflection negates one axis, or X = 0 where D = r. So the first r columns of B are R's rows.
    """
    rank, width = R_RD.shape
    if rank == width:
        return torch.zeros_like(R_RD), R_RD.mT.contiguous()
    complete, _ = torch.linalg.qr(R_RD.mT, mode="complete")
    base = torch.cat([R_RD.mT, complete[:, rank:]], dim=1).contiguous()
    return -torch.eye(width, rank, dtype=R_RD.dtype), base
