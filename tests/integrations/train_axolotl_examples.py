"""Trains axolotl's own LoRA and QLoRA examples with `adapter: loreft` for two steps each, on tiny models on a CPU.

    python tests/integrations/train_axolotl_examples.py axolotl-0.21.0/examples --results outcomes.jsonl

Each example that validates (sweep_axolotl_examples.py) is trained on a random model of its architecture and a few rows
of its dataset's type (tests/helpers/axolotl_zoo.py), in a fork of this process. What only a GPU can do is switched
off, and said for each example in the results. Where ReFT fails, the same example is trained with LoRA. Ends with an
error if an example trains with LoRA and fails with ReFT without a refusal of ours. A second run goes on where the
results of the first end.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import importlib
import json
import logging
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "disabled",
}

from sweep_axolotl_examples import as_reft, examples, outcome


CPU_SECONDS, SECONDS = 240, 1200  # for one training
# What only a GPU can do, or what reports to somebody: regex of keys that are left out.
OFF = re.compile(
    r"load_in_[48]bit|gptq.*|bf16|bfloat16|tf32|fp16|float16|torch_dtype|fp8|flash_.*|flex_.*|attn_implementation|deepspeed|fsdp.*|dp_.*|"
    r"expert_parallel.*|experts_implementation|context_par.*|.*sample_packing.*|pad_to_sequence_len|batch_flattening|"
    r"torch_compile.*|use_(kernels|scattermoe|sonicmoe|dsv4_kernels|glm_dsa_kernels)|dsv4.*|quantize_moe_experts|moe_.*|"
    r"(liger|cut_cross_entropy|swanlab|use_swanlab|autotune|fused_attn).*|nf4_backend|nvfp4.*|bnb_config_kwargs|"
    r"model_quantization_config.*|gemma4_hybrid_attn_impl|llama4_linearized_experts|activation_offloading|"
    r"ple_cpu_offload|low_cpu_mem_usage|device_map|gpu_memory_limit|experimental_.*|torchdistx_path|use_ray|ray_.*|vllm|"
    r"(wandb|use_wandb|trackio|use_tensorboard|use_otel|otel).*|push_dataset_to_hub|hf_use_auth_token|ddp.*|local_rank|"
    r"tokenizer_(type|legacy|use_fast|use_mistral_common)|trust_remote_code|revision_of_model|resize_token_embeddings.*"
)
# Of no meaning for two steps on eight rows.
SHORT = re.compile(
    r"eval.*|do_causal_lm_eval|save.*|test_datasets|early_stopping.*|load_best.*|metric_for.*|greater_is.*|"
    r"loss_watchdog.*|auto_resume.*|resume_from_checkpoint|warmup.*|dataset_.*|dataloader.*|debug|batch_size|test_value|"
    r"lora_model_dir|jagged.*|max_packed.*|group_by_length|adam_.*|optim_args|lr_quadratic.*"
)
GPU_PLUGINS = re.compile(r"liger|cut_cross_entropy|kernels|swanlab|expert_parallel")
FOR_TWO_STEPS = {
    "max_steps": 2,
    "num_epochs": 1,
    "micro_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "val_set_size": 0,
    "save_strategy": "no",
    "logging_steps": 1,
    "sample_packing": False,
    "bf16": False,
    "fp16": False,
    "tf32": False,
    "dataset_num_proc": 1,
    "learning_rate": 0.001,
    "lr_scheduler": "constant",
    "optimizer": "adamw_torch",
    "seed": 7,
}
KERNELS = {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}


def on_a_cpu(config: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The YAML for two steps on a tiny model in `folder`, and what was switched off or stands in for something.

    Raises:
        NotBuilt: when there is no tiny counterpart of the model or a dataset.
    """
    from axolotl_zoo import POSITIONS, tiny_base, write_rows

    base, remarks = tiny_base(config, folder)
    off = sorted(key for key, value in config.items() if value and OFF.fullmatch(key))
    plugins = list(config.get("plugins") or ())
    off += [plugin.rpartition(".")[2] for plugin in plugins if GPU_PLUGINS.search(plugin)]
    if (config.get("trl") or {}).get("use_vllm"):
        off.append("trl.use_vllm")
    if isinstance(config.get("gradient_checkpointing"), str):
        off.append(f"gradient_checkpointing: {config['gradient_checkpointing']}, which is true here")
    if off:
        remarks.insert(0, f"off: {', '.join(off)}")
    small = {key: value for key, value in config.items() if not OFF.fullmatch(key) and not SHORT.fullmatch(key)}
    small |= FOR_TWO_STEPS | {"base_model": str(base), "output_dir": str(folder / "out"), "adapter": "lora"}
    small |= {
        "dataset_prepared_path": str(folder / "prepared"),
        "plugins": [p for p in plugins if not GPU_PLUGINS.search(p)],
    }
    small["sequence_len"] = min(int(config.get("sequence_len") or POSITIONS), POSITIONS)
    if int(config.get("lora_r") or 0) > 8:  # the tiny models are 32 wide
        small["lora_r"] = 8
        remarks.append(f"lora_r: 8 in place of {config['lora_r']}")
    small["gradient_checkpointing"] = bool(config.get("gradient_checkpointing"))
    small["datasets"] = []
    for number, dataset in enumerate(config.get("datasets") or ()):
        rows = folder / f"rows{number}.jsonl"
        write_rows(dataset, rows)
        kept = {key: value for key, value in dataset.items() if key not in ("split", "data_files", "ds_type", "name")}
        small["datasets"].append(kept | {"path": str(rows), "ds_type": "json"})
    if isinstance(small.get("trl"), dict):
        small["trl"] = {k: v for k, v in small["trl"].items() if "vllm" not in k} | {
            "max_completion_length": 4,
            "use_vllm": False,
            "num_generations": 2,
        }
    return small, remarks


def train(config: dict[str, Any], folder: Path) -> str:
    """Train a YAML in a fork of this process. Returns the error, or nothing if it trained."""
    path = folder / "example.yaml"
    path.write_text(yaml.safe_dump(config))
    child = os.fork()
    if child == 0:
        with (folder / "log.txt").open("w") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # those of pytest are no file
        os.setpgrp()
        try:
            said = _train_here(path)
        except BaseException as error:
            traceback.print_exc()
            ours = any(
                "peft_reft" in f.filename or "integrations/axolotl" in f.filename
                for f in traceback.extract_tb(error.__traceback__)[-3:]
            )
            said = f"{'OURS ' if ours else ''}{type(error).__name__}: {error}"
        (folder / "said.txt").write_text(said)
        sys.stdout.flush()
        os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(SECONDS)
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    said = folder / "said.txt"
    return (
        said.read_text() if said.exists() else f"the process ended by signal {status & 127} (9: after {CPU_SECONDS} s)"
    )


def _train_here(path: Path) -> str:
    import torch
    from axolotl.cli.args import TrainerCliArgs
    from axolotl.cli.config import load_cfg
    from axolotl.cli.train import do_train
    from axolotl.integrations.base import PluginManager
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    logging.disable(logging.NOTSET)
    PluginManager.get_instance().plugins.clear()  # of the example's validation
    cfg = load_cfg(str(path))
    do_train(cfg, TrainerCliArgs())
    log = (path.parent / "log.txt").read_text()
    losses = [float(loss) for loss in re.findall(r"'loss': '?([-+.0-9enaif]+)", log)]
    if not losses or not all(map(math.isfinite, losses)):
        return f"losses {losses}"
    weights = load_file(path.parent / "out" / "adapter_model.safetensors")
    # Both begin as zeros. They stay zeros where no token has a label, for one.
    first = "lora_B.weight" if cfg.adapter == "lora" else "reft_b"
    moved = [name for name, value in weights.items() if name.endswith(first) and value.count_nonzero()]
    return "" if moved else f"no {first} was trained, of {len(weights)} tensors"


def one_of_each_kind_first(found: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
    """The examples, ordered so that a run that is stopped has seen each kind of architecture, data and trainer."""
    from axolotl_zoo import known_architecture

    seen: Counter[str] = Counter()
    ranked = []
    for name, config in found:
        types = [str(one.get("type")) for one in config.get("datasets") or ()]
        kind = str(
            (known_architecture(config["base_model"]), config.get("rl"), bool(config.get("processor_type")), types)
        )
        ranked.append((seen[kind], not config.get("rl"), name, config))
        seen[kind] += 1
    return [(name, config) for *_, name, config in sorted(ranked, key=lambda one: one[:3])]


def _import_what_trainings_use() -> None:
    """Import in this process what each fork would import for itself."""
    for name in ("cli.args", "cli.config", "cli.train", "common.datasets", "core.builders", "loaders.model", "train"):
        importlib.import_module(f"axolotl.{name}")
    for name in ("axolotl.monkeypatch.data.batch_dataset_fetcher", "trl", "peft_reft.integrations.axolotl"):
        importlib.import_module(name)
    logging.disable(logging.WARNING)
    gc.freeze()  # axolotl collects garbage several times in a training: forks then need not look at what is here


def trained(name: str, config: dict[str, Any], keep: Path | None = None) -> dict[str, Any]:
    """What comes of training an example: its outcome, the error's text, and what was switched off."""
    from axolotl_zoo import NotBuilt

    validated = outcome(config)
    if validated != "validated":
        return {"outcome": validated, "text": "", "remarks": []}
    # Letters of a random name may be those of an architecture: axolotl looks for "mpt" in the base model's path.
    folder = Path(tempfile.gettempdir(), f"sweep_{os.getpid()}")
    folder.mkdir()
    try:
        small, remarks = on_a_cpu(config, folder)
        said = train(as_reft(small), folder)
        if not said:
            return {"outcome": "trained", "text": "", "remarks": remarks}
        if keep is not None:
            shutil.copy(folder / "log.txt", keep / (name.replace("/", "_") + ".log"))
        if said.startswith("OURS "):
            return {"outcome": "refused by ReFT in training", "text": said[5:], "remarks": remarks}
        for leftover in ("said.txt", "out", "prepared"):
            path = folder / leftover
            path.unlink(missing_ok=True) if path.is_file() else shutil.rmtree(path, ignore_errors=True)
        lora = train(small | KERNELS, folder)
        if lora:
            return {
                "outcome": "not tried: the tiny model fails with LoRA as well",
                "text": f"{said} / LoRA: {lora}",
                "remarks": remarks,
            }
        return {"outcome": "FAILS, and LoRA trains", "text": said, "remarks": remarks}
    except NotBuilt as reason:
        return {"outcome": "not tried: no tiny counterpart", "text": str(reason), "remarks": []}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="examples of axolotl's source distribution")
    parser.add_argument("--results", type=Path, default=Path("axolotl_examples.jsonl"), help="where outcomes are kept")
    parser.add_argument("--only", default="*", help="a pattern of names")
    parser.add_argument("--logs", type=Path, help="a folder for the logs of trainings that failed")
    options = parser.parse_args()
    _import_what_trainings_use()
    known = [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.exists() else []
    known = {one["name"]: one for one in known}
    for name, config in one_of_each_kind_first(examples(options.folder)):
        if name in known or not fnmatch.fnmatch(name, options.only):
            continue
        known[name] = {"name": name, **trained(name, config, options.logs)}
        with options.results.open("a") as file:
            file.write(json.dumps(known[name]) + "\n")
        print(name, known[name]["outcome"], known[name]["text"][:300], sep=" | ", flush=True)
    found = defaultdict(list)
    for one in known.values():
        found[one["outcome"]].append(one["name"])
    print(f"| outcome | of {len(known)} YAMLs |\n| --- | --- |")
    for kind, names in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"| {kind} | {len(names)} |")
    return int(any(kind.startswith(("UNCLEAR", "FAILS")) for kind in found))


if __name__ == "__main__":
    sys.exit(main())
