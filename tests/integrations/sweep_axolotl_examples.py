"""Validates axolotl's own LoRA and QLoRA examples, as on eight H100s, as they are and with `adapter: loreft`.

    python tests/integrations/sweep_axolotl_examples.py axolotl-0.21.0/examples

The folder is of the source distribution of the installed axolotl (`pip download --no-deps --no-binary :all: axolotl`).
Prints a table of outcomes, and ends with an error if a YAML that LoRA may use stops at a message that is not ours.
Base models are not loaded: a YAML that validates may still meet an architecture that ReFT refuses.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


H100S = {"bf16": True, "fp8": True, "tf32": True, "n_gpu": 8, "n_node": 1, "compute_capability": "sm_90"}
PLUGIN = "peft_reft.integrations.axolotl.ReftPlugin"
# A piece of each refusal's text -> the kind that the table counts.
OURS = {
    "FSDP1 (": "FSDP1",
    "cpu_ram_efficient_loading: true with load_in_4bit": "4 bits with FSDP's cpu_ram_efficient_loading",
    "nf4_backend: torchao": "nf4_backend: torchao",
    "splits a sequence over GPUs": "context parallelism",
    "relora: true": "relora",
    "optimizer: polora": "polora",
    "gives the model no labels": "rl: without a response_template",
    "has texts without prompts": "completion without positions: all",
    "train_on_inputs: true": "train_on_inputs",
}


def examples(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The LoRA and QLoRA YAMLs of a folder, with their names."""
    for path in sorted(folder.rglob("*.y*ml")):
        config = yaml.safe_load(path.read_text())
        if isinstance(config, dict) and config.get("adapter") in ("lora", "qlora"):
            yield str(path.relative_to(folder)), config


def refusal(config: dict[str, Any]) -> str:
    """What axolotl's validation says against a YAML; nothing if it passes."""
    from axolotl.cli.config import prepare_plugins
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    PluginManager.get_instance().plugins.clear()  # of the YAML before
    cfg = DictDefault(copy.deepcopy(config))
    try:
        prepare_plugins(cfg)
        validate_config(cfg, capabilities=H100S, env_capabilities={"torch_version": "2.13.0"})
    except Exception as error:  # axolotl raises ImportError, DeprecationWarning and others as well
        return f"{type(error).__name__}: {error}"
    return ""


def as_reft(config: dict[str, Any]) -> dict[str, Any]:
    """A LoRA YAML with the adapter switched, and nothing else."""
    return config | {"adapter": "loreft", "plugins": [*(config.get("plugins") or []), PLUGIN]}


def outcome(config: dict[str, Any]) -> str:
    """One word or line for a YAML: validated, the kind of our refusal, refused for LoRA too, or UNCLEAR."""
    said = refusal(as_reft(config))
    if not said:
        return "validated"
    kind = next((kind for piece, kind in OURS.items() if piece in said), None)
    if kind is not None:
        return f"refused: {kind}"
    return "refused by axolotl, for LoRA as well" if refusal(config) else f"UNCLEAR: {said}"


def main(folder: str) -> int:
    found = defaultdict(list)
    for name, config in examples(Path(folder)):
        found[outcome(config)].append(name)
    print(f"| outcome | of {sum(map(len, found.values()))} YAMLs |\n| --- | --- |")
    for kind, names in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"| {kind} | {len(names)} |")
    return int(any(kind.startswith("UNCLEAR") for kind in found))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
