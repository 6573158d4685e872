"""The position language, and the rules by which one adapter finds its tokens.

This module knows which tokens of a prompt a spec names. prompts.py finds the prompts.

Dimensions: B rows of the batch, S tokens of a row, G groups of weights.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .prompts import Prompts, as_batch, count_and_total_within
from .template import IdTemplate, TextTemplate


POSITION_EXAMPLES = "'f7+l7' (first 7 and last 7 tokens of the prompt), 'f3', 'l1' or 'all'"


@dataclass(frozen=True)
class PositionSpec:
    """A parsed `positions` string.

    Args:
        first (`int`): The number of tokens from the start of the prompt.
        last (`int`): The number of tokens back from the end of the prompt.
        all_tokens (`bool`): `"all"`: every token, whether it belongs to the prompt or not.
    """

    first: int = 0
    last: int = 0
    all_tokens: bool = False

    @classmethod
    def parse(cls, text: str) -> PositionSpec:
        """Read a `positions` string.

        Args:
            text (`str`): `"f7+l7"`, `"f3"`, `"l1"` or `"all"`, with any counts from 1 and either order.

        Raises:
            ValueError: for any other text, naming the field, the text and what is allowed.
        """
        if text == "all":
            return cls(all_tokens=True)
        counts: dict[str, int] = {}
        for part in text.split("+") if isinstance(text, str) else [""]:
            match = re.fullmatch(r"([fl])([1-9][0-9]*)", part.strip())
            if match is None or match[1] in counts:
                raise ValueError(f"positions={text!r} does not parse. Write {POSITION_EXAMPLES}.")
            counts[match[1]] = int(match[2])
        return cls(first=counts.get("f", 0), last=counts.get("l", 0))

    def __str__(self) -> str:
        parts = [f"{letter}{count}" for letter, count in (("f", self.first), ("l", self.last)) if count]
        return repr("all" if self.all_tokens else "+".join(parts))

    @property
    def two_sided(self) -> bool:
        """Whether the spec names both first and last tokens."""
        return self.first > 0 and self.last > 0

    def counts(self, length: int) -> tuple[int, int]:
        """How many first and how many last tokens of a prompt are edited.

        Args:
            length (`int`): n, the tokens of the prompt.
        """
        most = length // 2 if self.two_sided and length < self.first + self.last else length
        return min(self.first, most), min(self.last, most)

    def groups(self, share_weights: bool) -> int:
        """G: 2 where the first and the last tokens have weights of their own, else 1."""
        return 2 if self.two_sided and not share_weights else 1


@dataclass(frozen=True)
class Rules:
    """How one adapter finds its tokens. Adapters with equal rules share a Selection.

    Args:
        spec (`PositionSpec`): The tokens of a prompt to edit.
        groups (`int`): G, 2 where first and last tokens have weights of their own.
        every (`bool`): Whether each turn has a prompt, else only the first.
        template (`IdTemplate` or `TextTemplate`, *optional*): The response template, after which an answer begins.
        template_optional (`bool`): Whether a sequence may lack the template: then its labels tell its prompt.
        why_no_template (`str`): Why no template was found, where one was looked for. For messages.
        end_ids (`tuple[int, ...]`): The ids of the tokens that end an answer.
        reads_labels (`bool`): Whether labels mark answers. Where they are classes, they are not read, and neither is
            the template.
        subspaces (`tuple[tuple[str, int], ...]`): The names of the adapter's subspaces, each with its number of
            directions.
    """

    spec: PositionSpec
    groups: int
    every: bool = False
    template: IdTemplate | TextTemplate | None = None
    template_optional: bool = False
    why_no_template: str = ""
    end_ids: tuple[int, ...] = ()
    reads_labels: bool = True
    subspaces: tuple[tuple[str, int], ...] = ()

    @property
    def depend_on_batch(self) -> bool:
        """Whether the batch decides which tokens are edited, or in which directions."""
        return depends_on_batch(self.spec, self.subspaces)

    def __str__(self) -> str:
        return f"positions={self.spec}"


def depends_on_batch(spec: PositionSpec, subspaces: Collection | None) -> bool:
    """Whether the batch decides which tokens an adapter with these positions and subspaces edits, or in which
    directions."""
    return not spec.all_tokens or bool(subspaces)


def first_and_last(prompts: Prompts, spec: PositionSpec) -> tuple[Tensor, Tensor]:
    """Find the tokens that a spec names.

    Of a prompt of n < first + last tokens, the first min(first, n // 2) and the last min(last, n // 2) are taken, so
    that they never overlap. A one-sided spec takes min(count, n) tokens, and so do the last tokens of a sequence's
    later runs.

    Args:
        prompts (`Prompts`): The prompts of the batch.
        spec (`PositionSpec`): The tokens of each prompt to find.

    Returns:
        `tuple[torch.BoolTensor, torch.BoolTensor]`: [B, S] each, the first tokens of each sequence's first run, and
            the last tokens of every run.
    """
    # The rank of a token within its run, 1 for the first.
    rank_BS, length_BS = count_and_total_within(prompts.prompt_BS, prompts.start_BS)
    longest = min(spec.first + spec.last, prompts.prompt_BS.shape[1])
    first_BS, last_BS = _counts_by_length(spec, longest, length_BS.device)[:, length_BS.clamp(max=longest)]
    if prompts.later_BS is not None:  # a sequence's later runs have last tokens only
        first_BS = first_BS.masked_fill(prompts.later_BS, 0)
        last_BS = torch.where(prompts.later_BS, length_BS.clamp(max=spec.last), last_BS)
    return (
        prompts.prompt_BS & (rank_BS <= first_BS),
        prompts.prompt_BS & (rank_BS > length_BS - last_BS),
    )


@lru_cache(maxsize=256)
def _counts_by_length(spec: PositionSpec, longest: int, device: torch.device) -> Tensor:
    """`PositionSpec.counts` of all lengths through `longest`: int64, [2, lengths]. From first + last on they stay the
    same. One lookup in this table takes the place of many small operations in each forward."""
    with torch.inference_mode(False):
        return torch.tensor([spec.counts(length) for length in range(longest + 1)], device=device).T.contiguous()


def masks_from_intervention_mask(
    intervention_mask: Tensor, shape: tuple[int, int], groups: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Split an `intervention_mask` into the first and the last tokens, by the group of weights that edits them.

    Args:
        intervention_mask (`torch.Tensor`): [B, S]. bool: the tokens to edit. Integers: 0 for no edit, 1 for the first
            tokens' weights, 2 for the last tokens'.
        shape (`tuple[int, int]`): (B, S).
        groups (`int`): G.
        device (`torch.device`): The device of the batch.

    Returns:
        `tuple[torch.BoolTensor, torch.BoolTensor]`: [B, S] each.

    Raises:
        ValueError: when its shape is not the batch's, or when it is bool and the adapter has two groups of weights.
    """
    mask_BS = as_batch("intervention_mask", intervention_mask, shape, device)
    if mask_BS.dtype == torch.bool:
        if groups == 2:
            raise ValueError(
                "intervention_mask is bool, but this adapter has separate weights for the first and the last tokens "
                "(share_weights=False). Pass an integer mask: 0 no edit, 1 the first tokens' weights, 2 the last's."
            )
        return mask_BS, torch.zeros_like(mask_BS)
    return mask_BS == 1, mask_BS == 2
