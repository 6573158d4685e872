"""From a batch to the tokens that an adapter edits in it.

This module knows a batch by the names that models, collators and trainers use (`labels`, `attention_mask`,
`prompt_lengths`, ...), and applies the rules of docs/positions.md to it. It knows nothing of caches, calls or layers:
forward/selector.py and forward/generation.py apply it to the calls of a model, and tools/ to a batch outside any
forward.

Dimensions: B rows of the batch, S tokens of a row, N sequences of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .notices import (
    DISAGREEING,
    EMBEDDINGS,
    SEVERAL_ANSWERS,
    UNTOLD,
    Notices,
    several_answers,
    ways_out,
)
from .prompts import (
    IGNORED_LABEL,
    TEMPLATE_OR_LABELS,
    Prompts,
    Sequences,
    as_batch,
    by_labels,
    by_lengths,
    by_responses,
    either,
    find_sequences,
    total_within,
    whole,
)
from .selection import Selection, max_slots, round_up, selection_from_masks
from .spec import Rules, first_and_last, masks_from_intervention_mask
from .unedited import UneditedRows, Use


# Arguments of a forward, or tensors of a batch, that only ReFT reads: the base model does not get them.
REFT_ARGUMENTS = ("prompt_lengths", "intervention_mask", "subspaces")
PACKING = "cu_seq_lens_q"  # transformers' name for the cumulative lengths of the sequences of a packed batch


@dataclass(frozen=True)
class Batch:
    """The tokens of a batch. In an encoder-decoder model, those of the encoder or of the decoder.

    Args:
        shape (`tuple[int, int]`): (B, S).
        device (`torch.device`): The device of its tokens.
        input_ids, position_ids, labels (`torch.LongTensor`, *optional*): [B, S].
        attention_mask (*optional*): [B, S] of any dtype, 0 for padding. Another mask than a tensor of two dimensions
            is refused where the sequences are looked for.
        cu_seq_lens (`torch.Tensor`, *optional*): [N + 1], cumulative lengths of packed sequences.
        prompt_lengths (`torch.Tensor`, *optional*): [B], or [N] for packed rows, in tokens.
        intervention_mask (`torch.Tensor`, *optional*): [B, S], bool or integers.
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
        """Read a batch from the arguments of a forward, or from the tensors that a collator returns.

        Args:
            inputs (`Mapping`): The arguments or tensors, by their names in transformers, and those that only ReFT
                reads (`REFT_ARGUMENTS`).
            prefix (`str`): `"decoder_"` to read the tokens of the decoder of an encoder-decoder model.

        Returns:
            `Batch`, or None where `inputs` holds no tokens: neither ids nor embeddings, nor labels of two dimensions.
        """
        input_ids, embeds = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}inputs_embeds")
        labels = inputs.get("labels")
        if prefix and labels is not None and labels.dim() >= 2:
            # A decoder's input in a column predicts the label of the same column: its prompt includes the input that
            # predicts the first label.
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
    def given_by_caller(self) -> Literal["prompt_lengths", "intervention_mask"] | None:
        """The argument by which the caller gives the prompts, if any."""
        if self.intervention_mask is not None:
            return "intervention_mask"
        return "prompt_lengths" if self.prompt_lengths is not None else None

    @cached_property
    def sequences(self) -> Sequences:
        """The sequences of the batch: one in each row, or several in a packed row."""
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
        first_BS, last_BS (`torch.BoolTensor`): [B, S], the tokens edited as first and as last tokens.
        runs (`int`, *optional*): An upper bound on the runs of prompt tokens (prompts.py) that they come from, where
            one is known.
        origin (`str`): By what the prompts were found: `"intervention_mask"`, `"prompt_lengths"`,
            `"response_template"`, `"labels"`, `TEMPLATE_OR_LABELS` where some sequences may lack the template, or
            `"all tokens"`.
        prompt_BS (`torch.BoolTensor`, *optional*): [B, S], the prompts. None where an intervention_mask names the
            tokens.
    """

    first_BS: Tensor
    last_BS: Tensor
    runs: int | None
    origin: str
    prompt_BS: Tensor | None = None

    def after(self, column: int, rules: Rules) -> Selection:
        """The Selection of the tokens in a column and in the columns after it.

        Args:
            column (`int`): The column, counted from 0. The batch that is edited begins there.
            rules (`Rules`): The rules by which they were selected.
        """
        limit = None
        if self.runs is not None:
            packed = self.runs != self.first_BS.shape[0]
            limit = max_slots(rules.spec, rules.groups, round_up(self.runs) if packed else self.runs)
        return selection_from_masks(self.first_BS[:, column:], self.last_BS[:, column:], rules.groups, limit)

    def in_columns(self, column: int, width: int, repeats: int, rules: Rules) -> Selection:
        """The Selection of the tokens in a range of columns, for a batch that repeats each row, as beams do.

        Args:
            column (`int`): The first column of the range.
            width (`int`): The number of columns. Columns beyond this batch hold generated tokens, which are not
                edited.
            repeats (`int`): How many copies of each row follow one another.
            rules (`Rules`): The rules by which they were selected.
        """
        first_BS, last_BS = (_columns(mask, column, width, repeats) for mask in (self.first_BS, self.last_BS))
        limit = None if self.runs is None else max_slots(rules.spec, rules.groups, self.runs * repeats)
        return selection_from_masks(first_BS, last_BS, rules.groups, limit)


def _columns(mask_BS: Tensor, column: int, width: int, repeats: int) -> Tensor:
    here_BS = mask_BS[:, column : column + width]
    if repeats > 1:
        here_BS = here_BS.repeat_interleave(repeats, dim=0)
    generated = width - here_BS.shape[1]
    return nn.functional.pad(here_BS, (0, generated)) if generated else here_BS


def select_tokens(
    rules: Rules, batch: Batch, training: bool, rows: UneditedRows | None = None, notices: Notices | None = None
) -> SelectedTokens:
    """Find the tokens that an adapter edits in a batch.

    The first of these that is given decides where the prompts are: `intervention_mask`, `prompt_lengths`, the response
    template, labels. Without any, all real tokens are prompt (docs/positions.md). A row without a token to edit is
    passed over (unedited.py).

    Args:
        rules (`Rules`): How the adapter finds its tokens.
        batch (`Batch`): The whole batch: not the rest of a prompt whose start is in a cache.
        training (`bool`): Whether the model is trained on the batch, so that answers are among its tokens.
        rows (`UneditedRows`, *optional*): Counts the rows without a token to edit, over the batches of a model, and
            defers the reading so that a GPU is not waited for. None: they are neither counted nor refused.
        notices (`Notices`, *optional*): Gives the warnings about a batch that is no prompt of `generate`. None: there
            are none to give.

    Raises:
        ValueError: when a tensor has another shape than the batch, when a training batch does not say where its
            prompts are, and when a model's first batches that say where they are have no prompt tokens to edit.
    """
    if batch.intervention_mask is not None:
        first_BS, last_BS = masks_from_intervention_mask(
            batch.intervention_mask, batch.shape, rules.groups, batch.device
        )
        if training and rows is not None:
            edited_BS = first_BS | last_BS
            each = Sequences(torch.ones_like(edited_BS), None, batch.shape[0])  # an attention mask may be unreadable
            rows.note(rules, "training", "intervention_mask", each, edited_BS, edited_BS, _learnt(rules, batch))
        return SelectedTokens(first_BS, last_BS, None, "intervention_mask")
    sequences = batch.sequences
    prompts, origin = _prompts(rules, batch, sequences, training, notices)
    first_BS, last_BS = first_and_last(prompts, rules.spec)
    if rows is not None:
        learnt_BS = _learnt(rules, batch)
        told = origin in ("labels", "prompt_lengths") or learnt_BS is not None
        use: Use = "training" if training else "evaluation" if told else "inference"
        rows.note(rules, use, origin, sequences, first_BS | last_BS, prompts.prompt_BS, learnt_BS)
    return SelectedTokens(first_BS, last_BS, prompts.runs, origin, prompts.prompt_BS)


def _learnt(rules: Rules, batch: Batch) -> Tensor | None:
    """[B, S], the tokens of a batch that have a label. None where it has no labels, or labels that are classes."""
    if batch.labels is None or not rules.reads_labels:
        return None
    return as_batch("labels", batch.labels, batch.shape, batch.device) != IGNORED_LABEL


def _prompts(
    rules: Rules, batch: Batch, sequences: Sequences, training: bool, notices: Notices | None
) -> tuple[Prompts, str]:
    """The prompts of a batch, and their `SelectedTokens.origin`."""
    labels = batch.labels if rules.reads_labels else None
    if labels is not None:
        labels = as_batch("labels", labels, batch.shape, batch.device)
    template = rules.template if rules.reads_labels else None
    if batch.prompt_lengths is not None:
        prompts = by_lengths(sequences, batch.prompt_lengths)
        if training and notices is not None and template is not None and rules.template_optional:
            _compare_with_template(rules, batch, sequences, prompts, notices)
        return prompts, "prompt_lengths"
    if template is not None and batch.input_ids is None:
        if not rules.template_optional:
            raise ValueError(
                "response_template is looked for in input_ids, and the batch has inputs_embeds alone. Pass "
                f"prompt_lengths [{batch.shape[0]}] with it, the tokens of each prompt."
            )
        if notices is not None:
            notices.warn(EMBEDDINGS)
        template = None
    if template is not None:
        match_BS, end_BS = _matches(rules, batch, sequences)
        if labels is not None and rules.template_optional:
            return _by_template_or_labels(rules, sequences, match_BS, end_BS, labels, notices)
        prompts = by_responses(sequences, match_BS, end_BS, rules.every)
        found_BS = total_within(match_BS, sequences.packed_start_BS) > 0
        if training or labels is not None:
            # The row holds an answer, and where it begins is unknown. Its last tokens are not those of a prompt.
            prompts = replace(prompts, prompt_BS=prompts.prompt_BS & found_BS)
        elif notices is not None:
            notices.warn(UNTOLD, lambda: sequences.real_BS & ~found_BS)
        return prompts, "response_template"
    if labels is not None:
        if notices is not None:
            _warn_of_several_answers(rules, notices, lambda: several_answers(sequences, labels))
        return by_labels(sequences, labels, rules.every), "labels"
    if training and rules.reads_labels:
        raise ValueError(
            f"{rules}: a training batch without labels does not say where its prompts end, and ReFT edits tokens of "
            f"the prompt. {ways_out(rules.why_no_template)}."
        )
    if rules.reads_labels and notices is not None:
        notices.warn(UNTOLD)
    return whole(sequences), "all tokens"


def _matches(rules: Rules, batch: Batch, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The last tokens of the matches of the response template, and the tokens that end answers: bool, [B, S] each."""
    assert rules.template is not None and batch.input_ids is not None
    ids_BS = batch.input_ids.to(batch.device)
    match_BS = rules.template.matches(ids_BS, sequences.start_BS) & sequences.real_BS
    end_BS = torch.zeros_like(match_BS)
    for end_id in rules.end_ids:  # numbers: a tensor would have to be copied to the device
        end_BS |= ids_BS == end_id
    return match_BS, end_BS


def _by_template_or_labels(
    rules: Rules,
    sequences: Sequences,
    match_BS: Tensor,
    end_BS: Tensor,
    labels: Tensor,
    notices: Notices | None,
) -> tuple[Prompts, str]:
    """The prompts where a sequence may lack the response template: by the template where a sequence has it, which is
    what `generate` goes by too, else by labels.

    Where labels mask a prompt, a template among the labelled tokens is a part of the answer. Where they mask none, all
    tokens are trained, and each template counts. A first token alone is no prompt: collators mask it in packed rows.
    """
    start_BS = sequences.packed_start_BS
    answer_BS = sequences.real_BS & (labels != IGNORED_LABEL)
    by_label = by_labels(sequences, labels, every=False)
    masked_BS = (total_within(by_label.prompt_BS, start_BS) > 1) & (total_within(answer_BS, start_BS) > 0)
    opening_BS = match_BS & ~(masked_BS & answer_BS)
    found_BS = total_within(opening_BS, start_BS) > 0
    by_template = by_responses(sequences, opening_BS, end_BS, rules.every)
    if notices is not None:
        matched_BS = total_within(match_BS, start_BS) > 0

        def elsewhere() -> Tensor:
            first_BS = by_responses(sequences, opening_BS, end_BS, every=False).prompt_BS
            return masked_BS & matched_BS & (~found_BS | by_label.prompt_BS & ~first_BS)

        decides = "the template, or by labels where they train the template itself,"
        text = DISAGREEING.format(origin="Labels", template=rules.template, decides=decides)
        notices.warn(text, elsewhere, key="labels and template")
        _warn_of_several_answers(rules, notices, lambda: several_answers(sequences, labels, ~found_BS))
    others = by_labels(sequences, labels, rules.every) if rules.every else by_label
    return either(sequences, found_BS, by_template, others), TEMPLATE_OR_LABELS


def _warn_of_several_answers(rules: Rules, notices: Notices, if_any: Callable[[], Tensor]) -> None:
    edited = "the end of each of their prompts" if rules.every else "the prompt of the first of them"
    notices.warn(SEVERAL_ANSWERS.format(edited=edited), if_any)


def _compare_with_template(rules: Rules, batch: Batch, sequences: Sequences, given: Prompts, notices: Notices) -> None:
    """Warn where the caller's lengths end a prompt at another token than the template does, which generate goes by."""

    def elsewhere() -> Tensor:
        if batch.input_ids is None:
            return torch.zeros_like(given.prompt_BS)
        match_BS, end_BS = _matches(rules, batch, sequences)
        matched_BS = total_within(match_BS, sequences.packed_start_BS) > 0
        return (given.prompt_BS ^ by_responses(sequences, match_BS, end_BS, every=False).prompt_BS) & matched_BS

    text = DISAGREEING.format(origin="prompt_lengths", template=rules.template, decides="prompt_lengths")
    notices.warn(text, elsewhere, key="prompt_lengths and template")


def _padding_mask(mask: Any, shape: tuple[int, int]) -> Tensor | None:
    """The columns of an attention mask that belong to the batch's tokens: with a static cache, it is wider."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        given = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask is {given}, from which ReFT can't tell padding. Pass one of shape [batch, tokens] with 0 "
            "for padding, or say which tokens to edit with intervention_mask."
        )
    return mask[:, : shape[1]]
