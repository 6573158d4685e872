"""Runs axolotl's own command line for tests, each command in a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import yaml
from packaging.version import Version
from transformers import AutoModelForCausalLM, AutoTokenizer


LORA = {
    "adapter": "lora",
    "lora_r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "peft_layers_to_transform": [0, 2],
    "sequence_len": 64,
    "sample_packing": False,
    "val_set_size": 4,
    "micro_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_epochs": 4,
    "learning_rate": 0.01,
    "optimizer": "adamw_torch",
    "lr_scheduler": "constant",
    "bf16": False,
    "fp16": False,
    "logging_steps": 1,
    "save_strategy": "epoch",
    "gradient_checkpointing": True,
    "seed": 7,
}
LORA_ON_A_CPU = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
TO_REFT = {"adapter": "loreft", "plugins": ["peft_reft.integrations.axolotl.ReftPlugin"]}

PROBE = '''
import json, os
from collections import Counter
from axolotl.integrations.base import BasePlugin


class Probe(BasePlugin):
    """Writes down what axolotl made of the config: classes of the modules, dtypes of what is trained."""

    def post_model_load(self, cfg, model):
        seen = {
            "adapter": cfg.adapter,
            "classes": Counter(type(module).__name__ for module in model.modules()),
            "trained": sorted({str(p.dtype) for p in model.parameters() if p.requires_grad}),
            "norms": sorted({str(p.dtype) for name, p in model.named_parameters() if "norm" in name}),
            "config": model.peft_config["default"].to_dict(),
        }
        with open(os.environ["PROBE"], "w") as file:
            json.dump(seen, file, default=str)
'''


def finds_plugins() -> bool:
    """Whether the installed axolotl finds plugins among the installed packages, as 0.21 does."""
    return Version(metadata.version("axolotl")) >= Version("0.21")


def fill(folder: Path, smollm2: str) -> Path:
    """Put a base model, datasets and the probe into a folder."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=4).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    colours = ["red", "blue", "green", "white"]
    rows = [{"instruction": f"Colour number {n}?", "input": "", "output": colours[n % 4]} for n in range(20)]
    talks = [
        {"messages": [{"role": role, "content": text} for role, text in turns]}
        for n in range(20)
        for turns in [
            [("user", f"Colour {n}?"), ("assistant", colours[n % 4]), ("user", "Sure?"), ("assistant", "Yes")]
        ]
    ]
    pairs = [{"prompt": f"Colour {n}?", "chosen": f" {colours[n % 4]}", "rejected": " none"} for n in range(20)]
    for name, some in (("data", rows), ("talks", talks), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    (folder / "probe.py").write_text(PROBE)
    return folder


def axolotl(
    folder: Path, command: str, config: dict, *options: str, name: str = "run", stdin: str = "", probe: bool = True
) -> SimpleNamespace:
    """Run a command of axolotl in a process of its own. Returns its exit status, output, losses, and the probe's
    notes."""
    if command != "merge-lora" and name != "trained":
        options = (*options, "--launcher", "python")  # saves the second import of axolotl that accelerate needs
    full = {
        "base_model": str(folder / "base"),
        "datasets": [{"path": str(folder / "data.jsonl"), "type": "alpaca"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / name),
        **config,
    }
    if "plugins" in full and probe:
        full["plugins"] = [*full["plugins"], "probe.Probe"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(full))
    notes = folder / f"{name}.json"
    notes.unlink(missing_ok=True)
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "PROBE": str(notes),
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "500",
    }
    environment.pop("ACCELERATE_USE_CPU", None)
    run = subprocess.run(
        ["axolotl", command, str(path), *options],
        env=environment,
        input=stdin,
        capture_output=True,
        text=True,
        cwd=folder,
    )
    output = run.stdout + run.stderr
    return SimpleNamespace(
        code=run.returncode,
        output=output,
        losses=[float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", output)],
        notes=json.loads(notes.read_text()) if notes.exists() else None,
        out=folder / name,
    )
