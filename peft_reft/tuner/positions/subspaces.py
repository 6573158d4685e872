"""Subspaces: groups of the directions of an edit that examples use by name, as in pyreft's compositional ReFT.

This module reads names and numbers and makes a mask of them. layer.py applies it: the coefficients of the directions
that an example does not use are 0, so they edit nothing and their weights get no gradient from it.

Dimensions: Q sequences of the batch, K groups, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kept_directions(given: Any, groups: dict[str, int], count: int, device: torch.device) -> Tensor:
    """The directions that each sequence uses.

    Args:
        given: What the batch says: a text for all (`"style"`, `"style+facts"`), a list with a text for each sequence, or
            a tensor: [Q] numbers of groups in the order of the config, or [Q, K] with 1 for the groups to use.
        groups (`dict[str, int]`): The groups of the config, with their numbers of directions.
        count (`int`): Q.
        device (`torch.device`): Where the tokens are.

    Returns:
        `torch.BoolTensor`: [Q, R].

    Raises:
        ValueError: for a name or number that is no group's, and for another length than the batch's.
    """
    names = list(groups)
    if isinstance(given, str):
        given = [given] * count
    if isinstance(given, Tensor):
        used_QK = _from_tensor(given, names, count)
    else:
        used_QK = torch.tensor([_from_text(text, names) for text in given], dtype=torch.bool).view(-1, len(names))
    if used_QK.shape[0] != count:
        raise ValueError(f"subspaces has {used_QK.shape[0]} entries, but the batch has {count} sequences.")
    sizes = torch.tensor(list(groups.values()), device=used_QK.device)
    return used_QK.repeat_interleave(sizes, dim=1, output_size=sum(groups.values())).to(device)


def _from_text(text: Any, names: list[str]) -> list[bool]:
    wanted = text.split("+") if isinstance(text, str) else [text]
    unknown = [name for name in wanted if name not in names]
    if unknown:
        raise ValueError(
            f"subspaces={text!r} names {unknown[0]!r}, which this adapter does not have. It has: {', '.join(names)}. Join "
            f"several with '+', for example {'+'.join(names[:2])!r}."
        )
    return [name in wanted for name in names]


def _from_tensor(given: Tensor, names: list[str], count: int) -> Tensor:
    if given.shape == (count,) and not given.is_floating_point() and given.dtype != torch.bool:
        if count > 0 and not bool(((given >= 0) & (given < len(names))).all()):
            raise ValueError(
                f"subspaces={given.tolist()} holds numbers outside 0 to {len(names) - 1}, the groups' own."
            )
        return torch.nn.functional.one_hot(given.long(), len(names)).bool()
    if given.shape == (count, len(names)):
        return given.bool()
    raise ValueError(
        f"subspaces has shape {list(given.shape)}. Pass [{count}] with the number of a group for each sequence, or [{count}, "
        f"{len(names)}] with 1 for the groups that it uses ({', '.join(names)})."
    )
