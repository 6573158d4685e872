"""How prompts are found: which of several signs goes first, and which batches are refused rather than guessed at."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import build, randomize
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig


TEMPLATE = [5, 6]
#        0  1  2  3  4  5  6  7  8  9 10 11 12
IDS = [[9, 8, 7, 5, 6, 9, 9, 2, 8, 5, 6, 7, 7], [8, 8, 5, 6, 9, 9, 9, 2, 5, 6, 9, 0, 0]]
MASK = [[1] * 13, [1] * 11 + [0] * 2]


def batch(*rows: int) -> dict:
    rows = rows or (0, 1)
    return {
        "input_ids": torch.tensor([IDS[row] for row in rows]),
        "attention_mask": torch.tensor([MASK[row] for row in rows]),
    }


def labels(*answers: range) -> torch.Tensor:
    """-100 but for one answer in each row."""
    ids = batch(*range(len(answers)))["input_ids"]
    masked = torch.full_like(ids, -100)
    for row, answer in enumerate(answers):
        masked[row, answer.start : answer.stop] = ids[row, answer.start : answer.stop]
    return masked


def adapted(**settings) -> PeftModel:
    settings = {"r": 4, "positions": "f1+l2", "task_type": "CAUSAL_LM", **settings}
    base = build("llama")
    base.generation_config.eos_token_id = 2
    model = get_peft_model(base, ReftConfig(**settings)).eval()
    randomize(model)
    return model


def edited(model: PeftModel, **arguments) -> list[list[int]]:
    with torch.no_grad():
        after = model(**arguments, output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            before = model(**arguments, output_hidden_states=True).hidden_states[1]
    real = arguments["attention_mask"].bool()
    changed = ((after - before).abs().amax(dim=-1) > 1e-4) & real
    return [row.nonzero().flatten().tolist() for row in changed]


def test_which_sign_goes_first():
    model, given = adapted(response_template=TEMPLATE), batch()
    by_template = [[0, 3, 4], [0, 2, 3]]
    assert edited(model, **given) == by_template
    given["labels"] = labels(range(7, 9), range(6, 8))
    assert edited(model, **given) == by_template  # a template goes before labels
    plain = adapted()
    assert edited(plain, **given) == [[0, 5, 6], [0, 4, 5]]
    given["prompt_lengths"] = torch.tensor([4, 9])
    assert edited(model, **given) == edited(plain, **given) == [[0, 2, 3], [0, 7, 8]]
    given["intervention_mask"] = torch.zeros(2, 13).long()
    given["intervention_mask"][0, 3] = given["intervention_mask"][1, 5] = 2
    assert edited(model, **given) == edited(plain, **given) == [[3], [5]]
    assert edited(plain, **batch()) == [[0, 11, 12], [0, 9, 10]]  # no sign: all tokens are prompt


def test_every_turn_by_template_and_by_labels():
    by_template = edited(adapted(response_template=TEMPLATE, prompt_boundary="every"), **batch())
    assert by_template == [[0, 3, 4, 9, 10], [0, 2, 3, 8, 9]]
    ids = batch()["input_ids"]
    given = {**batch(), "labels": ids.clone()}
    given["labels"][0, [0, 1, 2, 3, 4, 8, 9, 10]] = -100
    given["labels"][1, [0, 1, 2, 3, 8, 9, 11, 12]] = -100
    assert edited(adapted(prompt_boundary="every"), **given) == by_template
    assert edited(adapted(prompt_boundary="first"), **given) == [[0, 3, 4], [0, 2, 3]]


def test_a_short_turn_does_not_reach_into_the_answer_before_it():
    """The prompt of the second turn begins after the end token: it has two tokens, and l5 edits these."""
    model = adapted(response_template=TEMPLATE, prompt_boundary="every", positions="l5")
    assert edited(model, **batch(1)) == [[0, 1, 2, 3, 8, 9]]


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_training_sequences_without_the_template(packed, labelled):
    """Where the answer begins in such a row is unknown, so the row is passed over: as a whole, and in evaluation too
    where labels show that the row holds an answer."""
    model, given = adapted(response_template=TEMPLATE), batch()
    given["input_ids"] = given["input_ids"].clone()
    given["input_ids"][1, 3] = given["input_ids"][1, 9] = 7
    if labelled:
        given["labels"] = labels(range(7, 9), range(6, 8))
    by_template = [[0, 3, 4], []]
    if packed:
        given = {
            "input_ids": given["input_ids"][:, :11].reshape(1, -1),
            "position_ids": torch.arange(11).repeat(2)[None],
            "attention_mask": torch.ones(1, 22),
            "use_cache": False,
            **({"labels": given["labels"][:, :11].reshape(1, -1)} if labelled else {}),
        }
        by_template = [[0, 3, 4]]
    with pytest.warns(UserWarning, match="1 of 2 rows of training .* response_template is not in it"):
        assert edited(model.train(), **given) == by_template
    if labelled:
        with pytest.warns(UserWarning, match="1 of 2 rows of evaluation"):
            assert edited(model.eval(), **given) == by_template
    else:  # nothing says that the row holds an answer: it is all prompt
        assert edited(model.eval(), **given) == ([[0, 3, 4, 11, 20, 21]] if packed else [[0, 3, 4], [0, 9, 10]])


def test_a_template_is_looked_for_in_ids():
    model = adapted(response_template=TEMPLATE)
    embeds = model.get_input_embeddings()(batch()["input_ids"])
    with pytest.raises(ValueError, match="response_template is looked for in input_ids.*prompt_lengths"):
        model(inputs_embeds=embeds)
    by_lengths = edited(
        model, inputs_embeds=embeds, attention_mask=batch()["attention_mask"], prompt_lengths=torch.tensor([5, 4])
    )
    assert by_lengths == [[0, 3, 4], [0, 2, 3]]


@pytest.mark.parametrize("made_of", ["no labels", "no prompt", "prompts of one token"])
def test_a_training_batch_in_which_nothing_is_edited(made_of):
    model, given = adapted().train(), batch()
    if made_of == "no prompt":
        given["labels"] = given["input_ids"]
    elif made_of == "prompts of one token":
        given["labels"] = labels(range(1, 9), range(1, 8))
    message = {
        "no labels": "training batch without labels",
        "no prompt": "no label of -100 stands before an answer",
        "prompts of one token": "no prompt has more than one token, too few for both first and last tokens",
    }[made_of]
    with pytest.raises(ValueError, match=message + r".*prompt_lengths.*PromptLengthsCollator.*response_template"):
        model(**given)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_forward_that_does_not_say_where_its_prompts_end_warns_once(template, trained):
    """Whoever knows nothing of ReFT scores answers by such a forward. Without a template all tokens are prompt."""
    model, given = adapted(response_template=template), batch()
    if trained:
        model.train()(**given, labels=labels(range(7, 9), range(6, 8))).loss.backward()
        model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**given, labels=labels(range(7, 9), range(6, 8)))
        model(**given, prompt_lengths=torch.tensor([4, 4]))
        model.generate(**batch(0), max_new_tokens=2)
        if template:
            assert edited(model, **given) == [[0, 3, 4], [0, 2, 3]]
    given["input_ids"][1, [3, 9]] = 7  # the second row has no template
    with pytest.warns(UserWarning, match="without labels does not say.*prompt_lengths.*response_template") as noted:
        assert edited(model, **given)[1] == [0, 9, 10]
        model(**given)
    assert len(noted) == 1


def test_forwards_that_need_not_say_where_a_prompt_ends():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("default", FutureWarning)  # transformers' own
        adapted(positions="all")(**batch())
        classifier = get_peft_model(build(("llama", "SEQ_CLS")), ReftConfig(r=4, task_type="SEQ_CLS")).eval()
        classifier(**batch())


def test_an_evaluation_whose_labels_mask_no_prompt():
    """axolotl's perplexity scores texts with labels for all tokens. They have no prompt, so there is nothing to edit,
    and the score is a number."""
    model, given = adapted(), batch(0)
    with pytest.warns(UserWarning, match="1 row of evaluation .*no label of -100.*base model computes them") as noted:
        scored = model(**given, labels=given["input_ids"]).loss
        model(**given, labels=given["input_ids"])
    assert len(noted) == 1
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(scored, model(**given, labels=given["input_ids"]).loss)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_several_answers_that_labels_alone_tell_warn_once(mode):
    model, given = getattr(adapted(), mode)(), batch(0)
    turns = labels(range(5, 7))
    turns[0, 11:] = 7
    with pytest.warns(
        UserWarning, match="several answers in one row.*prompt of the first.*response_template"
    ) as noted:
        model(**given, labels=turns)
        model(**given, labels=turns)
    assert len(noted) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("default", FutureWarning)  # transformers' own
        getattr(adapted(), mode)()(**given, labels=labels(range(5, 7)))
        getattr(adapted(response_template=TEMPLATE), mode)()(**given, labels=turns)
        packed = {  # two sequences of one answer each
            "input_ids": given["input_ids"],
            "position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4, 5]]),
            "use_cache": False,
        }
        getattr(adapted(), mode)()(**packed, labels=turns)
