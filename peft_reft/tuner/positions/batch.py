"""What a batch says of its tokens, and the tokens that an adapter edits by it.

This module reads a batch as models, collators and trainers know it (`labels`, `attention_mask`, `prompt_lengths`, ...)
and applies the rules of docs/positions.md to it. It knows nothing of caches, calls or layers: forward/selector.py applies it to
the calls of a model, and `explain_positions` and the collator to a batch by itself.

Dimensions: B rows of the batch, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .deferred_checks import Checks
from .prompts import (
    IGNORED_LABEL,
    Prompts,
    Sequences,
    as_batch,
    by_labels,
    by_lengths,
    by_responses,
    find_sequences,
    total_within,
    whole,
)
from .selection import Selection, round_up, select, slots
from .spec import Rules, first_and_last, masks_from_intervention_mask


# What a caller says of the prompts in so many words. Only ReFT reads these arguments: the base model does not get them.
TOLD = ("prompt_lengths", "intervention_mask", "subspaces")
PACKING = "cu_seq_lens_q"  # transformers' name for where the sequences of a packed batch begin and end

WAYS_OUT = (
    "Say it in one of these ways: labels with -100 at the prompt; prompt_lengths [batch], which "
    "peft_reft.PromptLengthsCollator(data_collator) adds from labels or a completion mask; response_template in "
    "ReftConfig, the text that answers begin after; or positions='all'"
)


@dataclass(frozen=True)
class Batch:
    """The tokens of a batch, or of the part of one that an encoder or a decoder is given.

    Args:
        shape (`tuple[int, int]`): (B, S).
        device (`torch.device`): Where its tokens are.
        input_ids, attention_mask, position_ids, labels (`torch.Tensor`, *optional*): [B, S].
        cu_seq_lens (`torch.Tensor`, *optional*): [Q + 1], where packed sequences begin and end.
        prompt_lengths (`torch.Tensor`, *optional*): [B], or [Q] for packed rows.
        intervention_mask (`torch.Tensor`, *optional*): [B, S].
    """

    shape: tuple[int, int]
    device: torch.device
    input_ids: Tensor | None = None
    attention_mask: Any = None
    position_ids: Tensor | None = None
    cu_seq_lens: Tensor | None = None
    labels: Tensor | None = None
    prompt_lengths: Tensor | None = None
    intervention_mask: Tensor | None = None

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any], prefix: str = "") -> Batch | None:
        """The tokens in the arguments of a forward, or in the batch of a collator. None: there are none.

        Args:
            inputs (`Mapping`): The arguments or tensors, by their names in transformers and, of what only ReFT reads, by their own.
            prefix (`str`): What the names of its tokens begin with: `"decoder_"` for the decoder of an encoder-decoder model.
        """
        input_ids, embeds = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}inputs_embeds")
        labels = inputs.get("labels")
        if prefix and labels is not None and labels.dim() >= 2:
            # A decoder's input at a place predicts the label of that place: its prompt goes up to the first answer's input.
            labels = nn.functional.pad(labels, (1, -1), value=IGNORED_LABEL)
        tokens = next((t for t in (input_ids, embeds, labels) if t is not None and t.dim() >= 2), None)
        if tokens is None:
            return None
        return cls(
            (tokens.shape[0], tokens.shape[1]),
            tokens.device,
            input_ids=input_ids,
            attention_mask=inputs.get(f"{prefix}attention_mask"),
            position_ids=inputs.get("position_ids"),
            cu_seq_lens=inputs.get(PACKING),
            labels=labels,
            prompt_lengths=inputs.get("prompt_lengths"),
            intervention_mask=inputs.get("intervention_mask"),
        )

    @property
    def told(self) -> Literal["prompt_lengths", "intervention_mask"] | None:
        """What was said of the prompts in so many words, if anything."""
        if self.intervention_mask is not None:
            return "intervention_mask"
        return "prompt_lengths" if self.prompt_lengths is not None else None

    @cached_property
    def sequences(self) -> Sequences:
        """Its sequences: one in a row, or several in a packed one."""
        return find_sequences(
            self.shape,
            self.device,
            attention_mask=_padding_mask(self.attention_mask, self.shape),
            position_ids=self.position_ids,
            cu_seq_lens=self.cu_seq_lens,
        )


@dataclass(frozen=True)
class SelectedTokens:
    """The tokens of a batch that an adapter edits.

    Args:
        first_BS, last_BS (`torch.BoolTensor`): Those edited as first and as last tokens.
        runs (`int`, *optional*): How many runs of prompt tokens they come from at most, where that is known.
        source (`str`): What said where the prompts are: `"intervention_mask"`, `"prompt_lengths"`,
            `"response_template"`, `"labels"`, or `"all tokens"`.
        prompt_BS (`torch.BoolTensor`, *optional*): The prompts. None where an intervention_mask names the tokens.
    """

    first_BS: Tensor
    last_BS: Tensor
    runs: int | None
    source: str
    prompt_BS: Tensor | None = None

    def after(self, column: int, rules: Rules) -> Selection:
        """The Selection of those that stand in a column or after it.

        Args:
            column (`int`): The column, counted from 0.
            rules (`Rules`): The rules by which they were selected.
        """
        limit = None
        if self.runs is not None:
            packed = self.runs != self.first_BS.shape[0]
            limit = slots(rules.spec, rules.groups, round_up(self.runs) if packed else self.runs)
        return select(self.first_BS[:, column:], self.last_BS[:, column:], rules.groups, limit)

    def in_columns(self, column: int, width: int, repeats: int, rules: Rules) -> Selection:
        """The Selection of those in a stretch of columns of a batch that repeats each row, as beams do.

        Args:
            column (`int`): Where the stretch begins.
            width (`int`): How many columns it has. Those beyond the batch hold what has been generated.
            repeats (`int`): How many times each row stands in it, one after the other.
            rules (`Rules`): The rules by which they were selected.
        """
        first_BS, last_BS = (_columns(mask, column, width, repeats) for mask in (self.first_BS, self.last_BS))
        limit = None if self.runs is None else slots(rules.spec, rules.groups, self.runs * repeats)
        return select(first_BS, last_BS, rules.groups, limit)


def _columns(mask_BS: Tensor, column: int, width: int, repeats: int) -> Tensor:
    here_BS = mask_BS[:, column : column + width].repeat_interleave(repeats, dim=0)
    return nn.functional.pad(here_BS, (0, width - here_BS.shape[1]))


def select_tokens(rules: Rules, batch: Batch, training: bool, checks: Checks | None = None) -> SelectedTokens:
    """The tokens that an adapter edits in a batch.

    What tells the prompts is, in this order: `intervention_mask` or `prompt_lengths`, the response template, labels.
    Without any, all real tokens are prompt.

    Args:
        rules (`Rules`): How the adapter finds its tokens.
        batch (`Batch`): The batch, whole: not the rest of a prompt whose start is in a cache.
        training (`bool`): Whether the model is trained on it, so that answers are among the tokens.
        checks (`Checks`, *optional*): Where a condition is noted that would have to be read from the device. None: it is read at once.

    Raises:
        ValueError: when tensors do not fit the batch, and when it does not say where its prompts are, or has none.
    """
    checks = checks or Checks(queueing=())
    if batch.intervention_mask is not None:
        first_BS, last_BS = masks_from_intervention_mask(
            batch.intervention_mask, batch.shape, rules.groups, batch.device
        )
        if training:
            _refuse_empty(checks, rules, "intervention_mask", first_BS | last_BS)
        return SelectedTokens(first_BS, last_BS, None, "intervention_mask")
    sequences = batch.sequences
    prompts, source = _prompts(rules, batch, sequences, training, checks)
    first_BS, last_BS = first_and_last(prompts, rules.spec)
    if training and source != "all tokens":
        _refuse_empty(checks, rules, source, first_BS | last_BS, prompts.prompt_BS)
    elif source in ("labels", "prompt_lengths"):
        _refuse_empty(checks, rules, source, prompts.prompt_BS)
    return SelectedTokens(first_BS, last_BS, prompts.runs, source, prompts.prompt_BS)


def _prompts(rules: Rules, batch: Batch, sequences: Sequences, training: bool, checks: Checks) -> tuple[Prompts, str]:
    labels = batch.labels if rules.reads_labels else None
    if labels is not None:
        labels = as_batch("labels", labels, batch.shape, batch.device)
    if batch.prompt_lengths is not None:
        return by_lengths(sequences, batch.prompt_lengths), "prompt_lengths"
    if rules.template is not None and rules.reads_labels:
        if batch.input_ids is None:
            raise ValueError(
                "response_template is looked for in input_ids, and the batch has inputs_embeds alone. Pass prompt_lengths "
                f"[{batch.shape[0]}] with it, the tokens of each prompt."
            )
        ids_BS = batch.input_ids.to(batch.device)
        match_BS = rules.template.matches(ids_BS, sequences.start_BS)
        if training:
            _refuse_missing(checks, match_BS, sequences, labels)
        end_BS = torch.zeros_like(match_BS)
        for end_id in rules.end_ids:  # as numbers: a tensor of them would have to be copied to the device
            end_BS |= ids_BS == end_id
        return by_responses(sequences, match_BS, end_BS, rules.every), "response_template"
    if labels is not None:
        return by_labels(sequences, labels, rules.every), "labels"
    if training and rules.reads_labels:
        raise ValueError(
            f"{rules}: a training batch without labels does not say where its prompts end, and ReFT edits tokens of the "
            f"prompt. {WAYS_OUT}."
        )
    return whole(sequences), "all tokens"


def _padding_mask(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """The part of an attention mask that is about the batch's tokens. A static cache brings a wider one."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {given}, from which ReFT can't tell padding. Pass one of shape [batch, tokens] with 0 for "
            "padding, or say which tokens to edit with intervention_mask."
        )
    return mask[:, : shape[1]]


EMPTY = {
    "labels": "no label of -100 stands before an answer (is train_on_inputs set, or is this plain text?)",
    "prompt_lengths": "prompt_lengths is 0 for every row",
    "intervention_mask": "intervention_mask is 0 everywhere",
    "response_template": "it begins with an answer",
}


def _refuse_empty(
    checks: Checks, rules: Rules, source: str, edited_BS: Tensor, prompt_BS: Tensor | None = None
) -> None:
    """A batch that is to be edited and has nothing to edit."""

    def error_for(numbers: list[int]) -> ValueError | None:
        edited, prompted = numbers
        if edited:
            return None
        cause = EMPTY[source]
        if prompted:
            cause = f"by its {source}, no prompt has more than one token, too few for both first and last tokens"
        return ValueError(f"{rules}: the batch has no prompt tokens to edit: {cause}. {WAYS_OUT}.")

    checks.require(torch.stack([edited_BS.any(), (edited_BS if prompt_BS is None else prompt_BS).any()]), error_for)


def _refuse_missing(checks: Checks, match_BS: Tensor, sequences: Sequences, labels: Tensor | None) -> None:
    """A training sequence without the response template would be edited at the end of its answer."""
    missing_BS = sequences.real_BS & (total_within(match_BS & sequences.real_BS, sequences.start_BS) == 0)
    if labels is not None:  # a prompt cut off before its answer is harmless: nothing is learnt from it
        missing_BS &= total_within(labels != IGNORED_LABEL, sequences.start_BS) > 0
    missing_B = missing_BS.any(dim=1)

    def error_for(numbers: list[int]) -> ValueError | None:
        rows, first = numbers
        if rows == 0:
            return None
        return ValueError(
            f"response_template is not in row {first} of the training batch (rows without it: {rows} of {len(missing_B)}). Check it "
            "against the text of a prompt with peft_reft.explain_positions. Where a sequence was cut off before its answer, allow "
            "more tokens or leave it out; or pass prompt_lengths [batch], which peft_reft.PromptLengthsCollator(data_collator) adds."
        )

    checks.require(torch.stack([missing_B.sum(), missing_B.int().argmax()]), error_for)
