"""The experiments for PEFT's method_comparison: what its harness (at PEFT's commit 5d602fd) checks and does with them.

The harness itself needs an accelerator, Llama-3.2-3B and data sets from the Hub.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers as t
from models import GROUPED, tokenizer
from paths import REPOSITORY
from peft import PeftConfig, get_peft_model

from peft_reft import ReftConfig, explain_positions


FOLDER = REPOSITORY / "examples" / "method_comparison" / "MetaMathQA" / "experiments"
EXPERIMENTS = sorted(path.parent for path in FOLDER.rglob("adapter_config.json"))
# The harness's default_training_params.json, as far as experiments may change it. It refuses other keys.
KEYS = {
    "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile",
    "use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler",
    "use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
}  # fmt: skip
QUERY = "Question: {query} Think step by step.\nAnswer:"
QUESTIONS = ["Blue and blue, what is it?", "If 2 apples cost 4 coins, what do 6 apples cost?"]
ANSWERS = ["Blue. The answer is: blue", " 4 / 2 = 2 coins each. The answer is: 12"]  # one right behind the colon


def test_there_are_two_and_each_lies_where_the_harness_looks():
    assert [path.name for path in EXPERIMENTS] == [
        "llama-3.2-3B-loreft-rank4-upper-layers",
        "llama-3.2-3B-loreft-rank8",
    ]
    for path in EXPERIMENTS:
        assert path.parent == FOLDER / "reft"
        assert {file.name for file in path.iterdir()} == {"adapter_config.json", "training_params.json"}


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_the_files_are_what_the_harness_takes(path):
    config = PeftConfig.from_pretrained(str(path))
    assert isinstance(config, ReftConfig) and config.task_type == "CAUSAL_LM"
    written = json.loads((path / "adapter_config.json").read_text())
    fields = {one.name for one in dataclasses.fields(ReftConfig)}
    assert set(written) - fields == {"library"}  # PEFT would drop others with a warning
    assert written == json.loads(json.dumps(config.to_dict(), default=list)) | {
        "peft_version": written["peft_version"],
        "library": written["library"],
    }
    parameters = json.loads((path / "training_params.json").read_text())
    assert set(parameters) <= KEYS
    # `optimizer_kwargs` replaces the default's whole: without weight_decay, AdamW's own 0.01 would count.
    assert set(parameters["optimizer_kwargs"]) == {"lr", "weight_decay"}
    torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))], **parameters["optimizer_kwargs"])


def test_the_papers_settings():
    """arXiv 2404.03592, appendix D.1, and pyreft's examples/loreft/README.md: LLaMA on arithmetic."""
    path = FOLDER / "reft" / "llama-3.2-3B-loreft-rank8"
    config = PeftConfig.from_pretrained(str(path))
    assert (config.intervention, config.r, config.positions, config.share_weights) == ("loreft", 8, "f7+l7", True)
    assert (config.layers_to_transform, config.dropout, config.act_fn) == (None, 0.0, None)
    assert json.loads((path / "training_params.json").read_text()) == {
        "optimizer_kwargs": {"lr": 9e-4, "weight_decay": 0.0}
    }


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_the_number_of_parameters_is_that_of_the_page(path):
    sizes = {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    with torch.device("meta"):
        base = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_attention_heads=24, num_key_value_heads=8))
    config = dataclasses.replace(PeftConfig.from_pretrained(str(path)), response_template=None)
    model = get_peft_model(base, config, low_cpu_mem_usage=True)
    groups, layers = config.groups, len(config.layers_to_transform or range(28))
    expected = layers * groups * config.r * (2 * 3072 + 1)
    assert sum(one.numel() for one in model.parameters() if one.requires_grad) == expected
    page = (FOLDER.parents[1] / "README.md").read_text()
    (row,) = [line for line in page.splitlines() if path.name in line and line.startswith("|")]
    assert row.endswith(f"| {expected:,} |")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama of 28 layers, with a byte-level tokenizer as Llama 3 has."""
    folder = tmp_path_factory.mktemp("base")
    words = tokenizer()
    words.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {**GROUPED, "num_hidden_layers": 28, "vocab_size": len(words), "max_position_embeddings": 800}
    t.LlamaForCausalLM(t.LlamaConfig(**sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.name)
def test_it_trains_and_answers_in_the_harness_way(path, base):
    words = t.AutoTokenizer.from_pretrained(base)
    words.padding_side, words.pad_token = "right", words.eos_token
    config = PeftConfig.from_pretrained(str(path))
    model = get_peft_model(t.AutoModelForCausalLM.from_pretrained(base), config, autocast_adapter_dtype=True)

    # Training: whole rows, and a label on each token.
    prompts = [QUERY.format(query=question) for question in QUESTIONS]
    rows = words([prompt + answer for prompt, answer in zip(prompts, ANSWERS)])
    batch = words.pad(rows, return_tensors="pt")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    settings = json.loads((path / "training_params.json").read_text())["optimizer_kwargs"]
    optimizer = torch.optim.AdamW(model.parameters(), **settings)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.train()(**batch, num_items_in_batch=batch["attention_mask"].sum().item()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    # Validation and test: prompts alone, padded on the left. The same tokens are edited.
    asked = words.pad(words(prompts), return_tensors="pt", padding_side="left")
    trained_on, answered = (explain_positions(model, words, one, quiet=True) for one in (batch, asked))
    for one, other in zip(trained_on, answered, strict=True):
        assert (one.first, one.last) == (other.first, other.last)
        assert len(one.first) == len(one.last) == 7 and one.source == "response_template"
        edited = one.last[-1] + 1
        assert words.decode(one.ids[:edited]).endswith(" Think step by step.\nAnswer")
        assert one.ids[:edited] == other.ids[:edited]
    with torch.inference_mode():
        generated = model.eval().generate(
            **asked, generation_config=t.GenerationConfig(max_length=asked["input_ids"].shape[1] + 4, pad_token_id=0)
        )
    assert generated.shape[0] == 2
