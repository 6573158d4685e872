"""Conditions that a batch has to meet, read from a GPU one step late.

Reading a number from a GPU waits for all work that was queued on it. So a condition on a batch is copied to the host
behind that work, and read when the next forward begins or an adapter is saved: one step late, before an adapter that
was trained on a bad batch can be saved. On a CPU, where nothing is queued, it is read at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


# Devices that queue work, and on which an event marks a point in the queue to wait for.
QUEUEING = ("cuda", "xpu")


class Checks:
    """The conditions on the batches of one model that are still to be read.

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
        """Check numbers, now or in a later call of `settle`.

        Args:
            numbers (`torch.Tensor`): A few integers or booleans, [n].
            error_for (`Callable`): Takes the numbers as a list, and returns the error to raise, or None where they are
                as they have to be.

        Raises:
            Exception: the error, where the device does not defer.
        """
        if not self.are_deferred_on(numbers.device):
            _raise(error_for(numbers.tolist()))
            return
        copied = numbers.to("cpu", non_blocking=True)
        copying = torch.Event(device=numbers.device)
        copying.record()
        self._pending.append((copied, copying, error_for))

    def settle(self) -> None:
        """Read all pending numbers.

        Raises:
            Exception: the first error among them. The rest is dropped.
        """
        pending, self._pending = self._pending, []
        for numbers, copying, error_for in pending:
            copying.synchronize()
            _raise(error_for(numbers.tolist()))


def _raise(error: Exception | None) -> None:
    if error is not None:
        raise error
