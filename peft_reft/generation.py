"""The prompts of a running `generate`, and those of their tokens that one forward in it is fed.

A forward alone cannot tell the prompt while generating: with `use_cache=False` every step is a full pass, and a chunked
prefill is several. So the prompt is what `generate` was given. Its columns are numbered once, and every forward edits
those of them that it is fed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .batch import Batch, Located, Rules, locate
from .positions import Selection, places, select


@dataclass
class Generation:
    """A running `generate`.

    Args:
        told (`dict`): What it was told of its prompts besides the tokens: `prompt_lengths`, `subspaces`, ...
        rows (`int`): How many prompts it was given.
        prompts (`Batch`, *optional*): The tokens that it was given, None while they are not known: a decoder's prompt,
            in an encoder-decoder model, is what its first forward is fed.
        rests_in_decoding (`bool`): Whether no adapter edits anything in a decode step.
    """

    told: dict[str, Any]
    rows: int
    prompts: Batch | None = None
    rests_in_decoding: bool = False
    fed: int = 0  # columns that earlier forwards were fed
    _reached: int = 0
    _located: dict[Rules, Located] = field(default_factory=dict)

    def decodes(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward is a decode step, as far as can be told without asking the cache."""
        tokens = arguments.get("input_ids")
        known = self.prompts is not None and self.fed >= self.prompts.shape[1]
        return known and tokens is not None and tokens.shape[1] == 1

    def advance(self) -> None:
        """A forward has found the tokens of all its adapters."""
        self.fed = self._reached

    def select(self, rules: Rules, batch: Batch, past: int) -> Selection | None:
        """The tokens that an adapter edits in a forward.

        Args:
            rules (`Rules`): Those of the adapter.
            batch (`Batch`): What the forward is fed: columns `past` and after.
            past (`int`): How many columns the cache holds already.

        Raises:
            ValueError: when the forward has rows that can't be traced to a prompt.
        """
        if self.prompts is None:
            self.prompts = batch
        rows, width = self.prompts.shape
        self._reached = max(self.fed, past + batch.shape[1])
        if past >= width:
            return None  # a decode step
        if batch.shape[0] % rows != 0:
            raise ValueError(
                f"generate was given {rows} prompts, but runs {batch.shape[0]} rows at once: ReFT can't tell whose."
            )
        if rules not in self._located:
            self._located[rules] = locate(rules, self.prompts, training=False)
        located = self._located[rules]
        repeats = batch.shape[0] // rows  # beams and returned sequences repeat each row
        first_BS, last_BS = (
            _columns(mask, past, batch.shape[1], repeats).to(batch.device)
            for mask in (located.first_BS, located.last_BS)
        )
        limit = None if located.runs is None else places(rules.spec, rules.groups, located.runs * repeats)
        return select(first_BS, last_BS, rules.groups, limit)


def _columns(mask_BS: Tensor, past: int, width: int, repeats: int) -> Tensor:
    """So many columns after `past`. Those after the prompt hold what has been generated."""
    here = mask_BS[:, past : past + width].repeat_interleave(repeats, dim=0)
    return nn.functional.pad(here, (0, width - here.shape[1]))
