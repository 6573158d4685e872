"""Base models with parts that accelerate keeps on the CPU or on disk."""

from __future__ import annotations

import accelerate
import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from models import blocks, build, labelled, prompts, randomize
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM

from peft_reft import ReftConfig


CPU = torch.device("cpu")
BATCH = labelled(11, 9, prompt=6, seed=3)
PROMPT = prompts(7, 5, side="left")
IN_MEMORY = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
MAPS = {
    "one block on disk": {
        **IN_MEMORY,
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "cpu",
    },
    "blocks on disk": {**IN_MEMORY, "model.layers": "disk"},
}
PLACES = [*MAPS, "cpu_offload", "disk_offload"]


def config() -> ReftConfig:
    return ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture
def load(checkpoint, tmp_path):
    """A loader of the model, in memory or offloaded in one of the ways."""
    calls = iter(range(9))

    def load(place: str | None = None) -> torch.nn.Module:
        folder = str(tmp_path / f"offloaded{next(calls)}")
        if place in MAPS:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, device_map=MAPS[place], offload_folder=folder)
        else:
            model = AutoModelForCausalLM.from_pretrained(checkpoint)
        return offload(model, place, folder)

    return load


def offload(model: torch.nn.Module, place: str | None, folder: str) -> torch.nn.Module:
    if place == "cpu_offload":
        accelerate.cpu_offload(model, CPU)
    if place == "disk_offload":
        accelerate.disk_offload(model, folder, CPU)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def generated(model: torch.nn.Module) -> torch.Tensor:
    return model.generate(**PROMPT, max_new_tokens=5, do_sample=False)


def trained(base: torch.nn.Module) -> tuple[torch.nn.Module, list[float]]:
    torch.manual_seed(0)
    model = get_peft_model(base, config()).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(4):
        loss = model(**BATCH).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), losses


def saved(load, path) -> PeftModel:
    """A saved adapter with clear edits, made on a base in memory."""
    model = get_peft_model(load(), config())
    randomize(model)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("place", PLACES)
def test_training_on_an_offloaded_base_is_training_in_memory(place, load, tmp_path):
    expected, losses = trained(load())
    base = load(place)
    assert any(p.is_meta for p in base.parameters())
    model, offloaded_losses = trained(base)
    assert offloaded_losses == losses and losses[-1] < losses[0]
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(generated(model), generated(expected))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(expected))
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(load()))
    assert torch.equal(logits(model.unload()), logits(load()))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_an_adapter_is_loaded_on_an_offloaded_base(place, low_cpu_mem_usage, load, tmp_path):
    expected = saved(load, tmp_path / "adapter")
    base = load(place)
    if place in MAPS:
        model = get_peft_model(
            base, PeftConfig.from_pretrained(tmp_path / "adapter"), low_cpu_mem_usage=low_cpu_mem_usage
        )
        weights = load_peft_weights(tmp_path / "adapter")
        set_peft_model_state_dict(model, weights, low_cpu_mem_usage=low_cpu_mem_usage)
    else:
        model = PeftModel.from_pretrained(base, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(generated(model), generated(expected))
    model.load_adapter(tmp_path / "adapter", "second", low_cpu_mem_usage=low_cpu_mem_usage)
    model.set_adapter("second")
    assert torch.equal(logits(model), logits(expected))


def test_from_pretrained_says_what_to_do_for_a_base_on_disk(load, tmp_path):
    saved(load, tmp_path / "adapter")
    with pytest.raises(NotImplementedError, match="set_peft_model_state_dict"):
        PeftModel.from_pretrained(load("one block on disk"), tmp_path / "adapter")


@pytest.mark.parametrize("place", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("first", ["run", "save"])
def test_weights_of_edits_are_taken_back_when_a_whole_model_is_offloaded(place, first, load, tmp_path):
    """As `PeftModel.from_pretrained` offloads it, for a base that device_map has offloaded to the CPU."""
    model = saved(load, tmp_path / "adapter")
    weights = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    expected, tokens = logits(model), generated(model)
    offload(model, place, str(tmp_path / "whole"))
    assert all(p.is_meta for p in model.parameters())
    if first == "run":
        assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(generated(model), tokens)
    again = load_peft_weights(tmp_path / "again")
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)


def test_hooks_of_the_base_are_not_taken_for_hooks_of_the_edits(load):
    """Otherwise accelerate would call the block's own forward instead of the edited block's, or remove a hook that is
    not there."""
    model = get_peft_model(load("one block on disk"), config())
    randomize(model)
    expected = logits(model)
    layer = blocks(model)[0]
    assert "_hf_hook" in vars(layer.base_layer) and not hasattr(layer, "_hf_hook")
    accelerate.hooks.add_hook_to_module(layer, accelerate.hooks.AlignDevicesHook(CPU))
    assert torch.equal(logits(model), expected)
    remove_hook_from_submodules(model.get_base_model())
    assert not any("_hf_hook" in vars(module) for module in blocks(model).modules())


def test_weights_follow_the_hooks_where_the_base_has_none_in_place(load):
    """An offloaded block computes on the device that its hooks name, and the edit's weights are there."""
    model = get_peft_model(load("cpu_offload"), config())
    layer = blocks(model)[1]
    moves = []
    layer._convert = lambda name, **to: moves.append(to)
    for module in layer.base_layer.modules():
        if "_hf_hook" in vars(module):
            module._hf_hook.execution_device = 0  # accelerate may write a GPU as a number
    layer._move_adapter_to_device_of_base_layer("default")
    assert moves == [{"device": 0}]


@pytest.mark.parametrize("add_bias", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_merge(load, place, add_bias):
    def adapted(place: str | None = None) -> PeftModel:
        settings = {
            "positions": "all",
            "target_modules": ["down_proj"],
            "add_bias": add_bias,
            "init_weights": "pyreft",
        }
        torch.manual_seed(0)
        model = get_peft_model(load(place), ReftConfig(r=4, task_type="CAUSAL_LM", **settings)).eval()
        randomize(model, scale=0.2)
        return model

    expected = logits(adapted())
    with torch.no_grad():
        assert not torch.allclose(expected, logits(load()), atol=1e-2)
    model = adapted(place)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-4)
