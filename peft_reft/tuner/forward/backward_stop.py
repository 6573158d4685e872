"""Backward ends at the first edited layer.

Below it there is nothing to train, so autograd stores nothing there, unless the embeddings are made to need a gradient by
`enable_input_require_grads`, as trainers do for adapters. Reentrant checkpointing is what needs it; otherwise it only sends backward
through blocks whose gradients nobody reads, and keeps their activations for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .checkpointing import checkpoints_reentrantly


class BackwardStop:
    """Takes the gradient that `enable_input_require_grads` asks for away again, where nothing needs it."""

    def __init__(self) -> None:
        self._asking: Any = None  # transformers' handle, when it was last looked at
        self._own: Any = None
        self._stopping = False

    def watch(self, model: nn.Module) -> None:
        """Look, before a training forward of the base model, at what it has been made to do since the last."""
        asking = getattr(model, "_require_grads_hook", None)
        if asking is not self._asking:
            self._asking = asking
            self.remove()
            embeddings = model.get_input_embeddings() if asking is not None else None  # type: ignore[operator]
            if isinstance(embeddings, nn.Module):
                self._own = embeddings.register_forward_hook(self._after_embeddings)  # after transformers' own
        self._stopping = self._own is not None and not any(map(checkpoints_reentrantly, model.modules()))

    def remove(self) -> None:
        """Let the embeddings be."""
        if self._own is not None:
            self._own.remove()
            self._own = None

    def _after_embeddings(self, embeddings: nn.Module, args: tuple, output: Any) -> Tensor | None:
        # What is trained below would have made it something else than a leaf.
        asked_for = isinstance(output, Tensor) and output.is_leaf and output.requires_grad
        return output.detach() if self._stopping and asked_for and torch.is_grad_enabled() else None
