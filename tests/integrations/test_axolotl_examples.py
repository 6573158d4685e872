"""Options that axolotl grants to LoRA alone, refusals at validation, and axolotl's own examples.

The examples are swept if AXOLOTL_EXAMPLES names the folder `examples` of axolotl's source distribution.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


pytest.importorskip("axolotl", reason="needs the extra `axolotl`")

from sweep_axolotl_examples import as_reft, examples, outcome, refusal


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
    "vision": ({"processor_type": "AutoProcessor", "chat_template": "llava"}, r"llava: axolotl knows no role bound"),
    "relora": ({"relora": True, "jagged_restart_steps": 5}, r"Remove relora:"),
}


@pytest.mark.parametrize("config, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_in_the_words_of_the_yaml(config, message):
    with pytest.raises(Exception, match=message):
        validated(config)


@pytest.mark.parametrize("kind", ["completion", "vision"])
def test_a_template_is_the_way_out(kind):
    assert validated(REFUSED[kind][0] | TEMPLATE).adapter == "loreft"


def test_reft_is_loreft():
    assert validated({"adapter": "reft"}).adapter == "loreft"


@pytest.mark.parametrize("name", ["LoReFT", "dereft", "pyreft"])
def test_an_unknown_name_of_the_family(name):
    with pytest.raises(ValueError, match="They are .*loreft, noreft.*and reft, which is loreft"):
        validated({"adapter": name})


def test_loftq_is_named():
    from peft_reft.integrations.axolotl.args import meaningless_keys

    yaml_keys = {"adapter": "loreft", "peft": {"loftq_config": {"loftq_bits": 4}}, "nvfp4_merge_aware": True}
    assert meaningless_keys(yaml_keys) == ["nvfp4_merge_aware", "peft"]


@pytest.mark.parametrize(
    "rate, level", [(1e-6, "info"), ("2e-4", "info"), (1e-3, None), (2e-3, None), (4e-3, "warning")]
)
def test_learning_rate(rate, level):
    from peft_reft.integrations.axolotl.validation import about_learning_rate

    said = about_learning_rate({"adapter": "loreft", "learning_rate": rate})
    assert (said and said[0]) == level


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
