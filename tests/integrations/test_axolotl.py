"""The plugin through axolotl's own command line, on a CPU.

The model is SmolLM2 cut down to its first 4 layers, which is quick and still learns; `make quickstart` runs the same
way on the whole of it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from axolotl_runs import LORA, LORA_ON_A_CPU, TO_REFT, axolotl, fill, finds_plugins
from models import chat_model, randomize, tokenizer
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import ReftConfig, find_response_template


pytest.importorskip("axolotl", reason="needs the extra `axolotl`")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2) -> Path:
    return fill(tmp_path_factory.mktemp("axolotl"), smollm2)


def logits(folder: Path, adapter: Path) -> torch.Tensor:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.fixture(scope="module")
def trained(folder) -> SimpleNamespace:
    run = axolotl(folder, "train", LORA | TO_REFT, name="trained")
    assert run.code == 0, run.output[-6000:]
    return run


def test_two_lines_make_a_lora_yaml_a_reft_one(folder, trained):
    assert len(trained.losses) == 16 and trained.losses[-1] < 0.5 * trained.losses[0]
    assert trained.notes["classes"]["ReftLayer"] == 2
    assert trained.notes["adapter"] == "loreft"  # its own name again once the model is loaded
    config = PeftConfig.from_pretrained(trained.out)
    assert isinstance(config, ReftConfig)
    assert (config.r, config.dropout, config.layers_to_transform, config.positions, config.task_type) == (
        4,
        0.05,
        [0, 2],
        "f7+l7",
        "CAUSAL_LM",
    )
    assert not torch.equal(logits(folder, trained.out), logits(folder, trained.out / "checkpoint-4"))
    warnings = re.findall(r"has no use for these LoRA keys, ignored: (.*)", trained.output)
    assert warnings == ["lora_alpha, lora_target_linear"]


def test_resume_from_a_checkpoint_ends_where_the_whole_run_does(folder, trained):
    checkpoint = trained.out / "checkpoint-8"
    config = LORA | TO_REFT | {"resume_from_checkpoint": str(checkpoint)}
    run = axolotl(folder, "train", config, name="resumed")
    assert run.code == 0, run.output[-6000:]
    assert len(run.losses) == 8
    assert run.losses == pytest.approx(trained.losses[8:], rel=1e-2)
    torch.testing.assert_close(logits(folder, run.out), logits(folder, trained.out), rtol=0, atol=1e-4)


def test_training_goes_on_from_lora_model_dir(folder, trained):
    config = LORA | TO_REFT | {"lora_model_dir": str(trained.out), "max_steps": 2, "reft": {"positions": "l1"}}
    run = axolotl(folder, "train", config, name="continued")
    assert run.code == 0, run.output[-6000:]
    assert run.losses[0] < 0.5 * trained.losses[0]
    assert "keeps its own settings, not the YAML's: positions ('l1' in the YAML)" in run.output
    assert PeftConfig.from_pretrained(run.out).positions == "f7+l7"


def test_inference_and_evaluate(folder, trained):
    config = LORA | TO_REFT | {"lora_model_dir": str(trained.out)}
    asked = axolotl(
        folder, "inference", config, "--prompter", "AlpacaPrompter", name="asked", stdin="Colour number 3?"
    )
    assert asked.code == 0, asked.output[-6000:]
    assert "ReftLayer" in asked.notes["classes"]
    assert "### Response:" in asked.output
    judged = axolotl(folder, "evaluate", config, name="judged")
    assert judged.code == 0, judged.output[-6000:]
    loss = float(re.search(r"loss,([0-9.]+)", (judged.out / "eval_summary.csv").read_text())[1])
    assert loss < 0.5 * trained.losses[0]


def test_merging_stops_with_the_reason_and_writes_nothing(folder, trained):
    run = axolotl(folder, "merge-lora", LORA | TO_REFT | {"lora_model_dir": str(trained.out)}, name="merged")
    assert run.code != 0
    assert "adapter: loreft can't be merged into the base model" in run.output
    assert not (folder / "merged" / "merged").exists() and not (trained.out / "merged").exists()


def test_edits_of_every_token_are_merged(folder):
    block = {"positions": "all", "target_modules": ["down_proj"], "add_bias": False, "init_weights": "pyreft"}
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    config = ReftConfig(r=4, layers_to_transform=[0, 2], task_type="CAUSAL_LM", **block)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder / "every_token")
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        edited = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(edited, model(ids).logits, atol=1e-2)
    settings = LORA | TO_REFT | {"reft": block, "lora_model_dir": str(folder / "every_token")}
    refused = axolotl(folder, "merge-lora", settings, name="shards")
    assert refused.code != 0 and "Set merge_method: legacy" in refused.output
    run = axolotl(folder, "merge-lora", settings | {"merge_method": "legacy"}, name="legacy")
    assert run.code == 0, run.output[-6000:]
    merged = AutoModelForCausalLM.from_pretrained(folder / "legacy" / "merged", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, edited, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "key, quantized, steps",
    [
        ("load_in_4bit", "Linear4bit", {"max_steps": 8}),
        # A step with 8-bit layers takes a minute on a CPU. tests/quantized/test_quantized.py trains with them.
        ("load_in_8bit", "Linear8bitLt", {"max_steps": 1, "micro_batch_size": 1}),
    ],
)
def test_quantized_bases_are_quantized_and_prepared_as_for_lora(folder, key, quantized, steps):
    config = LORA | TO_REFT | steps | {key: True, "val_set_size": 0, "save_strategy": "no"}
    run = axolotl(folder, "train", config, name=key)
    assert run.code == 0, run.output[-6000:]
    assert run.notes["classes"][quantized] == 4 * 7  # every linear layer of every block
    assert run.notes["classes"]["ReftLayer"] == 2
    assert run.notes["trained"] == ["torch.float32"]
    assert "prepare_model_for_kbit_training" in run.output
    if steps["max_steps"] > 1:
        assert run.losses[-1] < 0.5 * run.losses[0]
    # The base in LoRA's own run of that YAML. Twice: LoRA's wrappers have the class names of the layers inside.
    lora = {
        "adapter": "qlora" if key == "load_in_4bit" else "lora",
        "plugins": [],
        "max_steps": 1,
        "peft_layers_to_transform": None,
    }
    lora = axolotl(folder, "train", config | LORA_ON_A_CPU | lora, name=f"{key}_lora")
    assert lora.notes, lora.output[-6000:]
    assert lora.notes["classes"][quantized] == 2 * 4 * 7
    assert lora.notes["norms"] == run.notes["norms"]


def test_log_edits_logs_the_sizes_of_edits(folder):
    config = LORA | TO_REFT | {"max_steps": 4, "val_set_size": 0, "save_strategy": "steps", "save_steps": 4}
    run = axolotl(folder, "train", config | {"reft": {"log_edits": 2}}, name="sizes")
    assert run.code == 0, run.output[-6000:]
    history = json.loads(next(run.out.glob("checkpoint-4*/trainer_state.json")).read_text())["log_history"]
    sizes = [row for row in history if "reft/edit_size" in row]
    assert [row["step"] for row in sizes] == [2, 4]
    assert sizes[1]["reft/edit_size"] > sizes[0]["reft/edit_size"] > 0  # it starts at the base, and learns
    assert {key for key in sizes[0] if key.startswith("reft/edit_size/")} == {
        "reft/edit_size/model.layers.0",
        "reft/edit_size/model.layers.2",
    }
    assert 0 < sizes[0]["reft/edited_tokens"] < 1
    refused = axolotl(folder, "train", config | {"reft": {"log_edits": 0}}, name="never")
    assert refused.code != 0 and re.search(r"log_edits\s+Input should be greater than or equal to 1", refused.output)


SHOWN = re.compile(r"^row (\d+), tokens (\d+) to \d+; the prompt is told by (\w+)\n  (.*)$", re.MULTILINE)
OPENING = "<|im_start|>assistant\n"
SHORT = {"max_steps": 6, "val_set_size": 0, "save_strategy": "no", "sequence_len": 128, "dataset_num_proc": 1}


def shown(run: SimpleNamespace) -> list[tuple[str, str, str, str]]:
    """The training batch that `--debug` printed: row, first token, source of the prompt, and the marked text."""
    assert run.code == 0, run.output[-6000:]
    assert run.losses[-1] < 0.7 * run.losses[0]
    return SHOWN.findall(run.output)


@pytest.mark.parametrize("told_by", ["labels", "response_template"])
def test_sample_packing(folder, told_by):
    """Several texts in a row, each with its own first and last tokens. With a template, inputs can be trained on."""
    packing = {"sample_packing": True, "attn_implementation": "sdpa", "micro_batch_size": 1}
    config = LORA | TO_REFT | SHORT | packing
    if told_by == "response_template":
        config |= {"train_on_inputs": True, "reft": {"response_template": "### Response:\n"}}
    texts = shown(axolotl(folder, "train", config, "--debug", name=f"packed_{told_by}"))
    assert len(texts) >= 3 and {row for row, *_ in texts} == {"0"}
    for _, _, source, text in texts:
        assert source == told_by
        if "Below" in text:  # the rest is padding that fills the row up
            assert text.startswith("F[Below]") and text.count("F[") == 7
            assert re.search(r"(L\[[^\]]*\]){7}»(red|blue|green|white)", text)


def test_every_turn_of_a_conversation(folder):
    data = [{"path": str(folder / "talks.jsonl"), "type": "chat_template"}]
    reft = {"prompt_boundary": "every", "positions": "f2+l3"}
    config = LORA | TO_REFT | SHORT | {"datasets": data, "reft": reft}
    texts = shown(axolotl(folder, "train", config, "--debug", name="talks"))
    assert len(texts) == 4
    for *_, source, text in texts:
        assert source == "response_template" and text.count("F[") == 2 and text.count("L[") == 6
        assert len(re.findall(r"L\[ass\]L\[istant\]L\[\\n\]»", text)) == 2


LABELS = {
    "questions and ends of turns too": {"roles_to_train": ["user", "assistant"], "train_on_eos": "all"},
    "inputs too": {},
    "marked messages": {"message_field_training": "train"},
}


@pytest.mark.parametrize("trained_on", LABELS)
def test_options_that_choose_labels_move_no_edit(folder, trained_on):
    """Of the same texts the same tokens are edited, whatever is trained."""
    talks = [json.loads(line) for line in (folder / "talks.jsonl").read_text().splitlines()]
    for talk in talks:
        for message, train in zip(talk["messages"], (True, False, False, True)):
            message["train"] = train
    (folder / "marked.jsonl").write_text("\n".join(map(json.dumps, talks)))
    data = [{"path": str(folder / "marked.jsonl"), "type": "chat_template", **LABELS[trained_on]}]
    config = LORA | TO_REFT | SHORT | {"datasets": data, "max_steps": 1, "reft": {"positions": "f2+l3"}}
    config |= {"dataset_prepared_path": str(folder / f"prepared {trained_on}")}
    if trained_on == "inputs too":
        config["train_on_inputs"] = True
    run = axolotl(folder, "train", config, "--debug", name="labels")
    assert run.code == 0, run.output[-6000:]
    texts = SHOWN.findall(run.output)
    assert len(texts) == 4
    for *_, source, text in texts:
        first, _, rest = text.partition("»")
        assert source == "response_template" and first.startswith("F[<|im_start|>]F[")
        assert first.endswith("L[ass]L[istant]L[\\n]") and "L[" not in rest
    saved = run.notes["config"]
    assert saved["response_template"] == AutoTokenizer.from_pretrained(folder / "base")(OPENING)["input_ids"]


def test_the_perplexity_metric_is_a_number():
    """`eval_causal_lm_metrics: [perplexity]` scores texts with labels for all of their tokens. A text without
    a prompt has nothing to edit, and one of a conversation is edited where `generate` would edit it."""
    from axolotl.utils.callbacks.perplexity import Perplexity

    tokens, base = tokenizer(), chat_model()
    model = get_peft_model(base, ReftConfig(r=4, response_template=find_response_template(tokens))).eval()
    randomize(model)
    chat = [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue, I think."}]
    texts = ["The answer is not known to me.", tokens.apply_chat_template(chat, tokenize=False)]
    plain, conversation = (Perplexity(tokens, max_seq_len=128).compute(model=model, references=[one]) for one in texts)
    with model.disable_adapter():
        untouched = [Perplexity(tokens, max_seq_len=128).compute(model=model, references=[one]) for one in texts]
    assert plain["score"] == pytest.approx(untouched[0]["score"])
    assert conversation["score"] != pytest.approx(untouched[1]["score"], rel=1e-3)


def test_dpo(folder):
    data = [{"path": str(folder / "pairs.jsonl"), "split": "train"}]
    config = LORA | TO_REFT | SHORT | {"rl": "dpo", "datasets": data, "learning_rate": 0.002}
    run = axolotl(folder, "train", config, "--debug", name="dpo", probe=False)  # the probe needs a PeftModel
    texts = shown(run)
    assert len(texts) == 8  # four pairs
    for *_, source, text in texts:
        prompt, _, answer = text.partition("»")
        assert source == "prompt_lengths" and prompt.startswith("F[Colour]") and prompt.endswith("L[?]")
        assert re.match(r" (red|blue|green|white|none)", answer) and "[" not in answer
    assert run.losses[0] == pytest.approx(0.6931, abs=1e-3)  # the reference is the base model
    assert PeftConfig.from_pretrained(run.out).intervention == "loreft"


def test_a_template_of_tokens_that_the_yaml_adds(folder):
    config = LORA | TO_REFT | SHORT | {"tokens": ["<|reply|>"], "reft": {"response_template": "<|reply|>"}}
    config |= {"lora_modules_to_save": ["embed_tokens", "lm_head"]}
    run = axolotl(folder, "train", config, name="added_tokens")
    assert run.code != 0
    assert re.search(r"holds tokens that this YAML adds.*response_template: \[49152\]", run.output), run.output[-4000:]


def test_reft_block_and_other_keys(folder):
    config = LORA | TO_REFT
    config |= {
        "adapter": "nodireft",
        "peft_autocast_adapter_dtype": True,
        "lora_modules_to_save": ["lm_head"],
        "max_steps": 2,
        "reft": {
            "positions": "f3",
            "act_fn": "gelu",
            "target_modules": ["mlp"],
            "init_weights": "pyreft",
            "rank_pattern": {"layers.2.mlp": 2},
        },
    }
    config["gradient_checkpointing"] = False
    run = axolotl(folder, "train", config, name="block")
    assert run.code == 0, run.output[-6000:]
    saved = run.notes["config"]
    assert (saved["intervention"], saved["positions"], saved["act_fn"]) == ("nodireft", "f3", "gelu")
    assert (saved["target_modules"], saved["modules_to_save"]) == (["mlp"], ["lm_head"])
    assert (saved["r"], saved["rank_pattern"]) == (4, {"layers.2.mlp": 2})


def test_tokens_that_lora_would_train_are_trained():
    from peft_reft.integrations.axolotl.keys import reft_config

    yaml_keys = SimpleNamespace(adapter="loreft", lora_r=4, peft_trainable_token_indices=[5, 6])
    assert reft_config(yaml_keys).trainable_token_indices == [5, 6]


# A chat template that does not say where an answer begins, and one that says it otherwise than SmolLM2's.
PLAIN_CHATS = [
    {
        "path": "talks.jsonl",
        "type": "chat_template",
        "chat_template": "jinja",
        "chat_template_jinja": "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    }
]
BRACKETS = {
    "chat_template_jinja": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}<|im_end|>"
    "{% elif m.role == 'user' %}[INST] {{ m.content.strip() }} [/INST]{% endif %}{% endfor %}"
}


@pytest.mark.parametrize(
    "config, message",
    [
        pytest.param(
            {"plugins": []},
            r"Adapter 'loreft' is not built in.*`plugins:`",
            marks=pytest.mark.skipif(
                finds_plugins(), reason="axolotl 0.21 finds the plugin: test_axolotl_versions.py"
            ),
        ),
        ({"reft": {"positions": "f7-l7"}}, r"positions='f7-l7' does not parse"),
        ({"reft": {"position": "f7+l7"}}, r"reft.position"),
        ({"lora_r": 0}, r"r=0 is not allowed.*lora_r sets r"),
        ({"adapter": "lora", "reft": {"positions": "f1"}}, r"reft: is set, but adapter: lora is not a ReFT adapter"),
        ({"peft_layers_to_transform": [9]}, r"layers_to_transform=\[9\] asks for layers that don't exist: \[9\]"),
        ({"train_on_inputs": True}, r"train_on_inputs: true leaves no label masked.*response_template"),
        (
            {"rl": "orpo", "datasets": PLAIN_CHATS},
            r"rl: orpo gives the model no labels.*No response template was found.*Set reft: response_template",
        ),
        (
            {"datasets": [PLAIN_CHATS[0] | {"train_on_eos": "all", "roles_to_train": ["user", "assistant"]}]},
            r"datasets\[0\].*roles_to_train: \['user', 'assistant'\], train_on_eos: all.*Remove them",
        ),
        (
            {"datasets": [{"path": "talks.jsonl", "type": "chat_template"}, {**PLAIN_CHATS[0], **BRACKETS}]},
            r"open answers in different ways: datasets\[0\].*datasets\[1\].*Set one chat_template: for all",
        ),
        ({"optimizer": "muon"}, r"optimizer: muon steps matrices.*adamw"),
        ({"reft": {"prompt_boundary": "last"}}, r"prompt_boundary"),
    ],
    ids=str,
)
def test_bad_yaml_stops_with_the_reason(folder, config, message):
    run = axolotl(folder, "train", LORA | TO_REFT | config, name="bad")
    assert run.code != 0
    assert re.search(message, run.output), run.output[-6000:]
    assert not list(folder.glob("bad/*.safetensors"))


def test_an_adapter_of_another_kind_in_lora_model_dir(folder, trained, tmp_path):
    config = LORA | TO_REFT | {"adapter": "direft", "lora_model_dir": str(trained.out)}
    run = axolotl(folder, "inference", config, name="other_kind", stdin="x")
    assert run.code != 0 and re.search("holds an adapter of kind loreft.*Set adapter: loreft", run.output)
