"""Counts the parameters of adapters in the paper's settings, beside the percentages that the paper gives.

This module knows the public sizes of the base models, the settings and the paper's numbers. `get_peft_model` makes the
adapters on the meta device, where models take no memory.

There are two kinds of percentages. For ReFT, the paper divides the adapter's parameters by those of the base model.
Its numbers for LoRA come from LLM-Adapters and DoRA, which divide by base model and adapter together, as PEFT does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers as t
from peft import LoraConfig, PeftConfig, get_peft_model

from peft_reft import ReftConfig


PAPER = "arXiv 2404.03592"
LLM_ADAPTERS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def _llama(width: int, inner: int, layers: int, heads: int, vocab: int = 32_000, kv_heads: int | None = None) -> Any:
    return t.LlamaForCausalLM(
        t.LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads or heads,
            tie_word_embeddings=False,
        )
    )


def _roberta(width: int, layers: int, heads: int) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 50_265,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 514,
        "type_vocab_size": 1,
        "num_labels": 2,
    }
    return t.RobertaForSequenceClassification(t.RobertaConfig(**settings))


MODELS = {
    "LLaMA-7B": lambda: _llama(4096, 11_008, 32, 32),
    "LLaMA-13B": lambda: _llama(5120, 13_824, 40, 40),
    "Llama-2 7B": lambda: _llama(4096, 11_008, 32, 32),
    "Llama-3 8B": lambda: _llama(4096, 14_336, 32, 32, vocab=128_256, kv_heads=8),
    "RoBERTa-base": lambda: _roberta(768, 12, 12),
    "RoBERTa-large": lambda: _roberta(1024, 24, 16),
}
REASONING = ("LLaMA-7B", "LLaMA-13B", "Llama-2 7B", "Llama-3 8B")


@dataclass(frozen=True)
class Published:
    """A row of the paper's tables.

    Args:
        model (`str`): One of `MODELS`.
        task (`str`): The benchmark.
        method (`str`): The paper's name of the method.
        setting (`str`): The settings in words.
        config (`PeftConfig`): The settings.
        percent (`str`): The paper's percentage, with its digits.
        of_both (`bool`): Whether the percentage is of base model and adapter together. False: of the base model.
    """

    model: str
    task: str
    method: str
    setting: str
    config: PeftConfig
    percent: str
    of_both: bool = False


def published() -> Iterator[Published]:
    """The rows of tables 1 to 4, one for each pair of model and settings."""
    percents = {
        "LoReFT": ("0.031", "0.025", "0.031", "0.026"),
        "DiReFT": ("0.031", "0.025", "0.031", "0.026"),
        "LoRA": ("0.826", "0.670", "0.826", "0.700"),
    }
    for index, model in enumerate(REASONING):
        # With LLaMA's first two sizes the paper did arithmetic too, in the same settings.
        task = "commonsense, arithmetic" if index < 2 else "commonsense"
        tied = ReftConfig(r=8, positions="f7+l7", share_weights=True, task_type="CAUSAL_LM")
        untied = ReftConfig(r=4, positions="f7+l7", intervention="nodireft", task_type="CAUSAL_LM")
        lora = LoraConfig(r=32, target_modules=LLM_ADAPTERS, task_type="CAUSAL_LM")
        yield Published(model, task, "LoReFT", "r 8, f7+l7 tied, all layers", tied, percents["LoReFT"][index])
        yield Published(model, task, "DiReFT", "r 4, f7+l7 untied, all layers", untied, percents["DiReFT"][index])
        yield Published(model, task, "LoRA", "r 32 on q, k, v, up, down", lora, percents["LoRA"][index], of_both=True)
    layers = [3, 9, 18, 24]
    for rank, percent in ((4, "0.0039"), (2, "0.0019")):
        config = ReftConfig(r=rank, positions="f5+l5", layers_to_transform=layers, task_type="CAUSAL_LM")
        method = "LoReFT" if rank == 4 else "LoReFT (half)"
        setting = f"r {rank}, f5+l5 untied, layers 3, 9, 18, 24"
        yield Published("Llama-2 7B", "instructions", method, setting, config, percent)
    lora = LoraConfig(r=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    yield Published("Llama-2 7B", "instructions", "LoRA", "r 16 on q, v", lora, "0.1245")
    for model, percent in (("RoBERTa-base", "0.015"), ("RoBERTa-large", "0.014")):
        config = ReftConfig(r=1, positions="f3", task_type="SEQ_CLS")
        yield Published(model, "GLUE", "LoReFT", "r 1, first tokens, all layers", config, percent)


def count(row: Published) -> dict[str, Any]:
    """Count the parameters of the adapter and of the base model in one row, and compute both percentages.

    A classifier's head counts to neither, as in the paper.
    """
    with torch.device("meta"):
        model = MODELS[row.model]()
        base = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier."))
        adapted = get_peft_model(model, row.config)
    names = ("reft_", "lora_")
    adapter = sum(p.numel() for name, p in adapted.named_parameters() if any(part in name for part in names))
    return {
        "model": row.model,
        "task": row.task,
        "method": row.method,
        "setting": row.setting,
        "base": base,
        "adapter": adapter,
        "percent of base": 100 * adapter / base,
        "percent of both": 100 * adapter / (base + adapter),
        "paper": row.percent,
        "paper divides by": "base and adapter" if row.of_both else "base",
    }


def table(found: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table, percentages with two digits more than the paper's."""
    columns = [
        "model",
        "task",
        "method",
        "setting",
        "parameters",
        "% of base",
        "% of base and adapter",
        "the paper's %",
    ]
    lines = [
        [
            one["model"],
            one["task"],
            one["method"],
            one["setting"],
            f"{one['adapter']:,}",
            *(f"{one[key]:.{digits(one['paper']) + 2}f}" for key in ("percent of base", "percent of both")),
            one["paper"],
        ]
        for one in found
    ]
    return columns, lines


def digits(percent: str) -> int:
    """How many digits a percentage has behind the point."""
    return len(percent.split(".")[1])
