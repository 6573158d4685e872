"""A slow and obvious ReFT: one sequence at a time, one token at a time, in plain Python.

It shares nothing with peft_reft but the names of the edits and the layout of their weights, which tests pass to it as
plain tensors. Prompts are found by loops over lists, and each edit is a formula of its own.

Dimensions: G sets of weights, r rank, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Sequence:
    """One sequence, with every form in which its prompt may be given.

    Args:
        ids: Its tokens.
        labels: For each token, -100 or the token.
        prompt_length: Its entry of `prompt_lengths`.
        mask: Its part of `intervention_mask`: 0, 1 (first token) or 2 (last token) for each token.
    """

    ids: list[int]
    labels: list[int]
    prompt_length: int
    mask: list[int]


@dataclass
class Rule:
    """How the tokens to edit are chosen.

    Args:
        first, last: How many first and last tokens of a prompt.
        everything: Whether all tokens are edited.
        told: How the prompt is given: "nothing", "lengths", "labels", "template" or "mask".
        every: Whether every turn of a conversation has a prompt, else only the first.
        template: The tokens that answers begin after.
        end: The token that ends an answer.
        packed: Whether several sequences are in one row.
    """

    first: int
    last: int
    everything: bool
    told: str
    every: bool
    template: tuple[int, ...]
    end: int
    packed: bool = False


def runs_of_prompt(sequence: Sequence, rule: Rule) -> list[list[int]]:
    """The runs of prompt tokens, each a list of indices. An answer follows each, or there is no answer at all."""
    n = len(sequence.ids)
    if rule.told == "nothing":
        return [list(range(n))]
    if rule.told == "lengths":
        return [list(range(min(sequence.prompt_length, n)))]
    runs = runs_before_labels(sequence.labels) if rule.told == "labels" else runs_before_matches(sequence.ids, rule)
    if runs is None:
        return [] if rule.packed and rule.told == "labels" else [list(range(n))]
    return runs if rule.every else [run for run in runs if run[0] == 0]


def runs_before_labels(labels: list[int]) -> list[list[int]] | None:
    if all(label == -100 for label in labels):
        return None
    runs: list[list[int]] = []
    run: list[int] = []
    for index, label in enumerate(labels):
        if label == -100:
            run.append(index)
        elif run:
            runs.append(run)
            run = []
    return runs  # no answer follows the -100s at the end, so they are no prompt


def runs_before_matches(ids: list[int], rule: Rule) -> list[list[int]] | None:
    size = len(rule.template)
    ends = [index for index in range(size - 1, len(ids)) if tuple(ids[index - size + 1 : index + 1]) == rule.template]
    if not ends:
        return None
    runs = [list(range(ends[0] + 1))]
    for previous, end in zip(ends, ends[1:]):
        begin = previous + 1
        for index in range(previous + 1, end + 1):
            if ids[index] == rule.end:
                begin = index + 1
                break
        if begin <= end:
            runs.append(list(range(begin, end + 1)))
    return runs


def chosen(sequence: Sequence, rule: Rule) -> list[tuple[int, int]]:
    """The tokens to edit: (index, 0 for a first token or 1 for a last one)."""
    if rule.everything:
        return [(index, 0) for index in range(len(sequence.ids))]
    if rule.told == "mask":
        return [(index, number - 1) for index, number in enumerate(sequence.mask) if number > 0]
    indices: list[tuple[int, int]] = []
    for run in runs_of_prompt(sequence, rule):
        n = len(run)
        if n == 0:
            continue
        if run[0] != 0:
            first, last = 0, min(rule.last, n)
        elif rule.first and rule.last and n < rule.first + rule.last:
            first, last = min(rule.first, n // 2), min(rule.last, n // 2)
        else:
            first, last = min(rule.first, n), min(rule.last, n)
        indices += [(index, 0) for index in run[:first]]
        indices += [(index, 1) for index in run[n - last :]]
    return indices


@dataclass
class Edit:
    """One layer's edit of one token."""

    intervention: str
    R: Tensor  # [G, r, d]
    W: Tensor | None
    b: Tensor | None
    act: Callable[[Tensor], Tensor]

    def __call__(self, h: Tensor, side: int) -> Tensor:
        group = side if self.R.shape[0] == 2 else 0
        R = self.R[group]
        b = 0 if self.b is None else self.b[group]
        source = b if self.W is None else self.act(self.W[group] @ h + b)
        if self.intervention in ("loreft", "noreft", "consreft"):
            return h + R.T @ (source - R @ h)
        return h + R.T @ source


@contextmanager
def edited(blocks: list[nn.Module], edits: list[Edit], indices: list[tuple[int, int, int]]) -> Iterator[None]:
    """Edit the outputs of these blocks at these (row, index, side), token by token, by a hook on each."""

    def hook(edit: Edit) -> Callable:
        def after(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
            h = output[0] if isinstance(output, tuple) else output
            rows = [list(row.unbind(0)) for row in h.unbind(0)]
            for row, index, side in indices:
                rows[row][index] = edit(rows[row][index], side)
            h = torch.stack([torch.stack(row) for row in rows])
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return after

    handles = [block.register_forward_hook(hook(edit)) for block, edit in zip(blocks, edits)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def tangent(gradient: Tensor, R: Tensor) -> Tensor:
    """The part of a gradient with respect to R [r, d] that keeps its rows orthonormal: E − sym(E Rᵀ)R."""
    product = gradient @ R.T
    return gradient - 0.5 * (product + product.T) @ R
