"""Rows that hold no token to edit: counted and warned of, and an error where a run has nothing else at its start.

One odd row, such as a prompt that was cut off, must not end a run. So a row without a token to edit is passed over:
the base model computes it, and it adds zero to the gradient of every weight of the adapter, which DDP, FSDP and ZeRO
can reduce as any other. Only where the first batches hold nothing but such rows is the setting wrong.

The first batches are all batches up to the first with a token to edit. They raise an error as soon as one of several
rows comes that has none, or, where each is of one row, as soon as `FIRST_ROWS` of them have come. Batches of training
and of evaluation are counted apart. A batch of several processes is never counted together: no process waits here for
another.

A row here is one sequence: a packed row counts as many times as it has sequences. Rows from which nothing is learnt,
because none of their tokens has a label, are not counted.

Dimensions: B rows of the batch, S tokens of a row, N sequences of the batch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .deferred_checks import Checks
from .notices import ways_out
from .prompts import TEMPLATE_OR_LABELS, Sequences
from .spec import Rules


FIRST_ROWS = 4  # with 1 row of 20 at fault, 4 of 4 are in 1 run of 160,000

# Why a batch has no token to edit, and why a row has none, by `SelectedTokens.origin`.
EMPTY_BATCH = {
    "labels": "no label of -100 stands before an answer (is train_on_inputs set, or is this plain text?)",
    "prompt_lengths": "prompt_lengths is 0 for every row",
    "intervention_mask": "intervention_mask is 0 everywhere",
    "response_template": (
        "response_template is in none of its rows. Check it against the text of a prompt with "
        "peft_reft.explain_positions"
    ),
    TEMPLATE_OR_LABELS: ("the response template is in none of its rows, and no label of -100 stands before an answer"),
}
EMPTY_ROW = {
    "labels": "no label of -100 stands before the answer",
    "prompt_lengths": "prompt_lengths is 0",
    "intervention_mask": "intervention_mask is 0",
    "response_template": "response_template is not in it",
    TEMPLATE_OR_LABELS: "the response template is not in it, and no label of -100 stands before the answer",
}
SHORT = "a prompt of one token is too few for both first and last tokens"

Use = Literal["training", "evaluation", "inference"]


@dataclass
class Counts:
    """Rows of the batches of one use.

    Args:
        rows (`int`): All of them.
        unedited (`int`): Those without a token to edit.
        short (`int`): Those of them that have a prompt, of one token.
        unedited_at_first (`int`): The rows of the first batches. Stays once a token was edited.
        begun (`bool`): Whether any row had a token to edit.
        warned (`bool`): Whether the warning was given.
    """

    rows: int = 0
    unedited: int = 0
    short: int = 0
    unedited_at_first: int = 0
    begun: bool = False
    warned: bool = False


class UneditedRows:
    """Counts the rows of one model's batches that hold no token to edit.

    Args:
        checks (`Checks`): Reads the counts from a device, later where the device queues work.
    """

    def __init__(self, checks: Checks) -> None:
        self.checks = checks
        self._counts: dict[tuple[Rules, Use], Counts] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"checks": self.checks, "_counts": {}}

    def note(
        self,
        rules: Rules,
        use: Use,
        origin: str,
        sequences: Sequences,
        edited_BS: Tensor,
        prompt_BS: Tensor,
        learnt_BS: Tensor | None,
    ) -> None:
        """Count the rows of a batch.

        Args:
            rules (`Rules`): The rules of the adapter.
            use (`str`): `"training"`; `"evaluation"` of a batch that says where its prompts are; or `"inference"`,
                whose rows are never an error.
            origin (`str`): `SelectedTokens.origin`.
            sequences (`Sequences`): The sequences of the batch.
            edited_BS, prompt_BS (`torch.BoolTensor`): [B, S], the tokens to edit, and the prompts.
            learnt_BS (`torch.BoolTensor`, *optional*): [B, S], the tokens with a label. None: the batch has no labels,
                and each row with a token counts.

        Raises:
            ValueError: when the first batches have no token to edit.
        """
        counts = self._counts.setdefault((rules, use), Counts())
        if use == "inference" and (counts.warned or not rules.spec.two_sided):
            return  # each prompt has a token, and one is enough for a one-sided spec
        # Most batches have a token to edit in each row, and one look shows it where no device is waited for.
        at_once = learnt_BS is None and not self.checks.are_deferred_on(edited_BS.device)
        if at_once and bool(sequences.any_of_each(edited_BS[None]).all()):
            _add(rules, use, origin, counts, sequences.count, unedited=0, short=0)
            return
        counted_BS = sequences.real_BS if learnt_BS is None else sequences.real_BS & learnt_BS
        has_3N = sequences.any_of_each(torch.stack([counted_BS, edited_BS, prompt_BS]))
        unedited_N = has_3N[0] & ~has_3N[1]
        numbers = torch.stack([has_3N[0], unedited_N, unedited_N & has_3N[2]]).sum(dim=1)
        self.checks.require(numbers, lambda read: _add(rules, use, origin, counts, *read))

    def restart(self) -> None:
        """Forget all counts: a new training begins, whose first batches are looked at anew."""
        self.checks.settle()
        self._counts.clear()

    def take_trained(self) -> list[tuple[Rules, Counts]]:
        """The counts of training batches since the last call, by the rules of their adapters. An entry has at least
        one row without a token to edit."""
        self.checks.settle()
        taken = []
        for (rules, use), counts in self._counts.items():
            if use == "training":
                if counts.unedited:
                    taken.append((rules, Counts(counts.rows, counts.unedited, counts.short)))
                counts.rows = counts.unedited = counts.short = 0
        return taken


def _add(
    rules: Rules, use: Use, origin: str, counts: Counts, rows: int, unedited: int, short: int
) -> ValueError | None:
    """Add the rows of a batch to the counts, and warn of the first that have no token to edit.

    Returns:
        `ValueError`, *optional*: The error to raise, where the first batches have no token to edit.
    """
    # In evaluation, labels for all tokens are those of a text without a prompt, as perplexity is measured on.
    refused = use == "training" or (origin == "prompt_lengths" and use == "evaluation" and not short)
    if refused and not counts.begun and 0 < rows == unedited:
        counts.unedited_at_first += rows
        if rows > 1 or counts.unedited_at_first >= FIRST_ROWS:
            cause = EMPTY_BATCH.get(origin, "")
            if short:
                cause = f"by its {origin}, no prompt has more than one token, too few for both first and last tokens"
            return ValueError(
                f"{rules}: the batch has no prompt tokens to edit: {cause}. {ways_out(rules.why_no_template)}."
            )
    counts.begun |= rows > unedited
    counts.rows += rows
    counts.unedited += unedited
    counts.short += short
    if unedited and not counts.warned:
        counts.warned = True
        warnings.warn(
            f"{rules}: {counted(counts)} of {use} so far had no token to edit: {causes(origin, unedited, short)}. "
            "Such rows are passed over: the base model computes them alone, and the adapter learns nothing from them. "
            "This warning comes once; Trainer logs the count at the end of each epoch."
        )
    return None


def counted(counts: Counts) -> str:
    """How many of how many rows have no token to edit, in words."""
    return f"{counts.unedited:,} of {counts.rows:,} row{'s' * (counts.rows != 1)}"


def causes(origin: str, unedited: int, short: int) -> str:
    """Why rows of a batch have no token to edit."""
    without = EMPTY_ROW.get(origin, "no token is real")
    return "; ".join(cause for cause, applies in ((without, unedited > short), (SHORT, short > 0)) if applies)
