"""The 7B recipes, the paper's and LoRA's beside them, start: axolotl trains a tiny random Llama with each.

What is replaced is what a machine without a GPU or a hub lacks: the base, its rows, bfloat16, and the number of steps.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as t
import yaml
from axolotl_runs import LORA_ON_A_CPU, axolotl
from paths import REPOSITORY
from peft import PeftConfig
from safetensors.torch import load_file

from peft_reft import ReftConfig


pytest.importorskip("axolotl", reason="needs the extra `axolotl`")
pytestmark = pytest.mark.slow

EXAMPLES = REPOSITORY / "examples"
RECIPES = [f"{folder}/{kind}" for folder in ("commonsense", "arithmetic", "instruct") for kind in ("paper", "lora")]
WIDTH, LAYERS = 32, 32  # as many layers as LLaMA-7B


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, smollm2: str) -> Path:
    """A random Llama of 32 layers, which has the <unk> token that the recipes pad with, and a few rows."""
    root = tmp_path_factory.mktemp("recipes")
    words = t.AutoTokenizer.from_pretrained(smollm2)
    words.add_special_tokens({"unk_token": "<unk>"})
    words.save_pretrained(root / "base")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    ends = {"eos_token_id": words.eos_token_id, "bos_token_id": words.bos_token_id, "tie_word_embeddings": False}
    t.LlamaForCausalLM(t.LlamaConfig(**sizes, **ends, vocab_size=len(words))).save_pretrained(root / "base")
    rows = [{"prompt": f"How much is {n} and {n}? Think of it twice.", "completion": f" {2 * n}"} for n in range(64)]
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return root


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_starts(folder, recipe):
    settings = yaml.safe_load((EXAMPLES / f"{recipe}.yaml").read_text())
    (dataset,) = settings["datasets"]
    replaced = {
        "base_model": str(folder / "base"),
        "datasets": [{**dataset, "path": str(folder / "train.jsonl")}],
        "dataset_prepared_path": str(folder / "prepared" / recipe),
        "output_dir": str(folder / recipe.replace("/", "-")),
        "dataset_num_proc": 1,
        "bf16": False,
        "fp16": False,
        "max_steps": 2,
        "micro_batch_size": 2,
        "logging_steps": 1,
    }
    kernels = LORA_ON_A_CPU if settings["adapter"] == "lora" else {}
    run = axolotl(folder, "train", settings | replaced | kernels, name=recipe.replace("/", "-"), probe=False)
    assert run.code == 0, run.output[-6000:]
    assert len(run.losses) == 2
    config = PeftConfig.from_pretrained(run.out)
    tensors = load_file(run.out / "adapter_model.safetensors")
    if settings["adapter"] == "lora":
        assert config.r == settings["lora_r"] and any(
            tensor.any() for name, tensor in tensors.items() if "lora_B" in name
        )
        return
    assert isinstance(config, ReftConfig) and config.positions == settings["reft"]["positions"]
    edited = settings.get("peft_layers_to_transform") or range(LAYERS)
    groups = 1 if config.share_weights else 2
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.endswith("reft_W")} == {
        f"base_model.model.model.layers.{n}.reft_W": (groups, settings["lora_r"], WIDTH) for n in edited
    }
