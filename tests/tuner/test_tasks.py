"""Tasks other than causal language modelling, models with two stacks, and models that see images."""

from __future__ import annotations

import pytest
import torch
from models import IMAGE, SEQ2SEQ, TASKS, build, prompts, randomize
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig, ReftLayer


DECODER = r".*decoder\.(block|layers)\.[0-9]+"
BOTH = r".*coder\.(block|layers)\.[0-9]+"


def edited(model: PeftModel, batch: dict, layer: int = 1, states: str = "hidden_states") -> list[list[int]]:
    """For each row, the tokens whose hidden state after a layer the adapter changes."""
    with torch.no_grad():
        after = model(**batch, output_hidden_states=True)[states]
        with model.disable_adapter():
            before = model(**batch, output_hidden_states=True)[states]
    changed = (after[layer] - before[layer]).abs().amax(dim=-1) > 1e-4
    return [row.nonzero().flatten().tolist() for row in changed]


# -- classes, spans and features --------------------------------------------------------------------------------------

LABELS = {
    "SEQ_CLS": {"labels": torch.tensor([0, 2])},
    # -100 where a word goes on, as tokenizers make them: it does not mark a prompt
    "TOKEN_CLS": {"labels": torch.tensor([[0, -100, 1, 2, 0, 1, -100, 2, 0], [-100, 1, 2, 0, *[-100] * 5]])},
    "QUESTION_ANS": {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])},
    "FEATURE_EXTRACTION": {},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name, task", TASKS)
def test_all_real_tokens_are_the_prompt_whatever_the_labels(name, task, training):
    model = get_peft_model(build((name, task)), ReftConfig(r=4, positions="f2+l1", task_type=task))
    randomize(model)
    for side, expected in (("right", [[0, 1, 8], [0, 1, 3]]), ("left", [[0, 1, 8], [5, 6, 8]])):
        batch = prompts(9, 4, side=side)
        model.train(training)
        changed = edited(model, {**batch, **LABELS[task]})
        real = batch["attention_mask"].bool()
        assert [[t for t in row if real[i, t]] for i, row in enumerate(changed)] == expected


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_head_is_trained_and_saved_with_the_edits(name, task, tmp_path):
    head = {"bert": "classifier", "llama": "score"}[name] if task != "QUESTION_ANS" else "qa_outputs"
    config = ReftConfig(r=4, positions="f2+l1", task_type=task, modules_to_save=[head])
    model = get_peft_model(build((name, task)), config).train()
    randomize(model)
    batch = {**prompts(9, 4), **LABELS[task]}
    model(**batch).loss.backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any(f"{head}.modules_to_save" in key for key in trained)
    assert sum(".reft_R." in key for key in trained) == 3
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"{head}.modules_to_save" in key:
                parameter.add_(0.5)
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build((name, task)), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch)[1], model(**batch)[1])


# -- encoder and decoder ----------------------------------------------------------------------------------------------


def adapted(name: str, **settings) -> PeftModel:
    model = get_peft_model(build(name), ReftConfig(**{"r": 4, "task_type": "SEQ_2_SEQ_LM", **settings})).eval()
    randomize(model)
    return model


@pytest.mark.parametrize("name", SEQ2SEQ)
@pytest.mark.parametrize(
    "settings, encoder, decoder",
    [
        ({"positions": "f2+l1"}, [[0, 1, 8], [0, 1, 3]], None),
        ({"positions": "f1", "target_modules": DECODER}, [[], []], [[0], [0]]),
        ({"positions": "f1", "target_modules": BOTH}, [[0], [0]], None),
    ],
    ids=["encoder", "decoder", "both"],
)
def test_encoder_by_default_and_decoder_when_targeted(name, settings, encoder, decoder):
    model = adapted(name, **settings)
    batch = {**prompts(9, 4), "labels": prompts(5, 5, seed=3)["input_ids"]}
    assert edited(model, batch, states="encoder_hidden_states") == encoder
    if decoder is not None:  # else the decoder's states change with what it attends to
        assert edited(model, batch, states="decoder_hidden_states") == decoder
    model.train()(**batch).loss.backward()
    layers = [module for module in model.modules() if isinstance(module, ReftLayer)]
    assert all(layer.reft_W["default"].grad.abs().max() > 0 for layer in layers)


@pytest.mark.parametrize("target_modules", [None, DECODER, BOTH], ids=["encoder", "decoder", "both"])
@pytest.mark.parametrize("name", SEQ2SEQ)
def test_generation_of_an_encoder_decoder_agrees_with_teacher_forcing(name, target_modules):
    model, batch = adapted(name, positions="f1", target_modules=target_modules), prompts(9, 4)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answer = model.generate(**batch, **options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**batch, **options), answer)
    assert torch.equal(model.generate(**batch, **options, use_cache=False), answer)
    labels = answer[:, 1:].contiguous()
    with torch.no_grad():
        assert torch.equal(model(**batch, labels=labels).logits.argmax(dim=-1), labels)
    for row in range(2):  # beams, each prompt alone
        ids = batch["input_ids"][row, : [9, 4][row]][None]
        alone = model.generate(input_ids=ids, num_beams=3, **options)
        assert torch.equal(model.generate(**batch, num_beams=3, **options)[row], alone[0])


def test_what_is_told_of_prompts_is_about_the_encoder_where_it_is_edited():
    model, batch = adapted("t5", positions="l1"), {**prompts(9, 4), "labels": prompts(5, 5, seed=3)["input_ids"]}
    with_lengths = {**batch, "prompt_lengths": torch.tensor([3, 2])}
    assert edited(model, with_lengths, states="encoder_hidden_states") == [[2], [1]]
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[0, 4] = mask[1, 1] = True
    assert edited(model, {**batch, "intervention_mask": mask}, states="encoder_hidden_states") == [[4], [1]]


def test_a_decoder_has_a_prompt_of_its_own():
    """prompt_lengths are not about the decoder's tokens, where the encoder is edited too."""
    model = adapted("t5", positions="l1", target_modules=BOTH)
    batch = {**prompts(9, 4), "labels": prompts(5, 5, seed=3)["input_ids"], "prompt_lengths": torch.tensor([3, 2])}
    layer = next(m for m in model.modules() if isinstance(m, ReftLayer) and not m.in_encoder)
    seen = []
    layer.get_base_layer().register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
    with torch.no_grad():
        layer.register_forward_hook(lambda module, args, output: seen.append(output[0].clone()))
        model(**batch)
    assert (seen[1] - seen[0]).abs().amax(dim=-1).nonzero().tolist() == [[0, 0], [1, 0]]


def test_nothing_of_a_generation_is_left_for_the_next():
    model, batch = adapted("t5", positions="l1"), prompts(9, 4)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    before = model.generate(**batch, **options)
    with_lengths = model.generate(**batch, prompt_lengths=torch.tensor([3, 2]), **options)
    assert not torch.equal(with_lengths, before)
    assert torch.equal(model.generate(**batch, **options), before)
    with torch.no_grad():
        model.get_base_model().get_encoder()(**batch)  # by itself
    assert torch.equal(model.generate(**batch, prompt_lengths=torch.tensor([3, 2]), **options), with_lengths)


def test_a_decoder_that_can_not_know_its_prompt():
    model = adapted("t5", positions="f1", target_modules=DECODER).train()
    batch = prompts(9, 4)
    with pytest.raises(ValueError, match="training batch without labels"):
        model(**batch, decoder_input_ids=torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="called without decoder_input_ids"):
        model(**batch)


def test_a_decoder_of_speech():
    """Its encoder is given no tokens; its decoder is, and `generate` is given none of either."""
    # PEFT's class for SEQ_2_SEQ_LM passes on input_ids, which Whisper does not take
    model = adapted("whisper", positions="f1", target_modules=DECODER, task_type=None)
    sound = {"input_features": torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))}
    options = {"max_new_tokens": 5, "do_sample": False}
    answer = model.generate(**sound, **options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**sound, **options), answer)
    with torch.no_grad():
        assert torch.equal(model(**sound, labels=answer).logits.argmax(dim=-1), answer)
    with pytest.raises(ValueError, match="called without input_ids.*positions='all'"):
        adapted("whisper", positions="f1", task_type=None)(**sound, labels=answer)


# -- images -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target_modules", [None, r"model\.language_model\.layers\.[0-9]+"])
def test_the_text_stack_of_a_vision_language_model(target_modules):
    config = ReftConfig(r=4, positions="f2+l1", task_type="CAUSAL_LM", target_modules=target_modules)
    model = get_peft_model(build("llava"), config).eval()
    randomize(model)
    ids = torch.tensor([[1, 5, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8, 9, 10]])
    image = {"pixel_values": torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    assert edited(model, {"input_ids": ids, **image}) == [[0, 1, 9]]  # the tokens of an image count as prompt
    answer = model.generate(input_ids=ids, **image, max_new_tokens=5, do_sample=False, eos_token_id=None)
    with torch.no_grad():
        forced = model(input_ids=answer, **image, prompt_lengths=torch.tensor([10])).logits.argmax(dim=-1)
    assert torch.equal(forced[:, 9:-1], answer[:, 10:])
    labels = answer.masked_fill(torch.arange(15) < 10, -100)
    model.train()(input_ids=answer, **image, labels=labels).loss.backward()


def test_a_vision_tower_has_no_text_tokens():
    target = r"model\.vision_tower.*layers\.[0-9]+"
    ids = torch.tensor([[1, 5, IMAGE, IMAGE, IMAGE, IMAGE, 7]])
    image = torch.randn(1, 3, 8, 8)
    model = get_peft_model(build("llava"), ReftConfig(r=4, target_modules=target))
    with pytest.raises(ValueError, match=r"vision_tower.* 1 x 7 tokens.*positions='all'"):
        model(input_ids=ids, pixel_values=image)
    model = get_peft_model(build("llava"), ReftConfig(r=4, target_modules=target, positions="all"))
    randomize(model)
    assert edited(model, {"input_ids": ids, "pixel_values": image}, layer=0) == [[2, 3, 4, 5]]
