"""The six edits of ReFT, as pure functions of tensors.

This module knows the formulas and the start values of their weights. positions/ finds the tokens to edit, parameters/
knows the parameters of layers, orthogonal.py keeps R orthonormal, and apply.py computes the edits.

Every edit adds a combination of the r rows of R to a hidden state h, h + Rᵀc. The edits differ in c, and in whether
the rows of R are orthonormal:

| name     | c                  | R           | source                                               |
|----------|--------------------|-------------|------------------------------------------------------|
| loreft   | act(Wh + b) − Rh   | orthonormal | arXiv 2404.03592, section 3.2                        |
| noreft   | act(Wh + b) − Rh   | free        | arXiv 2404.03592, ablation                           |
| direft   | act(Wh + b)        | orthonormal | pyreft                                               |
| nodireft | act(Wh + b)        | free        | arXiv 2404.03592, section 3.2, there called DiReFT   |
| consreft | b − Rh             | orthonormal | pyreft                                               |
| lobireft | b                  | orthonormal | pyreft                                               |

The source of an edit is act(Wh + b), or the constant b.

Dimensions: G groups of weights, R rank (r in formulas), D width of the hidden state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN


# The dtypes in which weights are computed and saved. torch's 8-bit floating-point dtypes only store values.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Intervention:
    """The properties in which edits differ.

    Args:
        orthonormal (`bool`): Whether the rows of R are kept orthonormal.
        has_source (`bool`): Whether the edit has W: its source is act(Wh + b), else the constant b.
        replaces (`bool`): Whether the component Rh is subtracted, so that the source replaces it.
        has_dropout (`bool`): Whether dropout is applied to the edited state, as pyreft does for all but consreft.
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
    """The activation function by its name in transformers' ACT2FN. None for the identity (`None` or `"linear"`)."""
    return None if name in (None, "linear") else ACT2FN[name]


def affine_form(
    intervention: Intervention, R_GRD: Tensor, W_GRD: Tensor | None, b_GR: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """M and b of c = Mh + b, the form that c of every edit has without an activation function.

    Wh − Rh becomes one product, (W − R)h. It is exactly 0 where W = R, which the identity start relies on.

    Args:
        intervention (`Intervention`): The edit.
        R_GRD, W_GRD, b_GR (`torch.Tensor`): [G, R, D], [G, R, D] and [G, R], or each with a dimension of layers in
            front. None for W or b where the edit has none.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: M, of the shape of R, and b. None for either where it is 0.
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
    """Fill the weights of one adapter in one layer with their start values, in place.

    `init_weights="pyreft"`, or False, starts as pyreft does: R with orthonormal rows, or as the weight of a linear
    layer where it is free; W and b as those of a linear layer; a constant source uniform in [0, 1).

    `init_weights=True` starts with the identity, exactly, wherever the formula allows it: W = R and b = 0 where the
    component is replaced without an activation function; W = 0 and b = 0 where it is not replaced and act(0) = 0; b =
    0 for lobireft; and R = 0 where R is free and none of these applies. The other edits (consreft, and an orthonormal
    R with an activation function that either replaces the component or has act(0) ≠ 0) start as in pyreft.

    Args:
        intervention (`Intervention`): The edit.
        R_GRD, W_GRD, b_GR (`torch.Tensor`): [G, R, D], [G, R, D] and [G, R], of any floating dtype. None for W or b
            where the edit has none.
        act (`Callable`, *optional*): The activation function of the source. None: the identity.
        init_weights (`bool` or `str`): `ReftConfig.init_weights`.
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
    """Fill a weight in place as `torch.nn.Linear` does."""
    bound = weight_RD.shape[-1] ** -0.5
    weight_RD.uniform_(-bound, bound)
