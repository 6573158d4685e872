"""Batches whose examples use different adapters: `adapter_names` of PEFT, a name for each example.

This module knows which rows of a batch belong to which adapter. What is edited in them is left to the context and the layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..peft_api import AuxiliaryTrainingWrapper


BASE = "__base__"  # PEFT's name for no adapter


class MixedBatch:
    """The adapter of each example of a batch.

    Args:
        names (`Sequence[str]`): A name for each example, `"__base__"` for the base model.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.adapters = tuple(dict.fromkeys(name for name in self.names if name != BASE))
        self._rows: dict[tuple[str, int, torch.device], Tensor] = {}

    def refuse_other_size(self, examples: int, repeated: bool) -> None:
        """
        Args:
            examples (`int`): Rows of a batch that the model was called with.
            repeated (`bool`): Whether it may hold each example several times, one after the other, as beams do.

        Raises:
            ValueError: when they are not as many as the names.
        """
        if examples == len(self.names) or (repeated and examples % len(self.names) == 0):
            return
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {examples} respectively. Pass {BASE!r} for examples without an adapter."
        )

    def rows(self, adapter_name: str, count: int, device: torch.device) -> Tensor:
        """Indices of the rows that belong to an adapter, of `count` rows in which each example has equally many."""
        key = (adapter_name, count, device)
        if key not in self._rows:
            own = [index for index, name in enumerate(self.names) if name == adapter_name]
            repeats = count // len(self.names)
            rows = [index * repeats + offset for index in own for offset in range(repeats)]
            self._rows[key] = torch.tensor(rows, dtype=torch.long, device=device)
        return self._rows[key]

    def expanded(self, count: int) -> list[str]:
        """The names of `count` rows in which each example has equally many."""
        return [name for name in self.names for _ in range(count // len(self.names))]


@contextmanager
def mixed_modules_to_save(model: nn.Module, mixed: MixedBatch) -> Iterator[None]:
    """Have PEFT's wrappers of trained modules (`modules_to_save`, `trainable_token_indices`) run each example through the
    copy of its own adapter."""

    def tell_names(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return args, {**kwargs, "adapter_names": mixed.expanded(first.shape[0])}

    with ExitStack() as handles:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handles.enter_context(module.register_forward_pre_hook(tell_names, with_kwargs=True))
        yield
