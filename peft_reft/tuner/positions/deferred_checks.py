"""Conditions that a batch has to meet, read from its device without waiting for it.

To read a number back from a GPU is to wait for all that it has been given to do. What a batch is refused for is known on the GPU
early in a forward, so the number is copied behind it, and read when the next forward begins or an adapter is saved: one step late,
before anything of it can be kept. On a CPU, where there is nothing to wait for, it is read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# Those whose queues can be waited for in part, up to an event.
QUEUEING = ("cuda", "xpu")


class Checks:
    """The conditions of one model's batches that are still to be read.

    Args:
        queueing (`tuple[str, ...]`): The types of devices whose numbers are read later.
    """

    def __init__(self, queueing: tuple[str, ...] = QUEUEING) -> None:
        self._queueing = queueing
        self._pending: list[tuple[Tensor, Any, Callable[[list[int]], Exception | None]]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {"_queueing": self._queueing, "_pending": []}

    def are_deferred_on(self, device: torch.device) -> bool:
        """Whether numbers on a device are read later."""
        return device.type in self._queueing

    def require(self, numbers: Tensor, error_for: Callable[[list[int]], Exception | None]) -> None:
        """Raise, now or later, what `error_for` makes of numbers.

        Args:
            numbers (`torch.Tensor`): A few integers or booleans.
            error_for (`Callable`): Is given them as a list, and returns the error that they are, if they are one.
        """
        if not self.are_deferred_on(numbers.device):
            _raise(error_for(numbers.tolist()))
            return
        copied = numbers.to("cpu", non_blocking=True)
        copying = torch.Event(device=numbers.device)
        copying.record()
        self._pending.append((copied, copying, error_for))

    def settle(self) -> None:
        """Raise the first error among those that are still to be read."""
        pending, self._pending = self._pending, []
        for numbers, copying, error_for in pending:
            copying.synchronize()
            _raise(error_for(numbers.tolist()))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
