"""The plugin with each version of axolotl: how it is found, what it relies on, `adapter:` by name, and the seed."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from axolotl_runs import LORA, LORA_ON_A_CPU, TO_REFT, axolotl, fill, finds_plugins
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from peft_reft import ReftConfig


pytest.importorskip("axolotl", reason="needs the extra `axolotl`")

A100S = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 2, "n_node": 1, "compute_capability": "sm_80"}
FSDP2 = {
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    "state_dict_type": "FULL_STATE_DICT",
    "reshard_after_forward": True,
    "cpu_ram_efficient_loading": True,
}
needs_entry_points = pytest.mark.skipif(not finds_plugins(), reason="axolotl 0.21 looks for installed plugins")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, smollm2) -> Path:
    return fill(tmp_path_factory.mktemp("axolotl_versions"), smollm2)


def validated(**config):
    """A YAML as axolotl reads it, on two A100s."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    base = {"base_model": "model", "datasets": [{"path": "data.jsonl", "type": "alpaca"}], "bf16": True}
    cfg = DictDefault(LORA | TO_REFT | base | config)
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=A100S, env_capabilities={"torch_version": "2.13.0"})


# -- how the plugin is found ------------------------------------------------------------------------------------------


@needs_entry_points
@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "load_in_4bit"])
def test_the_adapter_is_the_only_line_that_changes(folder, key):
    config = LORA | {"adapter": "loreft", "max_steps": 8, "val_set_size": 0, "save_strategy": "no"}
    if key:
        config |= {key: True, "plugins": []}  # with the probe alone
    run = axolotl(folder, "train", config, name=f"one_line_{key}")
    assert run.code == 0, run.output[-6000:]
    assert len(run.losses) == 8 and run.losses[-1] < 0.5 * run.losses[0]
    assert PeftConfig.from_pretrained(run.out).intervention == "loreft"
    if key:
        assert run.notes["classes"]["Linear4bit"] == 4 * 7 and run.notes["classes"]["ReftLayer"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("plugins", [None, TO_REFT["plugins"]], ids=["no line", "the line"])
def test_lora_still_trains_beside_the_plugin(folder, plugins):
    config = LORA | LORA_ON_A_CPU | {"max_steps": 8, "val_set_size": 0, "save_strategy": "no"}
    config |= {"plugins": plugins} if plugins else {}
    run = axolotl(folder, "train", config, name=f"lora_{bool(plugins)}", probe=False)
    assert run.code == 0, run.output[-6000:]
    assert run.losses[-1] < run.losses[0]
    assert PeftConfig.from_pretrained(run.out).peft_type == "LORA"
    assert "no use for these LoRA keys" not in run.output


@pytest.mark.parametrize("line", [*TO_REFT["plugins"], "peft_reft.integrations.axolotl.plugin.ReftPlugin"])
def test_a_plugin_that_is_also_named_is_one_plugin(monkeypatch, line):
    from axolotl.integrations.base import PluginManager

    from peft_reft.integrations.axolotl import ReftPlugin

    manager = PluginManager.get_instance()
    monkeypatch.setattr(manager, "plugins", type(manager.plugins)())
    assert validated(plugins=[line]).adapter == "loreft"
    assert validated(plugins=[line], reft={"positions": "f1"}).reft["positions"] == "f1"
    found = [plugin for plugin in manager.plugins.values() if isinstance(plugin, ReftPlugin)]
    assert len([plugin for plugin in found if plugin.get_input_args()]) == 1
    if line in TO_REFT["plugins"]:
        assert len(found) == 1


@pytest.mark.parametrize("adapter", ["lora", "qlora", None])
def test_other_adapters_are_left_alone(monkeypatch, adapter):
    """axolotl 0.21 loads the plugin in every run: without a ReFT adapter it checks, wraps and removes nothing."""
    from axolotl.loaders.model import ModelLoader
    from axolotl.utils.dict import DictDefault

    from peft_reft.integrations.axolotl import ReftPlugin, axolotl_api

    def load(loader):
        pass

    monkeypatch.setattr(ModelLoader, "load", load)
    monkeypatch.setattr(axolotl_api, "CALLED", ("axolotl.loaders.model:ModelLoader.gone",))
    axolotl_api.check_axolotl.cache_clear()
    cfg = DictDefault(LORA | {"adapter": adapter})
    ReftPlugin().register(cfg)
    assert ModelLoader.load is load and cfg == LORA | {"adapter": adapter}


# -- what is relied on ------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_check():
    from peft_reft.integrations.axolotl import axolotl_api

    axolotl_api.check_axolotl.cache_clear()
    yield axolotl_api.check_axolotl
    axolotl_api.check_axolotl.cache_clear()


@pytest.mark.parametrize(
    "owner, name",
    [
        ("axolotl.loaders.model.ModelLoader", "load"),
        ("axolotl.loaders.adapter", "_get_peft_task_type"),
        ("axolotl.loaders.tokenizer", "load_tokenizer"),
        ("axolotl.integrations.base.BasePlugin", "pre_lora_load"),
        ("axolotl.integrations.base.BasePlugin", "load_adapter"),
    ],
)
def test_a_piece_that_is_gone_is_named(monkeypatch, fresh_check, owner, name):
    from importlib.metadata import version

    from axolotl.utils.dict import DictDefault

    from peft_reft.integrations.axolotl import ReftPlugin

    fresh_check()
    fresh_check.cache_clear()
    monkeypatch.delattr(f"{owner}.{name}")
    with pytest.raises(RuntimeError) as error:
        ReftPlugin().register(DictDefault(LORA | {"adapter": "loreft"}))
    assert f"relies on {owner}.{name}, and axolotl {version('axolotl')} does not have it" in str(error.value)
    assert "known to work in 0.19.0, 0.21.0" in str(error.value)


def test_a_hook_that_is_no_longer_called_is_an_error(monkeypatch):
    """Without the hook, `adapter:` would stay lora, and LoRA would be trained in silence."""
    from axolotl.loaders.model import ModelLoader
    from axolotl.utils.dict import DictDefault

    from peft_reft.integrations.axolotl import axolotl_api

    names = []

    def load(loader):
        names.append(loader.cfg.adapter)
        return "a model", None

    monkeypatch.setattr(ModelLoader, "load", load)
    axolotl_api.build_base_as_for_lora()
    cfg = DictDefault(adapter="direft", load_in_4bit=True)
    with pytest.raises(RuntimeError, match="ModelLoader.load's call of the hook pre_lora_load, for adapter: direft"):
        ModelLoader.load(SimpleNamespace(cfg=cfg))
    assert names == ["qlora"] and cfg.adapter == "direft"


def test_the_plugin_alone_imports_no_loader():
    """It is imported by every run of axolotl 0.21."""
    import subprocess

    code = "import sys, peft_reft.integrations.axolotl; print('axolotl.loaders.model' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split()[-1] == "False", run.stdout + run.stderr


# -- the seed ---------------------------------------------------------------------------------------------------------


def fresh_adapter(drawn_before: int, **config) -> dict[str, torch.Tensor]:
    from axolotl.utils.dict import DictDefault

    from peft_reft.integrations.axolotl import ReftPlugin

    torch.manual_seed(drawn_before)
    model = tiny_llama()
    # A template that is told needs no tokenizer.
    cfg = DictDefault({"adapter": "loreft", "lora_r": 2, "reft": {"response_template": [1]}, **config})
    model, _ = ReftPlugin().load_adapter(model, cfg)
    return {name: value.clone() for name, value in model.named_parameters() if "reft_" in name}


def tiny_llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))


def test_an_adapter_starts_from_the_seed_alone():
    first, second = fresh_adapter(1, seed=3), fresh_adapter(2, seed=3)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    set_seed(3)
    model = tiny_llama()
    set_seed(3)
    by_hand = dict(get_peft_model(model, ReftConfig(r=2, task_type="CAUSAL_LM")).named_parameters())
    assert all(torch.equal(first[name], by_hand[name]) for name in first)
    other = fresh_adapter(1, seed=4)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_without_a_seed_nothing_is_seeded():
    first, second = fresh_adapter(1), fresh_adapter(2)
    assert any(not torch.equal(first[name], second[name]) for name in first)


# -- what goes by the name qlora --------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "fsdp_"])
@pytest.mark.parametrize("sharded", [None, True])
def test_fsdp2_with_cpu_ram_efficient_loading_of_a_4bit_base_is_refused(prefix, sharded):
    """axolotl's own way out, qlora_sharded_model_loading, is for qlora alone."""
    fsdp = {f"{prefix}{key}": value for key, value in FSDP2.items()}
    config = {"load_in_4bit": True, "fsdp_version": 2, "fsdp_config": fsdp, "qlora_sharded_model_loading": sharded}
    with pytest.raises(
        ValueError, match=r"not for adapter: loreft.*Set fsdp_config: cpu_ram_efficient_loading: false"
    ):
        validated(**config)


def test_the_ways_out_are_taken():
    slow = validated(load_in_4bit=True, fsdp_version=2, fsdp_config=FSDP2 | {"cpu_ram_efficient_loading": False})
    assert slow.adapter == "loreft" and slow.load_in_4bit and not slow.qlora_sharded_model_loading
    wide = validated(fsdp_version=2, fsdp_config=FSDP2)
    assert wide.adapter == "loreft" and wide.fsdp_config["cpu_ram_efficient_loading"]


def test_nf4_of_torchao_is_refused():
    with pytest.raises(ValueError, match="nf4_backend: torchao is for adapter: qlora alone.*Remove nf4_backend"):
        validated(load_in_4bit=True, nf4_backend="torchao")
    assert validated(load_in_4bit=True).adapter == "loreft"
