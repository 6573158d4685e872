"""LoRA and ReFT trained together on one base: both learn, each is saved in its own directory, and both come back."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from models import build, labelled, prompts
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from peft_reft import ReftConfig, ReftLayer


BATCH = prompts(9, 4)
REFT = {"r": 4, "positions": "f2+l2", "task_type": "CAUSAL_LM"}


def both(architecture: str = "llama", targets=("q_proj", "down_proj"), **lora) -> PeftModel:
    config = LoraConfig(r=2, target_modules=list(targets), task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    model = get_peft_model(build(architecture), config, adapter_name="lora")
    return get_peft_model(model, ReftConfig(**REFT), adapter_name="reft")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(**BATCH).logits


def trained(model: PeftModel, steps: int = 4) -> PeftModel:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(steps):
        model.train()(**labelled(9, 7, prompt=4, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# The fully connected layers of OPT are direct parts of a block.
@pytest.mark.parametrize("architecture, targets", [("llama", ("q_proj", "down_proj")), ("opt", ("fc1", "v_proj"))])
def test_both_are_trained_saved_and_loaded(architecture, targets, tmp_path):
    model = both(architecture, targets)
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained(model)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name or "reft_" in name}

    expected = logits(model)
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(build(architecture), tmp_path / "lora")
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, tensor in plain.named_parameters():
        if "lora_" in name:
            assert torch.equal(saved[name.replace(".default", "")], tensor), name
    assert sum("lora_" in name for name, _ in plain.named_parameters()) == len(saved)
    assert all(
        ".reft_" in key and "lora" not in key for key in load_file(tmp_path / "reft" / "adapter_model.safetensors")
    )

    lora = PeftModel.from_pretrained(build(architecture), tmp_path / "lora", adapter_name="lora")
    loaded = PeftModel.from_pretrained(lora, tmp_path / "reft", adapter_name="reft")
    assert torch.equal(logits(loaded), expected)
    assert not torch.allclose(logits(plain), expected, atol=1e-2)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**BATCH, **options), model.generate(**BATCH, **options))


def test_the_lora_directory_needs_nothing_of_this_package(tmp_path):
    model = trained(both())
    model.save_pretrained(tmp_path / "adapters")
    build("llama").save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, ReftLayer)):
            layer.enable_adapters(False)
        torch.save({"batch": BATCH, "logits": model(**BATCH).logits}, tmp_path / "expected.pt")
    script = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapters/lora")
with torch.no_grad():
    assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
assert "peft_reft" not in sys.modules
print("same logits")
"""
    without = {**os.environ, "PEFT_REFT_AUTOLOAD": "0"}  # where the package is installed, `import peft` brings it
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, env=without)
    assert "same logits" in run.stdout, run.stderr[-3000:]


def test_switching_off_and_taking_off():
    base = build("llama")
    plain = logits(base)
    model = trained(both())
    edited = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    assert torch.equal(logits(model), edited)
    assert any("lora_" in name and p.requires_grad for name, p in model.named_parameters())
    assert not any(isinstance(module, ReftLayer) for module in model.unload().modules())


@pytest.mark.parametrize("architecture, targets", [("llama", ("q_proj",)), ("opt", ("fc1",))])
def test_a_part_replaced_by_its_name_without_the_wrapper_is_replaced(architecture, targets):
    model = both(architecture, targets)
    expected = logits(model)
    name = next(name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    parent, _, last = name.rpartition(".")
    layer = model.get_submodule(name)
    setattr(model.get_submodule(parent), last, layer.base_layer)
    assert not any(module is layer for module in model.modules())
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize(
    "settings", [{"layers_to_transform": [1]}, {"positions": "all", "target_modules": ["q_proj"]}]
)
def test_taking_reft_off_leaves_all_of_lora(settings):
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(build("llama"), lora, adapter_name="lora")
    alone = logits(model)
    reft = ReftConfig(**{**REFT, "init_weights": "pyreft", "modules_to_save": ["lm_head"], **settings})
    both_of_them = get_peft_model(model, reft, adapter_name="reft")
    assert not torch.allclose(logits(both_of_them), alone, atol=1e-2)
    both_of_them.unload()
    assert torch.equal(logits(model), alone) and list(model.peft_config) == ["lora"]


def test_lora_is_merged_below_the_edits(tmp_path):
    model = trained(both())
    expected = logits(model)
    model.save_pretrained(tmp_path)
    merged = PeftModel.from_pretrained(build("llama"), tmp_path / "lora").merge_and_unload()
    loaded = PeftModel.from_pretrained(merged, tmp_path / "reft")
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-4)


def test_state_dicts_go_there_and_back_and_name_lora_as_without_reft():
    model = trained(both())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert [name for name, _ in model.named_parameters()] == list(state)
    alone = get_peft_model(
        build("llama"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]), adapter_name="lora"
    )
    assert {name for name in state if "lora_" in name} == {name for name in alone.state_dict() if "lora_" in name}
    twin = both()
    assert not torch.allclose(logits(twin), logits(model), atol=1e-3)
    twin.load_state_dict(state, strict=True)
    assert torch.equal(logits(twin), logits(model))


def test_trainer_resumes_both(tmp_path):
    rows = [{key: value[0] for key, value in labelled(9, prompt=4, seed=seed).items()} for seed in range(8)]

    def trainer(folder: str, **options) -> Trainer:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            per_device_train_batch_size=2,
            max_steps=4,
            save_steps=2,
            learning_rate=0.02,
            report_to=[],
            use_cpu=True,
            save_strategy="steps",
            disable_tqdm=True,
        )
        return Trainer(model=both(), args=arguments, train_dataset=rows)

    through = trainer("through")
    through.train()
    assert sorted(p.name for p in (tmp_path / "through" / "checkpoint-2").iterdir() if p.is_dir()) == ["lora", "reft"]
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-2"))
    for (name, ours), (_, theirs) in zip(through.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(ours, theirs), name
        assert ours.requires_grad == theirs.requires_grad == ("lora_" in name or "reft_" in name), name


def test_equal_names_are_refused():
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter_name='default' is that of a .*LORA adapter on the model"):
        get_peft_model(model, ReftConfig(**REFT))


@pytest.mark.parametrize("field, value", [("modules_to_save", ["lm_head"]), ("trainable_token_indices", [3, 4])])
def test_what_is_switched_to_one_adapter_belongs_to_reft(field, value):
    with pytest.raises(NotImplementedError, match=f"Set {field} in ReftConfig instead"):
        both(**{field: value})
    lora = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="lora")
    model = get_peft_model(lora, ReftConfig(**REFT, **{field: value}), adapter_name="reft")
    named = "lm_head" if field == "modules_to_save" else "token_adapter"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(any(part in name for name in trained) for part in (named, "lora_", "reft_"))
