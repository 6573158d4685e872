"""The layout of the outputs of edited modules: shown by a batch whose numbers of rows and of tokens differ.

A batch with as many rows as tokens has the same shape if a module swaps the two, and the edit would go to wrong tokens
in silence. Any other batch shows the layout by its shape. So until one has been seen, a square batch is preceded by a
small forward that is not square. This happens once in the life of a model, if at all.

Dimensions: B rows of the batch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..parameters import distributed
from .plan import CallState, Layer
from .transformers_api import forward_parameters


ROWS, TOKENS = 2, 16  # CANINE pools four tokens, and needs more than a few


class UnconfirmedLayouts:
    """The edited modules whose layout no batch has shown yet."""

    def __init__(self) -> None:
        self._layers: dict[str, Layer] = {}
        self._shown_by_call: list[str] = []
        self.probing = False  # whether the forward that runs is the small one

    def __bool__(self) -> bool:
        return bool(self._layers)

    def add(self, layers: Sequence[Layer]) -> None:
        """Add layers. A block that layouts.py knows by its class needs no confirmation."""
        self._layers.update({layer.name: layer for layer in layers if layer.layout is None})

    def before_edits(self, module: nn.Module, names: Sequence[str], shape: torch.Size, call: CallState) -> None:
        """Prepare for a call whose edits go by the shape of the batch.

        Args:
            module (`torch.nn.Module`): The model or encoder that is called.
            names (`Sequence[str]`): Its edited layers.
            shape (`torch.Size`): [B, S] of the call.
            call (`CallState`): The state that its layers read.

        Raises:
            ValueError: when the batch is square, and a layer's layout is another than [B, S, D] or can't be found.
        """
        waiting = [name for name in names if name in self._layers]
        rows, tokens = shape
        if not waiting or rows == tokens == 1:
            return
        if rows == tokens:
            self._probe(module, waiting, rows, call)
            self._discard(waiting)
        else:
            self._shown_by_call += waiting

    def after_call(self, succeeded: bool) -> None:
        """Confirm the layouts of the layers of a call that is over, if all of them passed the check of shapes."""
        if succeeded:
            self._discard(self._shown_by_call)
        self._shown_by_call = []

    def _discard(self, names: Sequence[str]) -> None:
        for name in names:
            self._layers.pop(name, None)

    def _probe(self, module: nn.Module, names: Sequence[str], size: int, call: CallState) -> None:
        shapes: dict[str, torch.Size] = {}
        layers = {name: self._layers[name] for name in names}
        if distributed.is_distributed():
            # A forward of one process alone could wait for the others. transformers' blocks are all in layouts.py.
            unknown = [name for name, layer in layers.items() if not _is_block_of_transformers(layer)]
            error: Exception | None = RuntimeError("several processes run") if unknown else None
        else:
            with self._watching(layers, shapes, call):
                error = _run(module)
            # A block that reads images only does not run without one.
            unknown = [n for n in layers if error or n in shapes or not _is_block_of_transformers(layers[n])]
        for name in unknown:
            shape = shapes.get(name)
            if shape not in ((ROWS, TOKENS), (ROWS * TOKENS,)):
                found = (
                    f"in a forward of {ROWS} x {TOKENS} tokens it returned {list(shape)} x width" if shape else error
                )
                raise ValueError(
                    f"{name!r} may return [tokens, rows, width] or [rows, tokens, width], which a batch of {size} x "
                    f"{size} does not tell apart ({found or 'it did not run in a small forward'}). Begin with a batch "
                    "of another shape (one token more of padding is enough), which shows it, or choose in "
                    "target_modules a module that returns [rows, tokens, width], or set positions='all'."
                )

    @contextmanager
    def _watching(self, layers: dict[str, Layer], shapes: dict[str, torch.Size], call: CallState) -> Any:
        """In this context no layer edits, and the shapes [B, S] of their outputs are collected."""

        def watch(name: str) -> Any:
            def note(module: nn.Module, args: tuple, output: Any) -> None:
                h = output[0] if isinstance(output, (tuple, list)) else output
                if isinstance(h, Tensor):
                    shapes[name] = h.shape[:-1]

            return note

        handles = [layer.get_base_layer().register_forward_hook(watch(name)) for name, layer in layers.items()]
        before, call.jobs = call.jobs, _NoJobs()
        self.probing = True
        try:
            yield
        finally:
            self.probing = False
            call.jobs = before
            for handle in handles:
                handle.remove()


class _NoJobs(dict):
    """No jobs for any layer."""

    def get(self, *_: Any) -> tuple:
        return ()


def _is_block_of_transformers(layer: Layer) -> bool:
    return layer.is_block and type(layer.get_base_layer()).__module__.startswith("transformers.models.")


def _run(module: nn.Module) -> Exception | None:
    """Run a small forward of a model without gradients, and leave the random numbers as they are. Returns the error
    that it raised."""
    device = next(module.parameters()).device
    ids = (torch.arange(ROWS * TOKENS, device=device) % 8 + 1).view(ROWS, TOKENS)
    takes = forward_parameters(module)
    given: dict[str, Any] = {name: ids for name in ("input_ids", "decoder_input_ids") if name in takes}
    given |= {"attention_mask": torch.ones_like(ids)} if "attention_mask" in takes else {}
    given |= {"use_cache": False} if "use_cache" in takes else {}
    forked = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(forked):
            module.forward(**given)  # not __call__: the hooks of context.py would take this for a call of the user
    except Exception as error:
        return error
    return None
