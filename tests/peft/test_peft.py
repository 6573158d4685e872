"""What PEFT offers to every tuner."""

from __future__ import annotations

import copy
import json
import subprocess
import sys

import pytest
import torch
from models import build, prompts, randomize, weight
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from peft_reft import ReftConfig, ReftLayer, ReftModel
from peft_reft.tuner.peft_type import register


BATCH = prompts(9, 4)


def labelled(batch: dict) -> dict:
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :3] = -100
    return {**batch, "labels": labels}


def adapted(r: int = 4, **settings) -> PeftModel:
    settings = {"positions": "f2+l2", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build("llama"), ReftConfig(r=r, **settings))
    randomize(model)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def test_registering_twice_does_nothing():
    register(ReftConfig, ReftModel)
    assert PeftConfig.from_peft_type(peft_type="REFT").__class__ is ReftConfig
    assert isinstance(adapted().base_model, ReftModel)


def test_trainable_parameters(capsys):
    model = adapted()
    model.print_trainable_parameters()
    # 3 layers x 2 groups x (R and W of 4 x 32, b of 4)
    assert f"trainable params: {3 * 2 * (2 * 4 * 32 + 4):,} ||" in capsys.readouterr().out


def test_save_and_load_in_a_fresh_process(tmp_path):
    model = adapted()
    build("llama").save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    torch.save({"batch": BATCH, "logits": logits(model)}, tmp_path / "expected.pt")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == 9 and all(".reft_" in key for key in saved)
    script = """
import sys, torch, peft_reft
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
expected = torch.load(f"{folder}/expected.pt", weights_only=True)
base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
for model in (PeftModel.from_pretrained(base, f"{folder}/adapter"),
              AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter"),
              AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter", low_cpu_mem_usage=True)):
    with torch.no_grad():
        assert torch.equal(model(**expected["batch"]).logits, expected["logits"])
    assert not any(p.requires_grad for p in model.parameters())
print("same logits")
"""
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert "same logits" in run.stdout, run.stderr[-3000:]


def test_config_round_trip(tmp_path):
    config = ReftConfig(
        r=3,
        intervention="direft",
        positions="l4",
        dropout=0.1,
        act_fn="gelu",
        layers_to_transform=[1],
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path) == ReftConfig.from_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["peft_type"] == "REFT" and stored["intervention"] == "direft" and stored["target_modules"] is None


def test_training_goes_on_after_loading_exactly_as_without(tmp_path):
    def step(model, optimizer):
        model.train()(**labelled(BATCH)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def optimizer_of(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    torch.manual_seed(0)
    model = adapted()
    optimizer = optimizer_of(model)
    for _ in range(3):
        step(model, optimizer)
    model.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    resumed = PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True)
    resumed_optimizer = optimizer_of(resumed)
    resumed_optimizer.load_state_dict(state)
    for _ in range(3):
        step(model, optimizer)
        step(resumed, resumed_optimizer)
    for (name, ours), (_, theirs) in zip(model.state_dict().items(), resumed.state_dict().items()):
        assert torch.equal(ours, theirs), name


def test_disable_adapter_and_unload_give_the_base_model_back():
    base = build("llama")
    plain, modules = logits(base), [type(m) for m in base.modules()]
    model = get_peft_model(base, ReftConfig(r=4, positions="f2+l2"))
    randomize(model)
    assert not torch.equal(logits(model), plain)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
        generated = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
    assert not torch.equal(logits(model), plain)
    unloaded = model.unload()
    assert unloaded is base
    assert [type(m) for m in base.modules()] == modules
    assert not base._forward_pre_hooks and not base._forward_hooks and "generate" not in base.__dict__
    assert torch.equal(logits(base), plain)
    assert torch.equal(base.generate(**BATCH, max_new_tokens=4, do_sample=False), generated)


def test_several_adapters(tmp_path):
    model = adapted()
    first = logits(model)
    model.add_adapter("other", ReftConfig(r=2, positions="l3", layers_to_transform=[1], intervention="direft"))
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    randomize(model.base_model.model.model.layers[1].reft_W, seed=3)
    with torch.no_grad():
        weight(model.base_model.model.model.layers[1], "b", "other").fill_(1.0)
    second = logits(model)
    assert not torch.allclose(first, second)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(name.endswith(".other") for name in trainable)
    model.set_adapter("default")
    assert torch.equal(logits(model), first)
    model.save_pretrained(tmp_path)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(logits(model), second)
    assert not any(".default" in name for name, _ in model.named_parameters())

    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second)
    loaded.base_model.set_adapter(["default", "other"])  # both, one after the other
    assert not torch.allclose(logits(loaded), first) and not torch.allclose(logits(loaded), second)


def test_one_config_serves_models_of_different_widths():
    config = ReftConfig(r=4)
    get_peft_model(build("llama"), config)
    assert config.target_modules is None and config.asked_width is None
    net = torch.nn.ModuleDict({"lin": torch.nn.Linear(8, 16)})
    net.forward = lambda x: net["lin"](x)
    config.target_modules, config.positions = ["lin"], "all"
    assert get_peft_model(net, config).peft_config["default"].width == 16


def test_copies_and_pickles_are_independent(tmp_path):
    model = adapted()
    expected = logits(model)
    generated = model.generate(**BATCH, max_new_tokens=4, do_sample=False)
    twin = copy.deepcopy(model)
    # GPT-2, because with the package `kernels` transformers 5.16 makes a Llama that can't be pickled, with or without
    # ReFT.
    other = get_peft_model(build("gpt2"), ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM")).eval()
    randomize(other)
    torch.save(other, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits(loaded), logits(other))
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(**BATCH, **options), other.generate(**BATCH, **options))
    with torch.no_grad():
        weight(model.base_model.model.model.layers[0], "b").add_(1.0)
    assert not torch.equal(logits(model), expected)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(twin.generate(**BATCH, max_new_tokens=4, do_sample=False), generated)


def test_injection_without_a_peft_model():
    base = inject_adapter_in_model(ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM"), build("llama"))
    plain = logits(build("llama"))
    assert torch.equal(logits(base), plain)
    randomize(base)
    assert torch.equal(logits(base), logits(adapted()))


def test_rank_pattern(tmp_path):
    model = adapted(rank_pattern={"layers.0": 2, "layers.[12]": 6})
    ranks = [weight(layer, "R").shape[1] for layer in model.base_model.model.model.layers]
    assert ranks == [2, 6, 6]
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), expected)
    with pytest.raises(ValueError, match=r"rank_pattern=\{'layers\.7': 3\} decides for none of the modules to edit"):
        adapted(rank_pattern={"layers.7": 3})
    with pytest.raises(ValueError, match="r=33 is above the width 32 of 'model.layers.1'"):
        adapted(rank_pattern={"layers.1": 33})
    for wrong in ({"layers.0": 0}, {"layers.0": "many"}, ["layers.0"]):
        with pytest.raises(ValueError, match="rank_pattern=.*is not allowed"):
            ReftConfig(rank_pattern=wrong)
    with pytest.raises(ValueError, match="empty with subspaces"):
        ReftConfig(r=4, rank_pattern={"layers.0": 2}, subspaces={"a": 4})


@pytest.mark.parametrize("name", ["a.b", ""])
def test_names_that_parameters_cannot_have_are_refused_before_anything_is_made(name):
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match=r"adapter_name='.*' is not possible"):
        model.add_adapter(name, ReftConfig(r=4))
    assert torch.equal(logits(model), expected) and list(model.peft_config) == ["default"]


def test_names_with_slashes(tmp_path):
    model = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l2"), adapter_name="team/style-2")
    randomize(model)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "team/style-2", adapter_name="team/other")
    assert torch.equal(logits(loaded), expected)


def test_all_linear_for_a_second_adapter():
    model = adapted(target_modules="all-linear", positions="all")
    model.add_adapter("other", ReftConfig(r=2, positions="all", target_modules="all-linear"))
    layers = [module for module in model.modules() if isinstance(module, ReftLayer)]
    assert len(layers) == 3 * 7 and all(set(layer.reft_R) == {"default", "other"} for layer in layers)


def test_single_layers_may_have_other_active_adapters():
    model = adapted()
    model.add_adapter("other", ReftConfig(r=4, positions="l3"))
    randomize(model, seed=5)
    layers = list(model.base_model.model.model.layers)
    layers[1].set_adapter(["other"])
    layers[2].enable_adapters(False)
    mixed = logits(model)
    lone = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l2", layers_to_transform=[0]))
    lone.add_adapter("other", ReftConfig(r=4, positions="l3", layers_to_transform=[1]))
    for letter in "RWb":
        for index, name in ((0, "default"), (1, "other")):
            source, copied = weight(layers[index], letter, name), lone.base_model.model.model.layers[index]
            weight(copied, letter, name).data.copy_(source)
    lone.base_model.set_adapter(["default", "other"])
    assert torch.equal(logits(lone.eval()), mixed)


def test_injection_by_a_state_dict_that_names_more_layers():
    saved = get_peft_model_state_dict(adapted())
    state = {key.removeprefix("base_model.model."): tensor for key, tensor in saved.items()}
    config = ReftConfig(r=4, positions="f2+l2", layers_to_transform=[0], task_type="CAUSAL_LM")
    with pytest.warns(RuntimeWarning, match="additional target modules"):
        base = inject_adapter_in_model(config, build("llama"), state_dict=state)
    set_peft_model_state_dict(base, state)
    assert torch.equal(logits(base), logits(adapted()))


def test_what_peft_has_for_lora_alone_is_refused(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    expected = logits(model)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA but REFT was passed"):
        hotswap_adapter(model, tmp_path, "default")
    with pytest.raises(TypeError, match="do not support LoRA conversion: .*ReftLayer"):
        convert_to_lora(model, 4)
    assert torch.equal(logits(model), expected)


def test_swapping_by_a_second_name(tmp_path):
    model = adapted(r=2, positions="l3")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    serving = adapted()
    serving.load_adapter(tmp_path, "next")
    serving.set_adapter("next")
    serving.delete_adapter("default")
    assert torch.equal(logits(serving), expected)


def test_what_peft_reads_of_the_layers_of_a_tuner():
    base = build("gpt2")
    sizes = {"wte": (97, 32), "mlp.c_proj": (128, 32)}
    model = get_peft_model(base, ReftConfig(r=4, positions="all", target_modules=list(sizes)))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ReftLayer)}
    assert len(layers) == 1 + len(base.transformer.h)
    for name, layer in layers.items():
        assert (layer.in_features, layer.out_features) == sizes["wte" if name.endswith("wte") else "mlp.c_proj"]
    expected = logits(model)
    with disable_input_dtype_casting(model):
        assert torch.equal(logits(model), expected)


def test_moving_and_casting_keep_what_is_frozen_frozen_and_what_fits_as_it_is():
    model = adapted()
    layer = model.base_model.model.model.layers[0]
    R = weight(layer, "R")
    layer._move_adapter_to_device_of_base_layer("default")
    assert weight(layer, "R") is R and R.requires_grad
    layer.set_requires_grad("default", False)
    layer.base_layer.bfloat16()
    layer.cast_adapter_as_base("default")
    assert weight(layer, "R").dtype == torch.bfloat16 and not weight(layer, "R").requires_grad


def test_statuses():
    model = adapted()
    status = model.get_model_status()
    assert status.peft_types == {"default": "REFT"} and status.num_adapter_layers == 3 and status.enabled is True
    assert [layer.name for layer in model.get_layer_status()] == [f"model.model.layers.{i}" for i in range(3)]


def test_modules_to_save(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    assert any("lm_head" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), expected)


def test_auto_classes_know_reft():
    assert AutoPeftModelForCausalLM is not None
    assert "REFT" in [str(t.value) for t in type(ReftConfig().peft_type)]
