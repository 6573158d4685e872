"""The position rules, against a plain implementation of them: one sequence at a time, one token at a time."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from peft_reft.tuner.positions.batch import Batch, select_tokens
from peft_reft.tuner.positions.selection import selection_from_masks
from peft_reft.tuner.positions.spec import PositionSpec, Rules, masks_from_intervention_mask


def by_hand(prompt: list[int], spec: PositionSpec) -> tuple[list[int], list[int]]:
    """The first and the last tokens of a prompt, given as a list of columns."""
    n = len(prompt)
    if spec.first and spec.last:
        if n < spec.first + spec.last:
            first, last = min(spec.first, n // 2), min(spec.last, n // 2)
        else:
            first, last = spec.first, spec.last
    else:
        first, last = min(spec.first, n), min(spec.last, n)
    return prompt[:first], prompt[n - last :]


def columns(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def chosen(spec: str, shape: tuple[int, int], **batch: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    rules = Rules(PositionSpec.parse(spec), groups=2)
    selected = select_tokens(rules, Batch(shape, torch.device("cpu"), **batch), training=False)
    return columns(selected.first_BS), columns(selected.last_BS)


@pytest.mark.parametrize(
    "text, first, last, all_tokens",
    [("f7+l7", 7, 7, False), ("l2+f11", 11, 2, False), ("f3", 3, 0, False), ("l1", 0, 1, False), ("all", 0, 0, True)],
)
def test_parse(text, first, last, all_tokens):
    assert PositionSpec.parse(text) == PositionSpec(first, last, all_tokens)


@pytest.mark.parametrize(
    "text", ["", "f", "f0", "f-1", "7", "f7+f3", "f7,l7", "F7", "f7+all", "f7+", "first7", None, 7]
)
def test_positions_that_do_not_parse_are_named(text):
    with pytest.raises(ValueError, match=r"positions=.* does not parse.*'f7\+l7'"):
        PositionSpec.parse(text)


@pytest.mark.parametrize("spec", ["f1", "l1", "f3", "l4", "f1+l1", "f2+l3", "f3+l1", "f7+l7"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given_by", ["attention_mask", "labels", "prompt_lengths"])
def test_rules_on_padded_batches(spec, side, given_by):
    generator = random.Random(f"{spec} {side} {given_by}")
    for _ in range(30):
        rows, width = generator.randint(1, 4), generator.randint(1, 20)
        real = [generator.randint(0, width) for _ in range(rows)]
        spans = [range(n) if side == "right" else range(width - n, width) for n in real]
        prompt = [list(span)[: generator.randint(0, len(span))] for span in spans]
        mask = torch.tensor([[int(column in span) for column in range(width)] for span in spans])
        batch = {"attention_mask": mask}
        if given_by == "attention_mask":
            prompt = [list(span) for span in spans]
        elif given_by == "prompt_lengths":
            batch["prompt_lengths"] = torch.tensor([len(tokens) for tokens in prompt])
        else:
            labels = torch.full((rows, width), -100)
            for row, span in enumerate(spans):
                for column in list(span)[len(prompt[row]) :]:
                    labels[row, column] = 5
            batch["labels"] = labels
        expected = [by_hand(tokens, PositionSpec.parse(spec)) for tokens in prompt]
        first, last = chosen(spec, (rows, width), **batch)
        assert first == [pair[0] for pair in expected]
        assert last == [pair[1] for pair in expected]


def test_labels_masked_inside_the_answer_do_not_reopen_the_prompt():
    labels = torch.tensor([[-100, -100, -100, 7, -100, -100, 8, -100]])
    assert chosen("f1+l2", (1, 8), labels=labels) == ([[0]], [[1, 2]])


def test_a_row_without_an_answer_is_all_prompt():
    labels = torch.full((1, 6), -100)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]])
    assert chosen("f1+l1", (1, 6), labels=labels, attention_mask=mask) == ([[0]], [[3]])


def packed_row(lengths: list[int], padding: int) -> dict[str, torch.Tensor]:
    numbers = [number for number, length in enumerate(lengths, 1) for _ in range(length)] + [0] * padding
    positions = [step for length in lengths for step in range(length)] + [0] * padding
    labels, prompt_of = [], []
    start = 0
    for length in lengths:
        prompt = max(1, length // 2)
        labels += [-100] * prompt + [5] * (length - prompt)
        # in a packed row, a sequence without an answer has no prompt
        prompt_of.append(list(range(start, start + prompt)) if prompt < length else [])
        start += length
    return {
        "numbers": torch.tensor([numbers]),
        "position_ids": torch.tensor([positions]),
        "cu_seq_lens": torch.tensor([0, *itertools.accumulate(lengths)]),
        "labels": torch.tensor([labels + [-100] * padding]),
        "prompts": prompt_of,
    }


@pytest.mark.parametrize("how", ["numbered mask", "position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("spec", ["f1", "l2", "f2+l2", "f7+l7"])
def test_packed_rows_are_split_into_their_sequences(how, spec):
    padding = 3 if how == "numbered mask" else 0
    row = packed_row([5, 9, 2, 1, 6], padding)
    batch = {"labels": row["labels"]}
    batch |= {
        "numbered mask": {"attention_mask": row["numbers"]},
        "position_ids": {"position_ids": row["position_ids"]},
        "cu_seq_lens": {"cu_seq_lens": row["cu_seq_lens"]},
    }[how]
    first, last = chosen(spec, tuple(row["labels"].shape), **batch)
    expected = [by_hand(prompt, PositionSpec.parse(spec)) for prompt in row["prompts"]]
    assert first == [[column for pair in expected for column in pair[0]]]
    assert last == [[column for pair in expected for column in pair[1]]]


def test_padding_that_looks_like_a_sequence():
    """axolotl fills a packed row up with padding whose position ids restart, and passes no mask."""
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]])
    labels = torch.tensor([[-100, -100, 5, 5, -100, 5, 5, -100, -100, -100]])
    assert chosen("f1+l1", (1, 10), position_ids=position_ids, labels=labels) == ([[0]], [[1]])
    assert chosen("f1", (1, 10), position_ids=position_ids, labels=labels) == ([[0, 4]], [[]])
    # without labels, padding cannot be told apart
    assert chosen("f1", (1, 10), position_ids=position_ids) == ([[0, 4, 7]], [[]])


@pytest.mark.parametrize("groups", [1, 2])
def test_selection_indexes_the_flat_batch_and_marks_empty_slots(groups):
    first = torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]]).bool()
    last = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0]]).bool()
    selection = selection_from_masks(first, last, groups, limit=5)
    slots, empty = selection.index_T.view(groups, -1), selection.empty_T1.view(groups, -1)
    filled = [indices[~none].tolist() for indices, none in zip(slots, empty)]
    assert filled == ([[1, 5], [2, 3]] if groups == 2 else [[1, 2, 3, 5]])
    assert torch.equal(selection.edited_BS, first | last)
    edited = set(filled[0]) | set(filled[-1])
    assert set(selection.index_T.tolist()) <= edited  # an empty slot repeats one of these tokens


def test_selection_of_nothing_has_only_empty_slots():
    nothing = torch.zeros(2, 3).bool()
    selection = selection_from_masks(nothing, nothing, 2, limit=2)
    assert selection.empty_T1.all() and selection.index_T.max() < 6


def test_intervention_mask():
    numbered = torch.tensor([[0, 1, 2, 1]])
    first, last = masks_from_intervention_mask(numbered, (1, 4), 2, torch.device("cpu"))
    assert columns(first) == [[1, 3]] and columns(last) == [[2]]
    first, last = masks_from_intervention_mask(numbered.bool(), (1, 4), 1, torch.device("cpu"))
    assert columns(first | last) == [[1, 2, 3]]
    with pytest.raises(ValueError, match="intervention_mask is bool.*share_weights=False.*integer mask"):
        masks_from_intervention_mask(numbered.bool(), (1, 4), 2, torch.device("cpu"))


@pytest.mark.parametrize(
    "batch",
    [
        {"labels": torch.zeros(2, 5).long()},
        {"attention_mask": torch.ones(3, 4)},
        {"prompt_lengths": torch.tensor([1, 2, 3])},
        {"prompt_lengths": torch.tensor(3)},
    ],
)
def test_tensors_of_another_shape_are_named(batch):
    with pytest.raises(ValueError, match=rf"{next(iter(batch))} has shape .* batch has 2 rows"):
        chosen("f1", (2, 4), **batch)
