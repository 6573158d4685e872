"""Mixed batches: their examples use different adapters, by PEFT's `adapter_names`, a name for each example.

This module knows which rows of a batch belong to which adapter. context.py finds the tokens to edit in these rows.
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
        names (`Sequence[str]`): The name of an adapter for each example, `"__base__"` for the base model alone.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.adapters = tuple(dict.fromkeys(name for name in self.names if name != BASE))
        self._rows: dict[tuple[str, int, torch.device], Tensor] = {}

    def refuse_other_size(self, examples: int, repeated: bool) -> None:
        """Check that a batch has as many examples as there are names.

        Args:
            examples (`int`): B, the rows of the batch that the model was called with.
            repeated (`bool`): Whether the batch may hold each example several times, one after the other, as beams do.

        Raises:
            ValueError: when the rows are not as many as the names or, where `repeated`, no multiple of them.
        """
        if examples == len(self.names) or (repeated and examples % len(self.names) == 0):
            return
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(self.names)} and {examples} respectively. Pass {BASE!r} for examples without an adapter."
        )

    def rows(self, adapter_name: str, count: int, device: torch.device) -> Tensor:
        """Indices of the rows that belong to an adapter.

        Args:
            adapter_name (`str`): The adapter.
            count (`int`): Rows of the batch: the same number for each example, one after the other.
            device (`torch.device`): The device of the result.

        Returns:
            `torch.LongTensor`: [rows of the adapter].
        """
        key = (adapter_name, count, device)
        if key not in self._rows:
            own = [index for index, name in enumerate(self.names) if name == adapter_name]
            repeats = count // len(self.names)
            rows = [index * repeats + offset for index in own for offset in range(repeats)]
            self._rows[key] = torch.tensor(rows, dtype=torch.long, device=device)
        return self._rows[key]

    def expanded(self, count: int) -> list[str]:
        """The adapter's name for each of `count` rows, which are the same number for each example."""
        return [name for name in self.names for _ in range(count // len(self.names))]


@contextmanager
def mixed_modules_to_save(model: nn.Module, mixed: MixedBatch) -> Iterator[None]:
    """Inside this context PEFT's wrappers of trained modules (`modules_to_save`, `trainable_token_indices`) run each
    example through the copy of its own adapter."""

    def pass_names(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return args, {**kwargs, "adapter_names": mixed.expanded(tensor.shape[0])}

    with ExitStack() as handles:
        for module in model.modules():
            if isinstance(module, AuxiliaryTrainingWrapper):
                handles.enter_context(module.register_forward_pre_hook(pass_names, with_kwargs=True))
        yield
