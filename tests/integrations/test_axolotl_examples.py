"""Options that axolotl grants to LoRA alone, refusals at validation, and axolotl's own examples.

The examples are swept if AXOLOTL_EXAMPLES names the folder `examples` of axolotl's source distribution.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml


pytest.importorskip("axolotl", reason="needs the extra `axolotl`")

from models import chat_model, tokenizer
from paths import REPOSITORY
from peft import get_peft_model
from sweep_axolotl_examples import as_reft, examples, outcome, refusal
from train_axolotl_examples import trained

from peft_reft import ReftConfig


LORA = {
    "base_model": "model",
    "adapter": "lora",
    "lora_r": 8,
    "datasets": [{"path": "x.jsonl", "type": "alpaca"}],
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_epochs": 1,
    "learning_rate": 0.001,
}
BITS_4, BITS_8 = {"load_in_4bit": True}, {"load_in_8bit": True}
TEMPLATE = {"reft": {"response_template": "### Response:"}}


def validated(config):
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault
    from sweep_axolotl_examples import H100S

    cfg = DictDefault(as_reft(LORA) | config)
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=H100S, env_capabilities={"torch_version": "2.13.0"})


@pytest.mark.parametrize("bits", [BITS_4, BITS_8], ids=["4 bits", "8 bits"])
@pytest.mark.parametrize("key", ["quantize_moe_experts", "ple_cpu_offload"])
def test_what_axolotl_grants_to_lora_alone(key, bits):
    cfg = validated({key: True, **bits})
    assert cfg[key] and cfg.adapter == "loreft"
    assert not any(cfg[f"lora_{part}_kernel"] for part in ("mlp", "qkv", "o", "embedding"))
    assert refusal(as_reft(LORA) | {key: True})  # without a quantized base, as for LoRA


REFUSED = {
    "FSDP1": ({"fsdp": ["full_shard"], "fsdp_config": {"use_orig_params": False}}, r"FSDP1.*fsdp_version: 2"),
    "FSDP1 by version": ({"fsdp_version": 1, "fsdp_config": {"offload_params": True}}, r"FSDP1.*fsdp_version: 2"),
    "context parallelism": ({"context_parallel_size": 2}, r"context_parallel_size: 2 splits a sequence"),
    "completion": ({"datasets": [{"path": "x", "type": "completion"}]}, r"type: completion has texts without"),
    "subspaces": (
        {"reft": {"subspaces": {"a": 4, "b": 4}}},
        r"subspaces: is set.*type: alpaca, which keeps no column",
    ),
    "packed subspaces": (
        {"datasets": [{"path": "x", "type": None}], "sample_packing": True, "reft": {"subspaces": {"a": 4, "b": 4}}},
        r"sample_packing: True makes rows of several texts",
    ),
    "relora": ({"relora": True, "jagged_restart_steps": 5}, r"Remove relora:"),
}


@pytest.mark.parametrize("config, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_the_words_of_the_yaml(config, message):
    with pytest.raises(Exception, match=message):
        validated(config)


def test_a_template_is_the_way_out():
    assert validated(REFUSED["completion"][0] | TEMPLATE).adapter == "loreft"


def test_rows_with_tokens_can_name_their_subspaces():
    """The sizes add up to lora_r, which is not the default."""
    data = {"datasets": [{"path": "x.jsonl", "type": None}], "lora_r": 6}
    assert validated(data | {"reft": {"subspaces": {"a": 4, "b": 2}}}).reft["subspaces"] == {"a": 4, "b": 2}
    with pytest.raises(ValueError, match="subspaces"):
        validated(data | {"reft": {"subspaces": {"a": 4, "b": 4}}})


VISION = {"processor_type": "AutoProcessor", "datasets": [{"path": "x", "type": "chat_template"}]}


@pytest.mark.parametrize("template, found", [("llava", True), ("jinja", False)])
def test_vision_chat_templates_without_role_boundaries(template, found, monkeypatch):
    """Such a YAML trains where the chat template shows its response template, and else is refused before the base
    model is loaded."""
    from axolotl.utils.dict import DictDefault

    from peft_reft.integrations.axolotl import axolotl_api
    from peft_reft.integrations.axolotl.template import find_template

    monkeypatch.setattr(axolotl_api, "tokenizer_of", lambda cfg: tokenizer())
    plain = {"chat_template_jinja": "{% for m in messages %}{{ m.content }}\n{% endfor %}"}
    cfg = DictDefault(VISION | {"chat_template": template} | plain)
    assert not axolotl_api.knows_role_boundaries(template, None)
    if found:
        assert tokenizer().decode(find_template(cfg)).strip() == "ASSISTANT:"
    else:
        with pytest.raises(
            ValueError, match="knows no role boundaries.*No response template.*Set reft: response_temp"
        ):
            find_template(cfg)
        assert find_template(DictDefault(cfg | {"role_boundaries": [{"role": "assistant", "start": "A:"}]})) is None


def test_unfrozen_parameters_leave_the_adapter_trained():
    """axolotl freezes all else once the adapter is loaded."""
    from types import SimpleNamespace

    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault
    from axolotl.utils.freeze import freeze_layers_except

    from peft_reft.integrations.axolotl import ReftPlugin

    model = get_peft_model(chat_model(), ReftConfig(r=8, task_type="CAUSAL_LM"))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    freeze_layers_except(model, ["^model.language_model.*"])
    assert not any(weight.requires_grad for weight in model.parameters())
    cfg = DictDefault(as_reft(LORA) | {"unfrozen_parameters": ["^model.language_model.*"]})
    found = PluginManager.get_instance().plugins.values()  # the first of its kind acts, if axolotl has found one
    plugin = next((one for one in found if isinstance(one, ReftPlugin)), ReftPlugin())
    plugin.add_callbacks_post_trainer(cfg, SimpleNamespace(model=model))
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == trained


def test_positions_shows_a_yaml_by_its_own_chat_template(tmp_path, capsys):
    """The tokenizer's own template is ChatML."""
    from peft_reft_cli.positions import positions

    tokenizer().save_pretrained(tmp_path)
    data = [{"path": "x.jsonl", "type": "chat_template"}]
    config = LORA | {"adapter": "reft", "base_model": str(tmp_path), "chat_template": "llava", "datasets": data}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(config))
    talk = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": talk}))
    positions(tmp_path / "x.yaml", dataset=tmp_path / "rows.jsonl", template="chat", examples=1)
    shown = capsys.readouterr().out
    assert "told by response_template" in shown and "im_start" not in shown


def test_reft_is_loreft():
    assert validated({"adapter": "reft"}).adapter == "loreft"


@pytest.mark.parametrize("name", ["LoReFT", "dereft", "pyreft"])
def test_an_unknown_name_of_the_family(name):
    with pytest.raises(ValueError, match="They are .*loreft, noreft.*and reft, which is loreft"):
        validated({"adapter": name})


def test_loftq_is_named():
    from peft_reft.integrations.axolotl.keys import meaningless_keys

    yaml_keys = {"adapter": "loreft", "peft": {"loftq_config": {"loftq_bits": 4}}, "nvfp4_merge_aware": True}
    assert meaningless_keys(yaml_keys) == ["nvfp4_merge_aware", "peft"]


@pytest.mark.parametrize(
    "rate, level", [(1e-6, "info"), ("2e-4", "info"), (1e-3, None), (2e-3, None), (4e-3, "warning")]
)
def test_learning_rate(rate, level):
    from peft_reft.integrations.axolotl.validation import about_learning_rate

    said = about_learning_rate({"adapter": "loreft", "learning_rate": rate})
    assert (said and said[0]) == level


def test_few_layers_bear_a_high_learning_rate():
    """The quickstart's, at which six layers of thirty learn best."""
    from peft_reft.integrations.axolotl.validation import about_learning_rate

    keys = yaml.safe_load((REPOSITORY / "examples" / "quickstart.yaml").read_text(encoding="utf-8"))
    assert keys["learning_rate"] == 4e-3 and about_learning_rate(keys) is None
    assert about_learning_rate({**keys, "peft_layers_to_transform": None}) is not None


@pytest.mark.parametrize(
    "adapter, decay, warned",
    [
        ("loreft", 0.01, True),
        ("consreft", "0.1", True),
        ("loreft", 0.0, False),
        ("loreft", None, False),
        ("noreft", 0.1, False),  # R shrinks with W
        ("direft", 0.1, False),  # takes nothing from the state
    ],
)
def test_weight_decay_is_named_where_it_leads_away_from_the_base(adapter, decay, warned, monkeypatch):
    from axolotl.utils.dict import DictDefault

    from peft_reft.integrations.axolotl import ReftPlugin, plugin

    lines = []
    monkeypatch.setattr(plugin.LOG, "warning", lambda line, *values: lines.append(line % values))
    ReftPlugin().register(DictDefault({"adapter": adapter, "learning_rate": 1e-3, "weight_decay": decay}))
    assert len(lines) == warned
    assert all(f"weight_decay: {float(decay):g} does not" in line and "weight_decay: 0.0" in line for line in lines)


@pytest.mark.slow
@pytest.mark.skipif("AXOLOTL_EXAMPLES" not in os.environ, reason="AXOLOTL_EXAMPLES names the folder of examples")
def test_every_example_is_validated_or_refused_clearly():
    outcomes = {name: outcome(config) for name, config in examples(Path(os.environ["AXOLOTL_EXAMPLES"]))}
    assert outcomes
    assert {name: said for name, said in outcomes.items() if said.startswith("UNCLEAR")} == {}


# As examples of axolotl are, one of each kind of trainer.
SMALL = LORA | {
    "lora_target_linear": True,
    "base_model": "meta-llama/Llama-3.2-1B",
    "sequence_len": 512,
    "load_in_4bit": True,
    "bf16": "auto",
}
PAIRS = {"path": "x", "type": "chat_template.argilla"}
KINDS = {
    "alpaca": {},
    "thoughts": {"base_model": "Qwen/Qwen3-8B", "datasets": [{"path": "x", "type": "chat_template"}]},
    "orpo": {"rl": "orpo", "chat_template": "chatml", "datasets": [PAIRS], "remove_unused_columns": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_example_trains_on_a_tiny_model(kind):
    found = trained(kind, SMALL | KINDS[kind])
    assert found["outcome"] == "trained", found["text"]
    assert found["remarks"][0] == "off: bf16, load_in_4bit"
