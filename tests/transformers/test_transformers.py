"""transformers' own ways to adapters: add_adapter, load_adapter, from_pretrained and pipelines on their directories,
casts."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys

import pytest
import torch
import transformers as t
from models import (
    CACHE,
    DECODERS,
    ENCODERS,
    SEQ2SEQ,
    TASKS,
    VISION,
    build,
    chat_model,
    labelled,
    prompts,
    randomize,
    tokenizer,
    weight,
)
from peft import (
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft_of_transformers import IS_REFUSED, OLDEST_PEFT
from safetensors.torch import load_file
from transformers.integrations import peft as integration
from transformers.integrations.peft import PeftAdapterMixin

from peft_reft import ReftConfig, ReftLayer


@pytest.mark.skipif(not IS_REFUSED, reason="the installed PEFT is one that transformers takes")
@pytest.mark.parametrize("settings", [LoraConfig(), ReftConfig()], ids=["lora", "reft"])
def test_a_peft_that_is_too_old_for_transformers_is_so_for_lora_too(monkeypatch, settings):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", OLDEST_PEFT)
    with pytest.raises(ValueError, match=f"use a version >= {OLDEST_PEFT}"):
        build("llama").add_adapter(settings)


BATCH = prompts(9, 4, side="left")
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
KINDS = [*DECODERS, *ENCODERS, *SEQ2SEQ, *VISION, *TASKS]
# transformers 5.16 does not put the weights of modules_to_save and trainable_token_indices in their place, of any
# adapter.
LOADS_HEADS = "AuxiliaryTrainingWrapper" in inspect.getsource(PeftAdapterMixin.load_adapter)


def task_of(name: str | tuple[str, str]) -> str:
    if isinstance(name, tuple):
        return name[1]
    return "SEQ_2_SEQ_LM" if name in SEQ2SEQ else "SEQ_CLS" if name in ENCODERS else "CAUSAL_LM"


def config(task: str = "CAUSAL_LM", **settings) -> ReftConfig:
    return ReftConfig(**{"r": 4, "positions": "f2+l2", "task_type": task, **settings})


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """A model with random edits and heads, in evaluation mode."""
    randomize(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.eval()


def wrapped(name: str | tuple[str, str] = "llama", **settings) -> PeftModel:
    return shaken(get_peft_model(build(name), config(task_of(name), **settings)))


def native(name: str = "llama", **settings) -> t.PreTrainedModel:
    model = build(name)
    model.add_adapter(config(task_of(name), **settings))
    return shaken(model)


def output(model: torch.nn.Module, name: object = "llama") -> torch.Tensor:
    batch = dict(BATCH)
    if name in SEQ2SEQ:
        batch["decoder_input_ids"] = prompts(5, 5)["input_ids"]
    with torch.no_grad():
        return next(value for key, value in model(**batch).items() if key not in ("loss", CACHE))


def generated(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(**BATCH, **OPTIONS)


def trainable(model: torch.nn.Module) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, p in model.named_parameters() if p.requires_grad}


# -- adding and loading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_added_adapter_is_that_of_get_peft_model(name):
    ours, theirs = native(name), wrapped(name)
    assert torch.equal(output(ours, name), output(theirs, name))
    assert not torch.equal(output(ours, name), output(build(name), name))
    assert torch.equal(generated(ours), generated(theirs))
    assert trainable(ours) == trainable(theirs) and len(trainable(ours)) == 9
    batch = labelled(9, 4, prompt=3, seed=0)
    for model in (ours, theirs):
        torch.manual_seed(0)  # the base model has dropout
        model.train()(**batch).loss.backward()
    gradients = [[p.grad for p in model.parameters() if p.requires_grad] for model in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


@pytest.mark.parametrize("name", KINDS, ids=str)
def test_saved_by_one_and_loaded_by_the_other(name, tmp_path):
    model = wrapped(name)
    expected = output(model, name)
    model.save_pretrained(tmp_path / "of_peft")
    loaded = build(name)
    info = loaded.load_adapter(str(tmp_path / "of_peft"))
    heads = [key for key in load_file(tmp_path / "of_peft" / "adapter_model.safetensors") if ".reft_" not in key]
    if heads and not LOADS_HEADS:
        assert len(info.missing_keys) == len(info.unexpected_keys) == len(heads)  # transformers reports them
        return
    assert not info.missing_keys and not info.unexpected_keys and not info.mismatched_keys
    assert torch.equal(output(loaded, name), expected)
    assert not any("reft_" in key for key in trainable(loaded))
    loaded.save_pretrained(tmp_path / "of_transformers")
    again = PeftModel.from_pretrained(build(name), tmp_path / "of_transformers")
    assert torch.equal(output(again, name), expected)


def test_heads_that_transformers_leaves_out_are_left_out_for_lora_too(tmp_path):
    model = get_peft_model(build(("llama", "SEQ_CLS")), LoraConfig(task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path)
    info = build(("llama", "SEQ_CLS")).load_adapter(str(tmp_path))
    assert bool(info.missing_keys) != LOADS_HEADS


def test_loading_after_training(tmp_path):
    model = native()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    for seed in range(3):
        model.train()(**labelled(9, 4, prompt=3, seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)  # the last step left the rows of R not orthonormal
    expected = output(model.eval())
    loaded = build("llama")
    loaded.load_adapter(str(tmp_path), is_trainable=True)
    assert torch.equal(output(loaded), expected)
    assert torch.equal(output(PeftModel.from_pretrained(build("llama"), tmp_path)), expected)
    assert trainable(loaded) == trainable(model)


@pytest.mark.parametrize("settings", [{}, {"adapter_name": "mine"}, {"low_cpu_mem_usage": True}])
def test_ways_to_load(settings, tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for source in (
        {"peft_model_id": str(tmp_path)},
        {"adapter_state_dict": state, "peft_config": PeftConfig.from_pretrained(tmp_path)},
    ):
        loaded = build("llama")
        loaded.load_adapter(**source, **settings)
        assert loaded.active_adapters() == [settings.get("adapter_name", "default")]
        assert torch.equal(output(loaded), output(model))
        assert torch.equal(generated(loaded), generated(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_on_a_16_bit_base(dtype, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    wrapped().save_pretrained(tmp_path / "adapter")
    ours, theirs = (t.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype) for _ in range(2))
    ours.load_adapter(str(tmp_path / "adapter"))
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert {p.dtype for n, p in ours.named_parameters() if "reft_" in n} == {torch.float32}
    assert output(ours).dtype == dtype and torch.equal(output(ours), output(theirs))


def test_several_adapters_off_on_and_away(tmp_path):
    plain, plainly = output(build("llama")), generated(build("llama"))
    model = native()
    first, tokens = output(model), generated(model)
    model.disable_adapters()
    assert torch.equal(output(model), plain) and torch.equal(generated(model), plainly)
    model.enable_adapters()
    assert torch.equal(output(model), first) and torch.equal(generated(model), tokens)

    model.add_adapter(config(r=2, positions="l3", layers_to_transform=[1]), "other")
    randomize(model.model.layers[1].reft_W, seed=4)
    with torch.no_grad():
        weight(model.model.layers[1], "W", "other").normal_()
    assert model.active_adapters() == ["other"]
    assert trainable(model) == {f"model.layers.1.reft_{letter}.other" for letter in "RWb"}
    second = output(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(output(loaded), second) and not torch.equal(second, plain)
    assert sorted(model.get_adapter_state_dict()) == [f"model.layers.1.reft_{letter}" for letter in "RWb"]
    model.set_adapter(["default", "other"])
    assert model.active_adapters() == ["default", "other"]
    assert not torch.equal(output(model), first) and not torch.equal(output(model), second)

    model.set_adapter("default")
    model.delete_adapter("other")
    assert torch.equal(generated(model), tokens)
    model.delete_adapter("default")
    assert torch.equal(output(model), plain) and torch.equal(generated(model), plainly)
    assert not any("reft_" in name for name, _ in model.named_parameters())
    model.load_adapter(str(tmp_path), adapter_name="back")
    assert torch.equal(output(model), second)


def test_hotswapping_is_refused_by_transformers_for_all_but_lora(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    loaded = build("llama")
    loaded.load_adapter(str(tmp_path))
    with pytest.raises(ValueError, match="only supported for LoRA"):
        loaded.load_adapter(str(tmp_path), adapter_name="default", hotswap=True)
    assert torch.equal(output(loaded), output(model))


# -- directories ------------------------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path) -> tuple[str, PeftModel]:
    """An adapter that names its base model, where pipelines look for the tokenizer."""
    chat_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = t.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = shaken(get_peft_model(base, config()))
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), model


TEXTS = ["What is the answer?", "user"]


def test_from_pretrained_and_pipeline_on_an_adapter_directory(directory):
    folder, model = directory
    tokens = tokenizer()(TEXTS[0], return_tensors="pt")
    expected = model.generate(**tokens, **OPTIONS)[0].tolist()
    loaded = t.AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is t.LlamaForCausalLM and not trainable(loaded)
    with torch.no_grad():
        assert torch.equal(loaded(**tokens).logits, model(**tokens).logits)
    assert loaded.generate(**tokens, **OPTIONS)[0].tolist() == expected
    for settings in ({"model": folder}, {"model": model, "tokenizer": tokenizer()}):
        pipeline = t.pipeline("text-generation", **settings)
        told = pipeline(TEXTS[0], return_tensors=True, **OPTIONS)
        assert list(told[0]["generated_token_ids"]) == expected
        # The pipeline pads a batch of two on the left. Each answer is the one that its prompt gets alone.
        pipeline.tokenizer.padding_side = "left"
        both = pipeline(TEXTS, batch_size=2, **OPTIONS)
        alone = [pipeline(text, **OPTIONS)[0] for text in TEXTS]
        assert [reply[0]["generated_text"] for reply in both] == [reply["generated_text"] for reply in alone]


SCRIPT = """
import sys
{first}
from transformers import AutoModelForCausalLM, pipeline
folder = sys.argv[1]
print(type(AutoModelForCausalLM.from_pretrained(folder).model.layers[0]).__name__)
print(type(pipeline("text-generation", model=folder).model.model.layers[0]).__name__)
"""


@pytest.mark.slow
def test_in_a_process_of_its_own_an_import_is_needed_where_the_autoload_is_off(directory, monkeypatch):
    """Where it is on, none is: tests/autoload/test_installed.py."""
    monkeypatch.setenv("PEFT_REFT_AUTOLOAD", "0")
    for first, expected in (("import peft_reft", "ReftLayer\nReftLayer\n"), ("", None)):
        script = [sys.executable, "-c", SCRIPT.format(first=first), directory[0]]
        run = subprocess.run(script, capture_output=True, text=True)
        if expected is None:  # PEFT's message for a method that it does not know
            assert run.returncode != 0 and "KeyError: 'REFT'" in run.stderr
        else:
            assert run.stdout == expected, run.stderr[-3000:]


PIPELINES = {
    "SEQ_CLS": ("text-classification", {"top_k": None}),
    "TOKEN_CLS": ("token-classification", {}),
    "FEATURE_EXTRACTION": ("feature-extraction", {}),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_of_other_tasks(task, tmp_path):
    kind, options = PIPELINES[task]
    base = build(("llama", task))
    base.resize_token_embeddings(len(tokenizer()), mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    model = shaken(get_peft_model(type(base).from_pretrained(tmp_path / "base"), config(task)))
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        states = model(**tokenizer()(TEXTS[0], return_tensors="pt"))[0]
    told = t.pipeline(kind, model=model, tokenizer=tokenizer())(TEXTS[0], **options)
    if task == "FEATURE_EXTRACTION":
        assert told == states.tolist()
    elif task == "SEQ_CLS":
        by_label = [reply["score"] for reply in sorted(told, key=lambda reply: reply["label"])]
        torch.testing.assert_close(torch.tensor(by_label), states[0].softmax(-1))
    else:
        assert told[0]["entity"] == f"LABEL_{states[0, 0].argmax()}"
    if LOADS_HEADS or task == "FEATURE_EXTRACTION":
        assert t.pipeline(kind, model=str(tmp_path / "adapter"))(TEXTS[0], **options) == told


AUTO = {
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "TOKEN_CLS": AutoPeftModelForTokenClassification,
    "QUESTION_ANS": AutoPeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": AutoPeftModelForFeatureExtraction,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
}


@pytest.mark.parametrize("name", [*SEQ2SEQ, *TASKS], ids=str)
def test_auto_classes_of_peft_load_the_edits_and_the_head(name, tmp_path):
    task = task_of(name)
    base = build(name)
    base.save_pretrained(tmp_path / "base")
    model = shaken(get_peft_model(type(base).from_pretrained(tmp_path / "base"), config(task)))
    heads = {n.split(".modules_to_save.")[0] for n in trainable(model) if "reft_" not in n}
    assert len(heads) == (task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"))  # the dtype that PEFT chooses
    model.save_pretrained(tmp_path / "adapter")
    loaded = AUTO[task].from_pretrained(tmp_path / "adapter")
    assert torch.equal(output(loaded, name), output(model, name))


# -- casts, copies ----------------------------------------------------------------------------------------------------


def orthonormal(model: torch.nn.Module, dtype: torch.dtype) -> bool:
    """Equal within 1e-5, or within the rounding of a narrower dtype."""
    tolerance = max(1e-5, 2 * torch.finfo(dtype).eps)
    bases = [weight(layer, "R").double() for layer in model.modules() if isinstance(layer, ReftLayer)]
    return all((R @ R.mT - torch.eye(4)).abs().max() <= tolerance for R in bases)


@pytest.mark.parametrize("make", [wrapped, native])
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double", torch.bfloat16, torch.float16], ids=str)
def test_casts_take_the_adapter_along_and_it_still_works(cast, make):
    model = make()
    before = output(model)
    model = model.to(cast) if isinstance(cast, torch.dtype) else getattr(model, cast)()
    (dtype,) = {p.dtype for p in model.parameters()}  # an explicit cast casts every weight, as in any module
    after = output(model)
    assert after.dtype == dtype
    torch.testing.assert_close(after.float(), before, rtol=0, atol=1e-5 if dtype.itemsize > 2 else 0.3)
    assert orthonormal(model, dtype)

    # Generated tokens are those that teacher forcing predicts.
    steps = model.generate(**BATCH, **OPTIONS, return_dict_in_generate=True, output_logits=True)
    mask = torch.nn.functional.pad(BATCH["attention_mask"], (0, 6), value=1)
    with torch.no_grad():
        forced = model(steps.sequences, attention_mask=mask, prompt_lengths=torch.tensor([9, 4])).logits[:, 8:-1]
    torch.testing.assert_close(
        forced.float(), torch.stack(steps.logits, 1).float(), rtol=0, atol=1e-4 if dtype.itemsize > 2 else 0.3
    )

    # The model trains. Cast back to single precision, the rows of R are orthonormal to single precision.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model.train()(**labelled(9, 4, prompt=3, seed=0)).loss.backward()
    optimizer.step()
    assert torch.isfinite(output(model.eval())).all() and orthonormal(model, dtype)
    model.float()
    output(model)
    assert orthonormal(model, torch.float32)


def test_there_and_back_with_no_forward_in_between():
    model = wrapped()
    output(model)
    model.half().float()
    assert not orthonormal(model, torch.float32)  # or this test tests nothing
    output(model)
    assert orthonormal(model, torch.float32)


def test_weights_saved_in_16_bits(tmp_path):
    wrapped().half().save_pretrained(tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float16}
    theirs, ours = PeftModel.from_pretrained(build("llama"), tmp_path), build("llama")
    ours.load_adapter(str(tmp_path))
    assert torch.equal(output(ours), output(theirs))
    assert orthonormal(ours, torch.float32) and orthonormal(theirs, torch.float32)


def test_by_way_of_the_meta_device():
    model, empty = wrapped(), wrapped().to("meta")
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    with pytest.raises(NotImplementedError, match="meta"):
        empty.to("cpu")
    empty.to_empty(device="cpu")
    buffers = dict(model.named_buffers())
    for name, buffer in empty.named_buffers():  # the buffers of rotary embeddings are in no state dict
        buffer.copy_(buffers[name])
    empty.load_state_dict(model.state_dict())
    assert torch.equal(output(empty), output(model)) and torch.equal(generated(empty), generated(model))


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_goes_into_another_model(assign):
    model, other = wrapped(), wrapped(init_weights="pyreft")
    output(other)
    other.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
    assert torch.equal(output(other), output(model))


def test_copies_of_a_model_with_an_added_adapter(tmp_path):
    # GPT-2, because with the package `kernels` transformers 5.16 makes a Llama that can't be pickled, with or without
    # ReFT.
    model = native("gpt2")
    expected, tokens = output(model), generated(model)
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        assert torch.equal(output(twin), expected) and torch.equal(generated(twin), tokens)
        twin.add_adapter(config(r=2), "other")
        assert torch.equal(output(twin), output(build("gpt2")))
