"""Subspaces: named sets of the directions of an edit, of which each example uses some, as in pyreft's compositional
ReFT.

This module turns names and numbers into a mask of directions. interventions/apply.py applies it: the coefficients of
the directions that an example does not use are 0, so they add nothing to it, and their weights get no gradient from
it.

Dimensions: N sequences of the batch, K subspaces of the adapter, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def used_directions(given: Any, subspaces: dict[str, int], count: int, device: torch.device) -> Tensor:
    """The directions that each sequence uses.

    Args:
        given: The `subspaces` argument of a forward or of `generate`: a text for all sequences (`"style"`,
            `"style+facts"`), a list with a text for each, or a tensor: [N] integers, numbers of subspaces in the order
            of the config, or [N, K] with 1 for the subspaces to use.
        subspaces (`dict[str, int]`): The names of the adapter's subspaces, each with its number of directions.
        count (`int`): N.
        device (`torch.device`): The device of the tokens.

    Returns:
        `torch.BoolTensor`: [N, R].

    Raises:
        ValueError: for a name or number of no subspace, and for another length than the batch's.
    """
    names = list(subspaces)
    if isinstance(given, str):
        given = [given] * count
    if isinstance(given, Tensor):
        used_NK = _from_tensor(given, names, count)
    else:
        used_NK = mask_of_names(given, names)
    if used_NK.shape[0] != count:
        raise ValueError(f"subspaces has {used_NK.shape[0]} entries, but the batch has {count} sequences.")
    sizes = torch.tensor(list(subspaces.values()), device=used_NK.device)
    return used_NK.repeat_interleave(sizes, dim=1, output_size=sum(subspaces.values())).to(device)


def mask_of_names(given: Iterable[Any], names: list[str]) -> Tensor:
    """Which subspaces each sequence uses, [N, K], bool.

    Args:
        given (`Iterable[str]`): For each sequence a name, or several joined by `+`.
        names (`list[str]`): The subspaces of the adapter.

    Raises:
        ValueError: for a name of no subspace.
    """
    return torch.tensor([_from_text(text, names) for text in given], dtype=torch.bool).view(-1, len(names))


def _from_text(text: Any, names: list[str]) -> list[bool]:
    wanted = text.split("+") if isinstance(text, str) else [text]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(
            f"subspaces={text!r} names {unknown[0]!r}, which this adapter does not have. It has: {', '.join(names)}. "
            f"Join several with '+', for example {'+'.join(names[:2])!r}."
        )
    return [name in wanted for name in names]


def _from_tensor(given: Tensor, names: list[str], count: int) -> Tensor:
    if given.shape == (count,) and not given.is_floating_point() and given.dtype != torch.bool:
        if count > 0 and not bool(((given >= 0) & (given < len(names))).all()):
            raise ValueError(
                f"subspaces={given.tolist()} holds numbers outside 0 to {len(names) - 1}, those of the adapter's "
                f"subspaces ({', '.join(names)})."
            )
        return torch.nn.functional.one_hot(given.long(), len(names)).bool()
    if given.shape == (count, len(names)):
        return given.bool()
    raise ValueError(
        f"subspaces has shape {list(given.shape)}. Pass [{count}] with the number of a subspace for each sequence, or "
        f"[{count}, {len(names)}] with 1 for the subspaces that it uses ({', '.join(names)})."
    )
