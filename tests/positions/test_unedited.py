"""Odd rows: one without a token to edit is passed over and counted, and first batches of nothing else are an error."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from models import build, prompts, randomize
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig
from peft_reft.tuner.positions.unedited import FIRST_ROWS


TEMPLATE = [5, 6]
LENGTH = 10


def adapted(base: str = "llama", **settings) -> PeftModel:
    config = ReftConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(build(base), config).double().train()
    randomize(model)
    return model


def row(prompt: int, seed: int = 1) -> dict[str, torch.Tensor]:
    """A row whose answer begins after some tokens."""
    ids = prompts(LENGTH, seed=seed)["input_ids"].clamp(min=7)  # without the template's tokens
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(LENGTH) < prompt, -100)}


def with_template(given: dict) -> dict:
    ids = given["input_ids"].clone()
    ids[:, 3:5] = torch.tensor(TEMPLATE)
    return {**given, "input_ids": ids}


# Kind of odd row -> settings, a good row, an odd row, and the reason that the warning gives.
KINDS = {
    "no prompt": ({}, row(5), row(0), "no label of -100 stands before the answer"),
    "one token": ({}, row(5), row(1), "a prompt of one token is too few for both first and last tokens"),
    "no template": (
        {"response_template": TEMPLATE, "positions": "f1+l2"},
        with_template(row(5)),
        row(5),
        "response_template is not in it",
    ),
    "length 0": (
        {"positions": "l2"},
        {**row(5), "prompt_lengths": torch.tensor([5])},
        {**row(5), "prompt_lengths": torch.tensor([0])},
        "prompt_lengths is 0",
    ),
    "empty mask": (
        {},
        {**row(5), "intervention_mask": (torch.arange(LENGTH) < 2).long()[None]},
        {**row(5), "intervention_mask": torch.zeros(1, LENGTH).long()},
        "intervention_mask is 0",
    ),
}


def joined(rows: list[dict], packed: bool) -> dict[str, torch.Tensor]:
    batch = {key: torch.cat([one[key] for one in rows]) for key in rows[0]}
    if packed:
        batch = {key: value if value.dim() == 1 else value.reshape(1, -1) for key, value in batch.items()}
        batch |= {"position_ids": torch.arange(LENGTH).repeat(len(rows))[None], "use_cache": False}
    return batch


def gradients(model: PeftModel, batch: dict, rows: slice) -> dict[str, torch.Tensor]:
    """Of the sum of all logits of some rows."""
    model.zero_grad()
    model(**batch).logits.reshape(-1, LENGTH, model.config.vocab_size)[rows].sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_odd_row_is_passed_over(kind, packed):
    """The base model computes the odd row, and the good row is trained as if it were alone."""
    settings, good, odd, reason = KINDS[kind]
    if packed and kind == "empty mask":
        pytest.skip("a packed row with an intervention_mask counts as one")
    model, both = adapted(**settings), joined([good, odd], packed)
    alone = gradients(model, good, slice(0, 1))
    with pytest.warns(UserWarning, match=rf"1 of (2|3) rows of training so far had no token to edit: {reason}"):
        together = gradients(model, both, slice(0, 1))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-9)
        assert gradient.abs().max() > 0
    for gradient in gradients(model, both, slice(1, 2)).values():
        assert gradient.count_nonzero() == 0  # it is there, for DDP, FSDP and ZeRO to reduce
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=odd["input_ids"]).logits
    torch.testing.assert_close(model(**both).logits.reshape(2, LENGTH, -1)[1:], base, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_batch_of_odd_rows_gives_zero_gradients(kind):
    settings, good, odd, reason = KINDS[kind]
    model = adapted(**settings)
    model(**joined([good, good], False)).loss.backward()
    model.zero_grad()
    with pytest.warns(UserWarning, match=rf"2 of 4 rows of training so far had no token to edit: {reason}"):
        model(**joined([odd, odd], False)).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None and p.grad.count_nonzero() == 0 for p in trained)


@pytest.mark.parametrize("kind", KINDS)
def test_first_batches_without_a_prompt_are_an_error(kind):
    settings, good, odd, _ = KINDS[kind]
    model = adapted(**settings)
    for _ in range(2):  # and as long as nothing else comes
        with pytest.raises(
            ValueError, match="the batch has no prompt tokens to edit: .*response_template in ReftConfig"
        ):
            model(**joined([odd, odd], False))
    with pytest.raises(ValueError, match="the batch has no prompt tokens to edit"):
        model(**odd)
    model(**good)
    with pytest.warns(UserWarning, match="had no token to edit"):
        model(**joined([odd, odd], False))


def test_first_batches_of_single_rows():
    """A single odd row at the start, as a shuffle may put there, ends nothing. Several in a row are no accident."""
    _, good, odd, _ = KINDS["no prompt"]
    model = adapted()
    with pytest.warns(UserWarning, match="1 of 1 row of training"):
        for _ in range(FIRST_ROWS - 1):
            model(**odd).loss.backward()
    with pytest.raises(ValueError, match="no prompt tokens to edit: no label of -100"):
        model(**odd)
    model = adapted()
    model(**odd)
    model(**good)
    for _ in range(2 * FIRST_ROWS):
        model(**odd).loss.backward()


def test_the_warning_comes_once_for_training_and_once_for_evaluation():
    _, good, odd, _ = KINDS["no prompt"]
    model, both = adapted(), joined([good, odd], False)
    with pytest.warns(UserWarning, match="1 of 2 rows of training") as caught:
        for _ in range(3):
            model(**both)
    assert len(caught) == 1
    model.eval()
    with pytest.warns(UserWarning, match="2 of 2 rows of evaluation") as caught:  # perplexity is measured on such rows
        model(**joined([odd, odd], False))
        model(**both)
    assert len(caught) == 1
    (entry,) = model.base_model._context.state.unedited.take_trained()
    assert (entry[1].rows, entry[1].unedited, entry[1].short) == (6, 3, 0)
    assert model.base_model._context.state.unedited.take_trained() == []


def test_rows_that_teach_nothing_are_not_counted():
    """An answer that was cut off leaves no label; and padding at the end of a packed row has none either."""
    _, good, _, _ = KINDS["no prompt"]
    unlabelled = {**good, "labels": torch.full((1, LENGTH), -100)}
    short = {**unlabelled, "input_ids": good["input_ids"]}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no token to edit")
        adapted()(**joined([good, short], True)).loss.backward()
        adapted()(**joined([unlabelled, unlabelled], False))


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_a_prompt_of_one_token_outside_training(call):
    def run(model: PeftModel, length: int) -> None:
        ids = prompts(length)["input_ids"]
        if call == "forward":
            model(input_ids=ids)
        else:
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)

    model = adapted().eval()
    with pytest.warns(UserWarning, match="1 of 1 row of inference .* a prompt of one token is too few") as caught:
        for _ in range(3):
            run(model, 1)
    assert len([one for one in caught if "no token to edit" in str(one.message)]) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*no token to edit")
        run(adapted().eval(), 2)
        run(adapted(positions="l1").eval(), 1)


def test_classes_of_texts_of_one_token():
    """Labels that are classes tell nothing of prompts, and a text of one token is an odd row there, too."""
    model = get_peft_model(build("llama"), ReftConfig(r=4, task_type="FEATURE_EXTRACTION")).train()
    batch = prompts(4, 1)
    with pytest.warns(UserWarning, match="1 of 2 rows of training"):
        model(**batch).logits.sum().backward()


def test_copies_count_for_themselves():
    _, good, odd, _ = KINDS["no prompt"]
    model = adapted("gpt2")  # with the package `kernels` transformers 5.16 makes a Llama that can't be pickled
    model(**good)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="no prompt tokens to edit"):
            made(**joined([odd, odd], False))
        state = made.base_model._context.state
        assert state.unedited.checks is state.checks
