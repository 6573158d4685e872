"""Rows of the embedding that are trained beside the edits, tested as PEFT tests them for LoRA."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as t
from models import GROUPED, build, chat_model, labelled, prompts, randomize, tokenizer
from peft import PeftModel, get_peft_model
from peft.utils import TrainableTokensWrapper
from safetensors.torch import load_file

from peft_reft import ReftConfig


TOKENS = [5, 6, 9]
DELTA = "model.embed_tokens.token_adapter.trainable_tokens_delta"
BATCH = prompts(9, 4)
BATCH["input_ids"][0, :3] = torch.tensor(TOKENS)


def base(tied: bool = False) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.LlamaForCausalLM(t.LlamaConfig(**GROUPED, tie_word_embeddings=tied)).eval()


def config(tokens: object = TOKENS, **settings) -> ReftConfig:
    settings = {"r": 4, "positions": "f2+l2", "task_type": "CAUSAL_LM", **settings}
    return ReftConfig(trainable_token_indices=tokens, **settings)


def trained(model: PeftModel) -> PeftModel:
    """A model after two training steps on a batch with the trained tokens."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    batch = labelled(9, 4, prompt=3, seed=1)
    batch["input_ids"][0, :3] = torch.tensor(TOKENS)
    for _ in range(2):
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


@pytest.mark.parametrize("tokens", [TOKENS, {"embed_tokens": TOKENS}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_tokens_are_trained_and_no_others(tied, tokens):
    plain = base(tied)
    model = get_peft_model(base(tied), config(tokens))
    assert torch.equal(logits(model), logits(plain))
    assert [n for n, p in model.named_parameters() if p.requires_grad and "reft_" not in n] == [
        f"base_model.model.{DELTA}.default"
    ]
    trained(model)
    changed = (model.get_input_embeddings().weight != plain.get_input_embeddings().weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == TOKENS
    changed = (model.get_output_embeddings().weight != plain.get_output_embeddings().weight).any(dim=1)
    assert changed.nonzero().flatten().tolist() == (TOKENS if tied else [])


@pytest.mark.parametrize("tied", [False, True])
def test_saved_are_the_rows_alone_and_loading_gives_the_same_model(tied, tmp_path):
    model = trained(get_peft_model(base(tied), config()))
    expected, options = logits(model), {"max_new_tokens": 5, "do_sample": False}
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: value.shape for key, value in saved.items() if "reft_" not in key} == {
        f"base_model.model.{DELTA}": (len(TOKENS), 32)
    }
    for settings in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(base(tied), tmp_path, **settings).eval()
        assert torch.equal(logits(loaded), expected)
        assert torch.equal(loaded.generate(**BATCH, **options), model.generate(**BATCH, **options))
    assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("tied", [False, True])
def test_off_and_unloaded_the_model_is_the_base_model(tied):
    plain = logits(base(tied))
    model = trained(get_peft_model(base(tied), config()))
    twin, expected = copy.deepcopy(model), logits(model)
    assert not torch.equal(expected, plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    unloaded = model.unload()
    assert torch.equal(logits(unloaded), plain)
    assert not any(isinstance(module, TrainableTokensWrapper) for module in unloaded.modules())
    embeddings = unloaded.get_input_embeddings().weight, unloaded.get_output_embeddings().weight
    assert (embeddings[0] is embeddings[1]) == tied
    assert torch.equal(logits(twin), expected)


def test_several_adapters_with_tokens_of_their_own(tmp_path):
    model = trained(get_peft_model(base(), config()))
    first = logits(model)
    model.add_adapter("other", config([6, 7], layers_to_transform=[1]))
    model.add_adapter("none", ReftConfig(r=2, positions="l1", task_type="CAUSAL_LM"))
    model.set_adapter("other")
    second = logits(trained(model))
    assert not torch.equal(first, second)
    model.set_adapter("none")
    assert torch.equal(logits(model), logits(base()))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.delete_adapter("none")  # PEFT can't save an adapter without trained tokens beside one with them, LoRA or not
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path / "other", adapter_name="other")
    loaded.load_adapter(tmp_path, "default")
    assert torch.equal(logits(loaded), second)
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), first)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_the_embedding_of_an_encoder_decoder_model_and_all_that_share_it():
    model = get_peft_model(
        build("t5"), config({"shared": TOKENS}, task_type="SEQ_2_SEQ_LM", target_modules=r"encoder\.block\.\d")
    )
    wrapped = [n for n, m in model.base_model.model.named_modules() if isinstance(m, TrainableTokensWrapper)]
    assert wrapped == ["shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]


def test_a_model_that_scales_its_embeddings():
    model = get_peft_model(build("gemma"), config())
    assert torch.equal(logits(model), logits(build("gemma")))


@pytest.mark.parametrize("resized", [False, True])
def test_a_resized_embedding_is_saved_with_them(resized, tmp_path):
    base().save_pretrained(tmp_path / "base")
    resize = {"new_num_tokens": GROUPED["vocab_size"] + 2} if resized else {}
    bases = [t.LlamaForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2)]
    for model in bases:
        model.resize_token_embeddings(**resize)
    model = trained(get_peft_model(bases[0], config()))
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    whole = "base_model.model.model.embed_tokens.token_adapter.base_layer.weight"
    assert (whole in saved) == resized
    assert torch.equal(logits(PeftModel.from_pretrained(bases[1], tmp_path / "adapter")), logits(model))


def test_new_tokens_of_a_chat_template_in_trl(tmp_path):
    """SFTConfig(chat_template_path=...) adds tokens, and asks the adapter to train them with the head."""
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    known = tokenizer()
    other = tokenizer()
    other.add_tokens(["<|new|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "template")
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 4
    trainer = trl.SFTTrainer(
        chat_model(),
        trl.SFTConfig(
            output_dir=str(tmp_path / "out"),
            chat_template_path=str(tmp_path / "template"),
            max_steps=2,
            report_to=[],
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=known,
        peft_config=config(
            None, response_template="<|im_start|>assistant\n", tokenizer_name_or_path=str(tmp_path / "template")
        ),
    )
    trainer.train()
    tokens = trainer.model.peft_config["default"].trainable_token_indices["embed_tokens"]
    assert known.convert_tokens_to_ids("<|new|>") in tokens
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved[f"base_model.model.{DELTA}"].shape == (len(tokens), 32)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(ValueError, match="'nowhere'.* not found"):
        get_peft_model(base(), config({"nowhere": [1]}))
    with pytest.raises(ValueError, match="already marked to be trained fully"):
        get_peft_model(base(), config({"embed_tokens": [1]}, modules_to_save=["embed_tokens"]))
    for wrong in ([], [-1], ["a"], "5", 5, {"embed_tokens": []}, {"embed_tokens": 5}, [True]):
        with pytest.raises(ValueError, match="trainable_token_indices=.* is not allowed in ReftConfig"):
            config(wrong)


def test_it_is_saved_in_the_config(tmp_path):
    for tokens in (TOKENS, {"embed_tokens": TOKENS}):
        config(tokens).save_pretrained(tmp_path)
        assert ReftConfig.from_pretrained(tmp_path).trainable_token_indices == tokens


def test_edits_and_tokens_together_are_those_of_each():
    """Edits apply to the states that the changed embedding leads to."""
    model = get_peft_model(base(), config())
    randomize(model)
    trained(model)
    expected = logits(model)
    rows = model.get_input_embeddings().weight.detach().clone()
    plain = base()
    with torch.no_grad():
        plain.get_input_embeddings().weight.copy_(rows)
    edits = get_peft_model(plain, config(None))
    own = dict(edits.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "reft_" in name:
                own[name].copy_(parameter)
    torch.testing.assert_close(logits(edits), expected, rtol=0, atol=1e-5)
