"""`response_template="auto"`: found in the chat template of the base model's tokenizer, tried, logged, and saved."""

from __future__ import annotations

import json
import logging
import re
import shutil
import socket
import sys
import warnings

import huggingface_hub.constants
import pytest
import torch
from models import CHATML, build, chat_model, randomize, tokenizer
from peft import PeftModel, get_peft_model

import peft_reft
from peft_reft import ReftConfig, find_response_template
from peft_reft.tuner import chat_template
from peft_reft.tuner.chat_template import search


OPENING = "<|im_start|>assistant\n"
TURNS = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue, I think."},
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "The answer is not known."},
]
START = "{% for m in messages %}{% if m.role == 'user' %}"
ANSWER = "{% elif m.role == 'assistant' %}"
END = "{% endif %}{% endfor %}"
# Chat templates of the kinds that models have -> the text that opens an answer in both a prompt and a conversation.
TEMPLATES = {
    "chatml": (CHATML, OPENING),
    "no generation prompt, as Llama 2": (
        START + "[INST] {{ m.content.strip() }} [/INST]" + ANSWER + " {{ m.content }}<|im_end|>" + END,
        "[/INST]",
    ),
    "a generation prompt that begins to think, as DeepSeek R1": (
        START
        + "<|im_start|>{{ m.content }}<|im_end|>"
        + ANSWER
        + "<s>{{ m.content }}<|im_end|>"
        + END
        + "{% if add_generation_prompt %}<s><think>\n{% endif %}",
        "<s>",
    ),
    "thoughts in the last answer alone, as Qwen3": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        OPENING,
    ),
    "thoughts in the last answer and in a prompt, as Qwen3.5": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n"
        "</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n{% endif %}",
        OPENING,
    ),
    "a system message put into the last question, as Mistral": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        + START
        + "[INST] {% if loop.last %}{{ system }}{% endif %}{{ m.content.strip() }}[/INST]"
        + ANSWER
        + "{{ m.content }}<|im_end|>"
        + END,
        "[/INST]",
    ),
    "no system message, as Gemma": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system message') }}{% endif %}" + CHATML,
        OPENING,
    ),
    "messages of parts, as of models that see": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content %}{{ part.text }}{% endfor %}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        OPENING,
    ),
}


def with_template(text: str | None):
    tokens = tokenizer()
    tokens.chat_template = text
    return tokens


@pytest.mark.parametrize("kind", TEMPLATES)
def test_chat_templates_that_say_where_answers_begin(kind):
    text, opening = TEMPLATES[kind]
    tokens = with_template(text)
    assert tokens.decode(search(tokens).ids).strip(" ") == opening, search(tokens)


@pytest.mark.parametrize(
    "text, reason",
    [
        (None, "no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "stands .* times in a conversation of 1 answers"),
        # every turn is opened alike, so that a prompt's end is not told from a question's beginning
        (
            "{% for m in messages %}<s>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<s>{% endif %}",
            "stands 2 times in a conversation of 1 answers",
        ),
        # a prompt opens an answer otherwise than a conversation does
        (
            START
            + "Q{{ m.content }}"
            + ANSWER
            + "A{{ m.content }}"
            + END
            + "{% if add_generation_prompt %}<s>{% endif %}",
            "no tokens that open an answer",
        ),
        ("{{ raise_exception('broken') }}", "can't render a conversation: broken"),
    ],
)
def test_chat_templates_that_do_not(text, reason):
    found = search(with_template(text))
    assert found.ids is None and find_response_template(with_template(text)) is None
    assert re.search(reason, found.reason), found.reason


def test_a_processor_is_asked_by_its_tokenizer():
    class Processor:
        def __init__(self):
            self.tokenizer = with_template(None)
            self.chat_template = TEMPLATES["messages of parts, as of models that see"][0]

        def apply_chat_template(self, messages, **options):
            return tokenizer().apply_chat_template(messages, chat_template=self.chat_template, **options)

    assert find_response_template(Processor()) == find_response_template(tokenizer())


# -- in a model -------------------------------------------------------------------------------------------------------


def base(checkpoint: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint)


def adapted(checkpoint: str, **settings) -> PeftModel:
    config = ReftConfig(**{"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings})
    own = base(checkpoint)
    torch.manual_seed(0)
    model = get_peft_model(own, config).eval()
    randomize(model)
    return model


def ids_of(count: int, opened: bool = False) -> torch.Tensor:
    text = tokenizer().apply_chat_template(TURNS[:count], tokenize=False, add_generation_prompt=opened)
    return tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def edited(model: PeftModel, **batch) -> list[int]:
    with torch.no_grad():
        after = model(**batch, output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            before = model(**batch, output_hidden_states=True).hidden_states[1]
    return ((after - before).abs().amax(dim=-1) > 1e-4)[0].nonzero().flatten().tolist()


def test_it_is_found_logged_once_and_saved(checkpoint, tmp_path, caplog):
    chat_template.log_once.cache_clear()
    with caplog.at_level(logging.INFO, "peft_reft"):
        model = adapted(checkpoint)
        adapted(checkpoint)
    expected = find_response_template(tokenizer())
    assert tokenizer().decode(expected) == OPENING
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == 1 and str(expected) in logged[0] and checkpoint in logged[0]
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["response_template"], saved["response_template_optional"]) == (expected, True)

    # a loaded adapter goes by what was saved, whatever the tokenizer beside its base model says, or without one
    other = chat_model()
    again = PeftModel.from_pretrained(other, tmp_path)
    whole, prompt = ids_of(2), ids_of(1, opened=True)
    end = prompt.shape[1]
    assert edited(again, input_ids=whole) == edited(model, input_ids=whole) == [0, 1, end - 3, end - 2, end - 1]
    with torch.no_grad():
        assert torch.equal(again(input_ids=whole).logits, model(input_ids=whole).logits)


def test_adapters_of_earlier_versions_keep_their_rule(checkpoint, tmp_path):
    adapted(checkpoint, response_template=None).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["response_template"] is None
    end = ids_of(2).shape[1]
    for fields in (saved, {key: value for key, value in saved.items() if not key.startswith("response_template")}):
        path.write_text(json.dumps(fields))
        loaded = PeftModel.from_pretrained(base(checkpoint), tmp_path)
        assert loaded.peft_config["default"].response_template is None
        assert edited(loaded, input_ids=ids_of(2)) == [0, 1, end - 3, end - 2, end - 1]


def test_one_config_makes_adapters_for_several_tokenizers(checkpoint, tmp_path):
    chat_model().save_pretrained(tmp_path)
    with_template(TEMPLATES["no generation prompt, as Llama 2"][0]).save_pretrained(tmp_path)
    config = ReftConfig(r=4, task_type="CAUSAL_LM")
    found = [get_peft_model(one, config).peft_config["default"].response_template for one in (base(checkpoint),)]
    found.append(get_peft_model(base(str(tmp_path)), config).peft_config["default"].response_template)
    found.append(get_peft_model(chat_model(), config).peft_config["default"].response_template)
    assert found[0] == find_response_template(tokenizer())
    assert tokenizer().decode(found[1]).strip() == "[/INST]" and found[2] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda path: get_peft_model(build(("llama", "SEQ_CLS")), ReftConfig(r=4, task_type="SEQ_CLS")),
        lambda path: get_peft_model(build("t5"), ReftConfig(r=4, task_type="SEQ_2_SEQ_LM")),
        lambda path: get_peft_model(base(path), ReftConfig(r=4, positions="all", task_type="CAUSAL_LM")),
        lambda path: get_peft_model(build("llama"), ReftConfig(r=4, task_type="CAUSAL_LM")),
    ],
    ids=["classes", "encoder", "all tokens", "no tokenizer"],
)
def test_where_there_is_nothing_to_find(checkpoint, make):
    config = make(checkpoint).peft_config["default"]
    assert (config.response_template, config.response_template_optional) == (None, False)


def test_nothing_is_downloaded_for_it(monkeypatch):
    """A base model that is not on this disk, on a machine with a network: its tokenizer is not asked for."""
    asked = []

    def resolve(host, *_, **__):
        asked.append(host)
        raise socket.gaierror("no network in tests")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    model = build("llama")
    model.name_or_path = "somebody/some-model"
    config = ReftConfig(r=4, task_type="CAUSAL_LM")
    assert get_peft_model(model, config).peft_config["default"].response_template is None
    assert not asked


def test_the_hub_s_cache_is_looked_in(checkpoint, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--somebody--some-model" / "snapshots" / "1234"
    shutil.copytree(checkpoint, snapshot)
    (tmp_path / "models--somebody--some-model" / "refs").mkdir()
    (tmp_path / "models--somebody--some-model" / "refs" / "main").write_text("1234")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = chat_model()
    model.name_or_path = "somebody/some-model"
    config = ReftConfig(r=4, task_type="CAUSAL_LM")
    found = get_peft_model(model, config).peft_config["default"].response_template
    assert found == find_response_template(tokenizer())


def test_the_error_says_why_none_was_found(checkpoint, tmp_path):
    chat_model().save_pretrained(tmp_path)
    with_template(None).save_pretrained(tmp_path)
    model = adapted(str(tmp_path)).train()
    with pytest.raises(ValueError, match="no prompt tokens to edit.*'auto' found none: .*has no chat template"):
        model(input_ids=ids_of(2).repeat(2, 1), labels=ids_of(2).repeat(2, 1))
    with pytest.raises(ValueError, match="without labels.*'auto' found none: .*has no chat template"):
        model(input_ids=ids_of(2))


def test_text_in_which_all_tokens_are_trained_goes_by_the_template(checkpoint):
    """TRL's SFTTrainer gives labels for all tokens of `messages`, and masks the first of a packed row."""
    model, whole, end = adapted(checkpoint), ids_of(4), ids_of(1, opened=True).shape[1]
    expected = [0, 1, end - 3, end - 2, end - 1]
    first_masked = whole.clone()
    first_masked[0, 0] = -100
    for labels in (whole, first_masked, None):
        told = {} if labels is None else {"labels": labels}
        assert edited(model.train(), input_ids=whole, **told) == expected
        assert edited(model.eval(), input_ids=whole, **told) == expected


@pytest.mark.parametrize("boundary", ["first", "every"])
@pytest.mark.parametrize("option", ["the last answer", "questions too", "end tokens too", "all"])
def test_labels_do_not_move_the_edit(checkpoint, option, boundary):
    """What is trained is another question than where an answer begins: options of trainers change only the first."""
    model, whole = adapted(checkpoint, prompt_boundary=boundary), ids_of(4)
    labels = torch.full_like(whole, -100)
    answer = ids_of(3, opened=True).shape[1]
    labels[:, answer:] = whole[:, answer:]
    if option == "questions too":
        labels[:, 4 : ids_of(1).shape[1]] = whole[:, 4 : ids_of(1).shape[1]]
    if option == "end tokens too":
        labels[whole == tokenizer().eos_token_id] = tokenizer().eos_token_id
    if option == "all":
        labels = whole.clone()
    expected = edited(model, input_ids=whole)
    assert edited(model.train(), input_ids=whole, labels=labels) == expected
    end = ids_of(1, opened=True).shape[1]
    assert set(expected) >= {0, 1, end - 1} and (answer - 1 in expected) == (boundary == "every")


def test_labels_that_end_a_prompt_later_are_warned_of(checkpoint):
    model, whole = adapted(checkpoint).train(), ids_of(4)
    labels = whole.clone()
    labels[:, : ids_of(3, opened=True).shape[1]] = -100
    with pytest.warns(UserWarning, match="Labels put the end .* another token.*response_template=None") as noted:
        model(input_ids=whole, labels=labels)
        model(input_ids=whole, labels=labels)
    assert len(noted) == 1
    with pytest.warns(UserWarning, match="prompt_lengths put the end .* another token.*goes by prompt_lengths"):
        model(input_ids=whole, prompt_lengths=torch.tensor([ids_of(3, opened=True).shape[1]]))
    one = ids_of(2)
    labels = one.clone()
    labels[:, : ids_of(1, opened=True).shape[1]] = -100
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("default", FutureWarning)
        adapted(checkpoint).train()(input_ids=one, labels=labels)


@pytest.mark.parametrize("completion", ["Blue, I think.", f"It writes {OPENING}Blue."])
def test_text_without_the_template_goes_by_labels(checkpoint, completion):
    """Prompts and completions of plain text: as with None, to the bit, in training, scoring and generation, also where
    a completion holds the template by chance."""
    ids = tokenizer()(f"Name a colour.{completion}", return_tensors="pt")["input_ids"]
    begin = tokenizer()("Name a colour.", return_tensors="pt")["input_ids"].shape[1]
    labels = ids.clone()
    labels[:, :begin] = -100
    both = [adapted(checkpoint, response_template=template) for template in ("auto", None)]
    assert both[0].peft_config["default"].response_template
    losses, grads, written = [], [], []
    for model in both:
        loss = model.train()(input_ids=ids, labels=labels).loss
        loss.backward()
        losses += [loss, model.eval()(input_ids=ids, labels=labels).loss]
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
        written.append(model.generate(input_ids=ids[:, :begin], max_new_tokens=5, do_sample=False))
    assert len({float(loss) for loss in losses}) == 1
    assert all(torch.equal(one, other) for one, other in zip(*grads)) and torch.equal(*written)
    assert edited(both[0], input_ids=ids, labels=labels) == [0, 1, begin - 3, begin - 2, begin - 1]


@pytest.mark.parametrize("boundary", ["first", "every"])
def test_rows_with_and_without_the_template_in_one_batch(checkpoint, boundary):
    """Each row, and each sequence of a packed row, as if it were alone."""
    model = adapted(checkpoint, prompt_boundary=boundary)
    plain = tokenizer()("Name a colour. Blue, I think.", return_tensors="pt")["input_ids"]
    rows = [ids_of(4), plain]
    labels = [rows[0].clone(), rows[1].clone()]
    labels[1][:, :9] = -100
    alone = [edited(model, input_ids=one, labels=told) for one, told in zip(rows, labels)]
    packed = {
        "input_ids": torch.cat(rows, dim=1),
        "labels": torch.cat(labels, dim=1),
        "position_ids": torch.cat([torch.arange(one.shape[1]) for one in rows])[None],
        "use_cache": False,
    }
    width = rows[0].shape[1]
    assert edited(model, **packed) == [*alone[0], *(width + column for column in alone[1])]


def test_embeddings_alone_go_by_labels(checkpoint):
    model, ids = adapted(checkpoint), ids_of(2)
    embeds = model.get_input_embeddings()(ids).detach()
    labels = ids.clone()
    labels[:, :12] = -100
    with pytest.warns(UserWarning, match="inputs_embeds come alone.*prompt_lengths"):
        assert edited(model.train(), inputs_embeds=embeds, labels=labels) == [0, 1, 9, 10, 11]


def test_scorers_and_generation_agree(checkpoint):
    """A scorer that knows nothing of ReFT reads prompt and answer in one forward."""
    model, prompt = adapted(checkpoint), ids_of(1, opened=True)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    written = model.generate(input_ids=prompt, output_logits=True, return_dict_in_generate=True, **options)
    with torch.no_grad():
        scored = model(input_ids=written.sequences).logits[0, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(scored, torch.cat(written.logits), atol=1e-4, rtol=1e-4)


def test_the_library_in_use_is_named(monkeypatch):
    from peft_reft.tuner.positions.notices import LIBRARY_WAYS, ways_out

    for name in LIBRARY_WAYS:
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert "In " not in ways_out()
    monkeypatch.setitem(sys.modules, "trl", peft_reft)
    assert "assistant_only_loss" in ways_out() and "prompt and completion" in ways_out()
    monkeypatch.setitem(sys.modules, "axolotl", peft_reft)
    assert "role_boundaries" in ways_out() and "assistant_only_loss" not in ways_out()
