"""The picture of `explain_edits`: layers by tokens, and what each layer does to the loss."""

from __future__ import annotations

import os
from typing import Any

from .explain_edits import ExplainedEdits, shown


MOST_TOKENS = 120  # beyond, the texts of the tokens can't be read


def draw_heat_map(explained: ExplainedEdits, path: str | os.PathLike, title: str | None = None) -> None:
    """Draw the sizes of edits as a heat map, the last layer on top, and, where the batch had labels, a bar for each
    layer: by how much the loss rises with its edits off.

    Args:
        explained (`ExplainedEdits`): What `explain_edits` returned.
        path (`str` or `os.PathLike`): The file to write, of a kind that matplotlib knows: .png, .svg, .pdf.
        title (`str`, *optional*): A title.

    Raises:
        ValueError: when matplotlib is missing, with the command that installs it, when it does not know files of this
            kind, or when there are too many tokens for a picture.
    """
    try:
        from matplotlib.figure import Figure  # not pyplot, which keeps figures and may open windows
    except ImportError as error:
        raise ValueError(
            f"A picture needs matplotlib, of the extra 'plot': pip install 'peft-reft[plot]'. {error}"
        ) from error
    tokens, layers = explained.tokens, explained.layers
    if len(tokens) > MOST_TOKENS:
        raise ValueError(
            f"{len(tokens)} edited tokens are too many for a picture, which has room for {MOST_TOKENS}. Take fewer or "
            "shorter texts."
        )
    has_loss = explained.loss is not None
    width, height = 2.6 + 0.42 * len(tokens) + (2.4 if has_loss else 0.0), 1.9 + 0.3 * len(layers)
    figure = Figure(figsize=(max(width, 6.0), max(height, 3.0)), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    ratios = [max(0.42 * len(tokens), 2.0), *([2.0] if has_loss else [])]
    axes: Any = figure.subplots(1, len(ratios), squeeze=False, width_ratios=ratios, sharey=True)[0]
    _draw_sizes(figure, axes[0], explained)
    if has_loss:
        _draw_losses(axes[1], explained)
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise ValueError(f"--plot {os.fspath(path)}: {error}") from error


def _draw_sizes(figure: Any, axes: Any, explained: ExplainedEdits) -> None:
    tokens, layers = explained.tokens, explained.layers
    sizes = [[layer.sizes.get(token, float("nan")) for token in tokens] for layer in layers]
    image = axes.imshow(sizes, aspect="auto", origin="lower", cmap="viridis", vmin=0.0, interpolation="nearest")
    axes.set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=8)
    rows = {token.row for token in tokens}
    labels = [
        f"{f'{token.row}:' if len(rows) > 1 else ''}{token.column}  {shown(token.text)}".replace("$", r"\$")
        for token in tokens
    ]
    axes.set_xticks(range(len(tokens)), labels, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_xlabel("edited token")
    figure.colorbar(image, ax=axes, label="‖edit(h) − h‖ / ‖h‖", pad=0.02)


def _draw_losses(axes: Any, explained: ExplainedEdits) -> None:
    assert explained.loss is not None
    rises = [(layer.loss_without or 0.0) - explained.loss for layer in explained.layers]
    axes.barh(range(len(rises)), rises, color=["#35608d" if rise >= 0 else "#b0413e" for rise in rises])
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_xlabel(
        f"rise of the loss without\n(with all edits {explained.loss:.2f}, base {explained.loss_of_base:.2f})"
    )
    axes.tick_params(axis="x", labelsize=8)
