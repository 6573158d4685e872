"""`explain_edits`: how much each layer's edits change the hidden states of a batch, and what they do to the loss."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn
from transformers import Cache

from ..tuner.forward.context import ForwardContext
from ..tuner.layer import ReftLayer
from .measure import MeasuredEdit, measured


if TYPE_CHECKING:
    from rich.table import Table


COLUMNS = 10  # the tokens beside one another in a printed table


@dataclass(frozen=True)
class EditedToken:
    """A token of the batch that at least one layer edits.

    Args:
        row, column (`int`): Where it lies in the batch. In an encoder-decoder model, among the tokens of its side.
        in_encoder (`bool`): Whether it is one of the tokens of an encoder-decoder model's encoder.
        text (`str`): Its text, or its id where no tokenizer was given, or empty where the batch has no ids.
    """

    row: int
    column: int
    in_encoder: bool
    text: str


@dataclass(frozen=True)
class ExplainedLayer:
    """The edits of one layer.

    Args:
        name (`str`): The name of the layer in the model.
        sizes (`dict[EditedToken, float]`): Token -> ‖edit(h) − h‖ / ‖h‖, where h is the token's hidden state that the
            layer gives it, with the edits of the layers below.
        loss_without (`float`, *optional*): The loss of the batch with the edits of this layer alone switched off.
            None: the batch has no labels.
    """

    name: str
    sizes: dict[EditedToken, float]
    loss_without: float | None

    @property
    def mean(self) -> float:
        """The mean size of the edits. 0 where the layer edits no token."""
        return fmean(self.sizes.values()) if self.sizes else 0.0


@dataclass(frozen=True)
class ExplainedEdits:
    """The edits of a batch.

    Args:
        layers (`list[ExplainedLayer]`): The layers that edit, in the order in which they run.
        loss, loss_of_base (`float`, *optional*): The loss of the batch with all edits, and without any. None: the
            batch has no labels.
    """

    layers: list[ExplainedLayer]
    loss: float | None
    loss_of_base: float | None

    @property
    def tokens(self) -> list[EditedToken]:
        """The tokens that are edited, in the order of the batch, the encoder's first."""
        tokens = {token for layer in self.layers for token in layer.sizes}
        return sorted(tokens, key=lambda token: (not token.in_encoder, token.row, token.column))

    def as_json(self) -> dict[str, Any]:
        """The same as lists, dictionaries and numbers. `sizes` of a layer goes by the list of tokens; null where the
        layer does not edit a token."""
        tokens = self.tokens
        return {
            "loss": self.loss,
            "loss_of_base": self.loss_of_base,
            "tokens": [vars(token) for token in tokens],
            "layers": [
                {
                    "name": layer.name,
                    "mean": layer.mean,
                    "loss_without": layer.loss_without,
                    "sizes": [layer.sizes.get(token) for token in tokens],
                }
                for layer in self.layers
            ],
        }

    def print(self, file: TextIO | None = None) -> None:
        """Print the sizes of the edits as tables, layers by tokens, and the losses.

        Args:
            file (`TextIO`, *optional*): The file to print to. None: standard output.
        """
        from rich.console import Console  # few processes print, and each imports this module

        # No column is narrower than its numbers, whatever the width of the terminal.
        console = Console(file=file or sys.stdout, highlight=False, markup=False, soft_wrap=True, width=200)
        console.print("‖edit(h) − h‖ / ‖h‖: by how much of its size a hidden state is changed")
        for table in self._tables():
            console.print(table)
        if self.loss is not None:
            console.print(f"loss {self.loss:.4f} with all edits, {self.loss_of_base:.4f} without any")

    def _tables(self) -> Iterator[Table]:
        from rich.table import Table

        tokens = self.tokens
        for begin in range(0, len(tokens), COLUMNS):
            part = tokens[begin : begin + COLUMNS]
            table = Table(box=None, pad_edge=False)
            table.add_column("\nlayer")
            for token in part:
                side = "encoder " if token.in_encoder else ""
                table.add_column(f"{side}{token.row}:{token.column}\n{shown(token.text)}", justify="right")
            if begin + COLUMNS >= len(tokens):
                table.add_column("all\nmean", justify="right")
                if self.loss is not None:
                    table.add_column("loss\nwithout", justify="right")
            for layer in self.layers:
                cells = [f"{layer.sizes[token]:.3f}" if token in layer.sizes else "" for token in part]
                if begin + COLUMNS >= len(tokens):
                    cells.append(f"{layer.mean:.3f}")
                    if layer.loss_without is not None:
                        cells.append(f"{layer.loss_without:.4f}")
                table.add_row(layer.name, *cells)
            yield table


def explain_edits(
    model: nn.Module,
    batch: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    file: TextIO | None = None,
    quiet: bool = False,
) -> ExplainedEdits:
    """Print how much the edits of each layer change each token of a batch and, where it has labels, what the loss is
    without them, and return the same as data.

    The model runs in evaluation mode and without gradients: once, and, where the batch has labels, once more for each
    layer, with that layer's strength at 0. Its modes and strengths are then as they were.

    Args:
        model (`torch.nn.Module`): A model with ReFT adapters. The edits of all that are in use are measured together.
        batch (`Mapping`): The arguments of the model's forward, as tensors or lists: `input_ids` [B, S],
            `attention_mask`, `labels`, `prompt_lengths` and so on. Its tokens are edited as in any forward.
        tokenizer (`transformers.PreTrainedTokenizerBase`, *optional*): The tokenizer that made the batch, for the
            texts of its tokens. None: their ids are shown.
        file (`TextIO`, *optional*): The file to print to. None: standard output.
        quiet (`bool`): Whether to print nothing.

    Returns:
        `ExplainedEdits`: The layers with the sizes of their edits, and the losses.

    Raises:
        ValueError: when no ReFT adapter edits a token of the batch, or when one is merged; or as a forward would.
    """
    layers = [module for module in model.modules() if isinstance(module, ReftLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"{', '.join(merged)}: a merged adapter edits no hidden state, so there is nothing to measure. Call "
            "unmerge_adapter() first."
        )
    device = next(model.parameters()).device
    tensors = {key: _on(device, value) for key, value in batch.items() if value is not None}

    def run() -> float | None:
        # A forward adds to a cache, and the next one is to read what the batch gave.
        fresh = {key: copy.deepcopy(value) if isinstance(value, Cache) else value for key, value in tensors.items()}
        loss = getattr(model(**fresh), "loss", None)
        return None if loss is None else float(loss)

    with torch.no_grad(), _evaluating(model):
        with measured(model) as found:
            loss = run()
        # A layer that two modules of the model share, or that runs several times, has all its edits together.
        by_layer: dict[ReftLayer, list[MeasuredEdit]] = {}
        for edit in found.edits:
            by_layer.setdefault(edit.layer, []).append(edit)
        if not any(edit.size_T.numel() for edit in found.edits):
            raise ValueError(
                f"No ReFT adapter of {type(model).__name__} edits a token of this batch: none is active, all are "
                "switched off or of strength 0, or the batch has no token to edit, which explain_positions shows."
            )
        without: dict[ReftLayer, float | None] = dict.fromkeys(by_layer)
        base = None
        if loss is not None:
            for layer in by_layer:
                with _switched_off([layer]):
                    without[layer] = run()
            with _switched_off(layers):
                base = run()
    texts = _Texts(model, tensors, tokenizer)
    explained = ExplainedEdits(
        [ExplainedLayer(layer.name, texts.sizes(edits), without[layer]) for layer, edits in by_layer.items()],
        loss,
        base,
    )
    if not quiet:
        explained.print(file)
    return explained


def shown(text: str) -> str:
    """A token's text in one line."""
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")


class _Texts:
    """The texts of the tokens of a batch. Where an encoder-decoder model makes the decoder's tokens from labels, they
    are made as the model does."""

    def __init__(self, model: Any, tensors: Mapping[str, Any], tokenizer: Any) -> None:
        ids, context = tensors.get("input_ids"), ForwardContext.of(model)
        self._ids = {True: ids, False: ids}
        if context is not None and context.has_encoder:
            self._ids[False] = tensors.get("decoder_input_ids")
            make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            if self._ids[False] is None and make is not None and isinstance(tensors.get("labels"), Tensor):
                self._ids[False] = make(labels=tensors["labels"])
        self._tokenizer = tokenizer

    def sizes(self, edits: list[MeasuredEdit]) -> dict[EditedToken, float]:
        """Token -> the size of its edit, the largest of those that a layer makes when it runs several times."""
        found: dict[EditedToken, float] = {}
        for edit in edits:
            for row, column, size in zip(edit.row_T.tolist(), edit.column_T.tolist(), edit.size_T.tolist()):
                in_encoder = edit.layer.in_encoder
                token = EditedToken(row, column, in_encoder, self._text(row, column, in_encoder))
                found[token] = max(size, found.get(token, 0.0))
        return found

    def _text(self, row: int, column: int, in_encoder: bool) -> str:
        ids = self._ids[in_encoder]
        if not isinstance(ids, Tensor) or row >= ids.shape[0] or column >= ids.shape[1]:
            return ""
        index = int(ids[row, column])
        return str(index) if self._tokenizer is None or index < 0 else self._tokenizer.decode([index])


def _on(device: torch.device, value: Any) -> Any:
    """A tensor, or a list of numbers, on a device. Anything else as it is."""
    if isinstance(value, list) and value and not isinstance(value[0], (str, dict)):
        value = torch.tensor(value)
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside this context the model is in evaluation mode. Each module then has its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _switched_off(layers: Iterable[ReftLayer]) -> Iterator[None]:
    """Inside this context some layers do not edit."""
    before = [(layer, layer.scaling) for layer in layers]
    for layer, scaling in before:
        layer.scaling = dict.fromkeys(scaling, 0.0)
    try:
        yield
    finally:
        for layer, scaling in before:
            layer.scaling = scaling
