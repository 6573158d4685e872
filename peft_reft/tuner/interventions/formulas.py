"""The six edits of ReFT, as pure functions of tensors.

This module knows the formulas and how their weights start. Which rows are edited, where the weights live and how R is
kept orthonormal is left to positions/, parameters/ and orthogonal.py; apply.py edits by these formulas.

Every edit adds a combination of the r rows of R to a hidden state h, h + Rᵀc, and they differ in c alone:

| name     | c                  | R           | source                                               |
|----------|--------------------|-------------|------------------------------------------------------|
| loreft   | act(Wh + b) − Rh   | orthonormal | arXiv 2404.03592, section 3.2                        |
| noreft   | act(Wh + b) − Rh   | free        | arXiv 2404.03592, ablation                           |
| direft   | act(Wh + b)        | orthonormal | pyreft                                               |
| nodireft | act(Wh + b)        | free        | arXiv 2404.03592, section 3.2, there called DiReFT   |
| consreft | b − Rh             | orthonormal | pyreft                                               |
| lobireft | b                  | orthonormal | pyreft                                               |

Dimensions: G groups of weights, R rank, Q = G · R directions of all groups, T rows to edit, D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


# Those that weights are computed and saved in. The 8-bit ones only store them.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Intervention:
    """What sets one edit apart from another.

    Args:
        orthonormal (`bool`): Whether the rows of R are kept orthonormal.
        has_source (`bool`): Whether the source is act(Wh + b), else the constant b.
        replaces (`bool`): Whether the component Rh is taken away.
        has_dropout (`bool`): Whether pyreft applies dropout to the edited state.
    """

    orthonormal: bool
    has_source: bool
    replaces: bool
    has_dropout: bool = True


INTERVENTIONS: dict[str, Intervention] = {
    "loreft": Intervention(orthonormal=True, has_source=True, replaces=True),
    "noreft": Intervention(orthonormal=False, has_source=True, replaces=True),
    "direft": Intervention(orthonormal=True, has_source=True, replaces=False),
    "nodireft": Intervention(orthonormal=False, has_source=True, replaces=False),
    "consreft": Intervention(orthonormal=True, has_source=False, replaces=True, has_dropout=False),
    "lobireft": Intervention(orthonormal=True, has_source=False, replaces=False),
}


def activation(name: str | None) -> Callable[[Tensor], Tensor] | None:
    """The activation function of that name in transformers, None for the identity."""
    return None if name in (None, "linear") else ACT2FN[name]


def affine_source(
    intervention: Intervention, R_GRD: Tensor, W_GRD: Tensor | None, b_GR: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """M [G, r, D] and b [G, r] of c = Mh + b, which every edit is without an activation function. None where it is 0.

    Wh − Rh is one product. It is exactly 0 where W = R, which the identity start relies on.
    """
    if not intervention.replaces:
        return W_GRD, b_GR
    return -R_GRD if W_GRD is None else W_GRD - R_GRD, b_GR


def initialize(
    intervention: Intervention,
    R_GRD: Tensor,
    W_GRD: Tensor | None,
    b_GR: Tensor | None,
    act: Callable[[Tensor], Tensor] | None,
    init_weights: bool | str,
) -> None:
    """Fill the weights of one layer in place.

    With `init_weights="pyreft"`, or False, as pyreft does: R with orthonormal rows or as a linear layer's weight, W and b as a
    linear layer's, a constant source uniform in [0, 1).

    With `init_weights=True`, such that the edit starts as the identity, exactly, wherever the formula allows it: W = R
    and b = 0 where the component is replaced without an activation function, W = 0 and b = 0 where act(0) = 0, b = 0
    for lobireft, and R = 0 where R is free and nothing else does it. What is left (a replaced component with an
    orthonormal R behind an activation function, and consreft) starts as in pyreft.
    """
    with torch.no_grad():
        for g in range(R_GRD.shape[0]):
            (nn.init.orthogonal_ if intervention.orthonormal else _init_linear)(R_GRD[g])
        if W_GRD is None:
            assert b_GR is not None
            b_GR.uniform_(0, 1)
        else:
            for g in range(W_GRD.shape[0]):
                _init_linear(W_GRD[g])
            if b_GR is not None:
                bound = W_GRD.shape[-1] ** -0.5
                b_GR.uniform_(-bound, bound)
        if init_weights is not True:
            return
        if W_GRD is None:
            if not intervention.replaces and b_GR is not None:
                b_GR.zero_()
        elif intervention.replaces and act is None:
            W_GRD.copy_(R_GRD)
            if b_GR is not None:
                b_GR.zero_()
        elif not intervention.replaces and (act is None or act(torch.zeros(1)).item() == 0.0):
            W_GRD.zero_()
            if b_GR is not None:
                b_GR.zero_()
        elif not intervention.orthonormal:
            R_GRD.zero_()


def _init_linear(weight_RD: Tensor) -> None:
    """As `torch.nn.Linear` starts its weight."""
    bound = weight_RD.shape[-1] ** -0.5
    weight_RD.uniform_(-bound, bound)
