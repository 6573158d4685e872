"""The right tokens are edited while generating: the prompt's, whatever the way it is run."""

from __future__ import annotations

import pytest
import torch
from models import CACHE, CACHES, DECODERS, PAD, build, chat_model, prompts, randomize, tokenizer
from peft import PeftModel, get_peft_model
from transformers import DynamicCache, StaticCache, pipeline
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from peft_reft import ReftConfig


NEW = 8


def adapted(name: str = "llama", **settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build(name), ReftConfig(**settings))
    randomize(model)
    return model.eval()


def generate(model: PeftModel, batch: dict, **options) -> torch.Tensor:
    """The new tokens alone. No end token, so that rows are of one length."""
    torch.manual_seed(0)
    options = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": None, **options}
    return model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]


def one_by_one(model: PeftModel, *lengths: int, **options) -> torch.Tensor:
    """Each prompt of `prompts(*lengths)` alone, without padding."""
    batch = prompts(*lengths)
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"]):
        rows.append(generate(model, {"input_ids": ids[mask.bool()][None]}, **options))
    return torch.cat(rows)


def padded(*lengths: int, side: str) -> dict[str, torch.Tensor]:
    """The prompts of `prompts(*lengths)`, padded on a side."""
    batch = prompts(*lengths)
    if side == "left":
        shifts = [max(lengths) - n for n in lengths]
        batch = {k: torch.stack([row.roll(shift) for row, shift in zip(v, shifts)]) for k, v in batch.items()}
    return batch


def by_teacher_forcing(model: PeftModel, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Greedy tokens that a single pass over prompt and answer predicts for the answer."""
    ids = torch.cat([prompt, answer], dim=1)
    labels = ids.clone()
    labels[:, : prompt.shape[1]] = -100
    with torch.no_grad():
        predicted = model(input_ids=ids, labels=labels).logits.argmax(dim=-1)
    return predicted[:, prompt.shape[1] - 1 : -1]


@pytest.mark.parametrize("positions", ["f2+l3", "f1", "l2", "f7+l7", "all"])
@pytest.mark.parametrize("name", [*DECODERS, *CACHES])
def test_teacher_forcing_and_generation_agree(name, positions):
    model = adapted(name, positions=positions)
    prompt = prompts(9)["input_ids"]
    answer = generate(model, {"input_ids": prompt})
    with model.disable_adapter(), torch.no_grad():
        plain = model(input_ids=prompt).logits
    with torch.no_grad():
        assert (model(input_ids=prompt).logits - plain).abs().max() > 0.1  # the edit is there to be seen
    assert torch.equal(by_teacher_forcing(model, prompt, answer), answer)
    # and the same in one pass with prompt_lengths in place of labels
    ids = torch.cat([prompt, answer], dim=1)
    with torch.no_grad():
        in_one_pass = model(input_ids=ids, prompt_lengths=torch.tensor([9])).logits.argmax(dim=-1)
    assert torch.equal(in_one_pass[:, 8:-1], answer)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_of_a_padded_batch_are_those_of_each_prompt_alone(name, side):
    model, lengths = adapted(name), (9, 4, 2, 1)
    batch = padded(*lengths, side=side)
    position_ids = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(**batch, position_ids=position_ids).logits
        for row, (ids, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
            alone = model(input_ids=ids[mask.bool()][None]).logits
            torch.testing.assert_close(together[row][mask.bool()][None], alone, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", DECODERS)
def test_left_padded_batches_of_unequal_prompts(name):
    model, lengths = adapted(name), (9, 4, 2, 1)
    assert torch.equal(generate(model, padded(*lengths, side="left")), one_by_one(model, *lengths))


def test_right_padded_prompts_edit_the_same_tokens():
    """A decoder reads right padding as text, with or without ReFT, but the edited tokens are the prompt's."""
    model = adapted(positions="l1")
    batch = padded(9, 4, side="right")
    edited = []
    block = model.base_model.model.model.layers[0]
    block.base_layer.register_forward_hook(lambda module, args, output: edited.append(output.clone()))
    block.register_forward_hook(lambda module, args, output: edited.append(output.clone()))
    generate(model, batch, max_new_tokens=3)
    changed = [(after != before).any(dim=-1).nonzero().tolist() for before, after in zip(edited[::2], edited[1::2])]
    assert changed == [[[0, 8], [1, 3]], [], []]  # once, in the prefill


def test_padding_that_generate_infers_from_the_pad_token():
    model, lengths = adapted(), (9, 4)
    batch = padded(*lengths, side="left")
    ids = {"input_ids": batch["input_ids"]}
    assert (ids["input_ids"] == PAD).any()
    # eos_token_id is given, for a pad token that also ends texts is no padding
    options = {"pad_token_id": PAD, "eos_token_id": 96}
    assert torch.equal(generate(model, ids, **options), generate(model, batch, **options))


WAYS = [
    {"use_cache": False},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
    {"cache_implementation": "static"},
    {"cache_implementation": "static", "num_beams": 2},
    {"prefill_chunk_size": 4},
    {"prefill_chunk_size": 4, "cache_implementation": "static"},
]


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("name", ["llama", *list(CACHES)[:2]])
def test_ways_of_decoding(name, options, positions):
    """Left-padded rows give what each prompt gives alone, and sampling is reproducible."""
    model, lengths = adapted(name, positions=positions), (9, 4)
    together = generate(model, padded(*lengths, side="left"), **options)
    if options.get("do_sample"):
        assert together.shape[0] == 6
        assert torch.equal(together, generate(model, padded(*lengths, side="left"), **options))
        return
    # a prompt in chunks is edited as it would be whole
    alone = {key: value for key, value in options.items() if key != "prefill_chunk_size"}
    assert torch.equal(together, one_by_one(model, *lengths, **alone))


@pytest.mark.parametrize("name", list(CACHES)[2:])
def test_recurrent_states(name):
    model = adapted(name)
    ids = {"input_ids": prompts(9)["input_ids"]}
    assert torch.equal(generate(model, ids), generate(model, ids, use_cache=False))
    assert torch.equal(generate(model, ids, num_beams=2), generate(model, ids, num_beams=2, use_cache=False))


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize(
    "options",
    [
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": "another"},
        {"assistant_model": "base"},
        {"assistant_early_exit": 2},
    ],
    ids=str,
)
def test_assisted_decoding_writes_what_greedy_decoding_writes(options, positions):
    model = adapted(positions=positions)
    ids = {"input_ids": prompts(9)["input_ids"]}
    expected = generate(model, ids)
    if "assistant_model" in options:
        options = {"assistant_model": build("qwen2" if options["assistant_model"] == "another" else "llama")}
    assert torch.equal(generate(model, ids, **options), expected)


def by_mask(model: PeftModel, ids: torch.Tensor, first: list[int], last: list[int]) -> torch.Tensor:
    """The greedy prediction at each token, with these tokens edited."""
    mask = torch.zeros_like(ids)
    mask[:, first], mask[:, last] = 1, 2
    with torch.no_grad():
        return model(input_ids=ids, intervention_mask=mask).logits.argmax(dim=-1)


@pytest.mark.parametrize("static", [False, True])
def test_a_cache_carried_over_from_an_earlier_turn(static):
    """What was edited in the first turn stays; of the new tokens, those are that end the prompt of the second."""
    model = adapted()
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache(config=model.config)
    first = model.generate(input_ids=prompts(9)["input_ids"], **{CACHE: cache}, **options)
    asked = torch.cat([first, prompts(5, seed=7)["input_ids"]], dim=1)
    second = model.generate(input_ids=asked, **{CACHE: cache}, **options)
    width = asked.shape[1]
    forced = by_mask(model, second, first=[0, 1], last=[6, 7, 8, width - 3, width - 2, width - 1])
    assert torch.equal(forced[:, 8:16], first[:, 9:])
    assert torch.equal(forced[:, width - 1 : -1], second[:, width:])


@pytest.mark.parametrize("boundary", ["first", "every"])
def test_turns_of_a_conversation(boundary):
    """With a template, each turn is generated as the whole conversation is read: with a carried cache or without."""
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": [2, 5, 6], "eos_token_id": None}

    def turn(length: int, seed: int) -> torch.Tensor:
        ids = prompts(length, seed=seed)["input_ids"]
        return torch.cat([ids.masked_fill(ids < 7, 7), torch.tensor([[5, 6]])], dim=1)

    model = adapted(response_template=[5, 6], prompt_boundary=boundary)
    cache = DynamicCache(config=model.config)
    first = model.generate(input_ids=turn(7, 1), **{CACHE: cache}, **options)
    asked = torch.cat([first, turn(4, 2)], dim=1)
    second = model.generate(input_ids=asked, **{CACHE: cache}, **options)
    assert torch.equal(model.generate(input_ids=asked, **options), second)  # read anew
    with torch.no_grad():
        whole = model(input_ids=second).logits
    whole[..., [2, 5, 6]] = -torch.inf
    forced = whole.argmax(dim=-1)
    assert torch.equal(forced[:, 8:16], second[:, 9:17])
    assert torch.equal(forced[:, 22:-1], second[:, 23:])
    last = {"first": [6, 7, 8], "every": [6, 7, 8, 20, 21, 22]}[boundary]
    with torch.no_grad():
        mask = torch.zeros_like(second)
        mask[:, [0, 1]], mask[:, last] = 1, 2
        masked = model(input_ids=second, intervention_mask=mask).logits
        masked[..., [2, 5, 6]] = -torch.inf
        torch.testing.assert_close(masked, whole)


def test_sampling_draws_from_the_edited_model():
    """With top_k=1 sampling is greedy, so that it can be compared token by token."""
    model, lengths = adapted(), (9, 4)
    batch = padded(*lengths, side="left")
    assert torch.equal(generate(model, batch, do_sample=True, top_k=1), one_by_one(model, *lengths))


def test_inputs_embeds():
    model = adapted()
    ids = prompts(9)["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    answer = model.generate(inputs_embeds=embeds, max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert torch.equal(answer[:, -NEW:], generate(model, {"input_ids": ids}))


def test_prompt_lengths_in_generate():
    """Only the first 4 tokens are the prompt; the rest of what is given is the start of an answer."""
    model = adapted(positions="l1")
    ids = prompts(9)["input_ids"]
    with_lengths = generate(model, {"input_ids": ids}, prompt_lengths=torch.tensor([4]))
    labels = ids.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        expected = model(input_ids=ids, labels=labels).logits[:, -1].argmax(dim=-1)
    assert with_lengths[0, 0] == expected
    assert not torch.equal(with_lengths, generate(model, {"input_ids": ids}))


@pytest.mark.parametrize("positions", ["f2+l3", "l1"])
def test_decode_steps_outside_generate(positions):
    model = adapted(positions=positions)
    ids = prompts(9)["input_ids"]
    answer = generate(model, {"input_ids": ids})
    with torch.no_grad():
        step = model(input_ids=ids, use_cache=True)
        tokens = [step.logits[:, -1:].argmax(dim=-1)]
        while len(tokens) < NEW:
            step = model(input_ids=tokens[-1], use_cache=True, **{CACHE: step[CACHE]})
            tokens.append(step.logits[:, -1:].argmax(dim=-1))
        assert torch.equal(torch.cat(tokens, dim=1), answer)
        # a prompt fed in two parts, whose length the caller gives
        cache = model(input_ids=ids[:, :5], prompt_lengths=torch.tensor([9]), use_cache=True)[CACHE]
        with pytest.raises(ValueError, match="continues a cache of 5.*prompt_lengths"):
            model(input_ids=ids[:, 5:], **{CACHE: cache})


def test_the_base_model_is_watched_too():
    """generate of the wrapped model, as pipelines and transformers' own integration call it."""
    model = adapted()
    ids = prompts(9)["input_ids"]
    assert torch.equal(
        model.get_base_model().generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None)[:, 9:],
        generate(model, {"input_ids": ids}),
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_scale": 1.5}, "guidance_scale.*second prompt"),
        ({"cache_params": object()}, "cache_params is a recurrent state of an earlier turn"),
        ({"state": [torch.zeros(1)]}, "state is a recurrent state of an earlier turn"),
    ],
)
def test_ways_of_generating_that_do_not_say_where_the_prompt_is(options, message):
    with pytest.raises(ValueError, match=message):
        generate(adapted(), {"input_ids": prompts(9)["input_ids"]}, **options)


def test_continuous_batching_is_refused():
    ids = prompts(9)["input_ids"]
    paged = object.__new__(PagedAttentionCache)
    batch = {"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 9]), "cache": paged}
    with pytest.raises(ValueError, match="Continuous batching.*positions='all'"):
        adapted()(**batch)


def test_pipeline():
    model = get_peft_model(chat_model(), ReftConfig(r=4, positions="f2+l3", task_type="CAUSAL_LM")).eval()
    randomize(model, scale=2.0)
    texts = ["Name a colour.", "What is the answer to this?"]
    options = {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
    tokens = tokenizer()
    tokens.padding_side = "left"
    for some in (model, model.get_base_model()):
        run = pipeline("text-generation", model=some, tokenizer=tokens)
        one_by_one = [run(text, **options)[0]["generated_text"] for text in texts]
        for text, answer in zip(texts, one_by_one):
            ids = tokens(text, return_tensors="pt")["input_ids"]
            expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :]
            assert answer == tokens.decode(expected, skip_special_tokens=True)
        assert [one[0]["generated_text"] for one in run(texts, batch_size=2, **options)] == one_by_one
