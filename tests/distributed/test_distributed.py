"""Two processes over gloo, by accelerate's configs in examples/distributed, end where one process does.

accelerate reads the config as for GPUs; distributed_worker.py puts the processes on CPUs. Each launch is several
trainings.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from models import GROUPED, build, labelled, prompts, weight
from packaging.version import Version
from paths import HELPERS, REPOSITORY
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from peft_reft import ReftConfig


EXAMPLES = REPOSITORY / "examples" / "distributed"
WORKER = str(HELPERS / "distributed_worker.py")
ARGUMENTS = {
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 1.0,
    "save_steps": 2,
    "logging_steps": 1,
}
WHOLE = {"reft": {"r": 4, "positions": "f2+l2"}}
# Modules inside the blocks are recomputed with them in backward. R [1, 3, 49] has no equal parts for two processes.
INSIDE = {"reft": {"r": 3, "positions": "f2+l2", "share_weights": True, "target_modules": ["gate_proj"]}}
# Rows 4 to 7 are those of the second step: the second process has nothing to edit in it, and waits for no one.
ODD = WHOLE | {"odd": [6, 7, 8, 13]}
CHECKPOINTED = {"arguments": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}}
BY_FSDP = {"environment": {"FSDP_ACTIVATION_CHECKPOINTING": "true"}}
SHARDED = {"environment": {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT", "FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}}
RESUMED = {"resume": "whole/checkpoint-2"}
# Config -> name of the training in one process -> settings of the distributed training that must equal it.
LAUNCHES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "ddp": {
        "whole": ("whole", WHOLE),
        "resumed": ("whole", WHOLE | RESUMED),
        "inside": ("inside", INSIDE | CHECKPOINTED),
        "odd": ("odd", ODD),
    },
    "fsdp2": {
        "whole": ("whole", WHOLE),
        "resumed": ("whole", WHOLE | RESUMED),
        "inside": ("inside", INSIDE | CHECKPOINTED),
        "odd": ("odd", ODD),
        "checkpointed": ("whole", WHOLE | BY_FSDP),
        "checkpointed inside": ("inside", INSIDE | BY_FSDP),
        "sharded": ("whole", WHOLE | SHARDED),
        "sharded resumed": ("whole", WHOLE | SHARDED | {"resume": "sharded/checkpoint-2"}),
    },
    "zero2": {
        "whole": ("whole", WHOLE),
        "resumed": ("whole", WHOLE | RESUMED),
        "inside": ("inside", INSIDE | CHECKPOINTED),
        "odd": ("odd", ODD),
    },
    "zero3": {
        "whole": ("whole", WHOLE),
        "resumed": ("whole", WHOLE | RESUMED),
        "inside": ("inside", INSIDE | CHECKPOINTED),
        "odd": ("odd", ODD),
    },
}


def launched_as(config: Path) -> dict[str, str]:
    """The environment that `accelerate launch --config_file` gives its processes."""
    from accelerate.commands import launch

    parsed = launch.launch_command_parser().parse_args(["--config_file", str(config), WORKER])
    arguments, defaults, _ = launch._validate_launch_command(parsed)
    if not arguments.use_deepspeed:
        on_cpu = {} if arguments.use_fsdp else {"ACCELERATE_USE_CPU": "true"}
        return launch.prepare_multi_gpu_env(arguments) | on_cpu
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return launch.prepare_deepspeed_cmd_env(arguments)[1] | {"DS_ACCELERATOR": "cpu"}


def run(processes: int, trainings: list[dict[str, Any]], environment: dict[str, str]) -> None:
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port]
    environment = os.environ | environment | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
    path = [str(HELPERS), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    done = subprocess.run(
        [*command, WORKER, json.dumps(trainings)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]


def training(base: Path, out: Path, settings: dict[str, Any], processes: int) -> dict[str, Any]:
    arguments = ARGUMENTS | settings.get("arguments", {})
    steps = arguments.get("gradient_accumulation_steps", 1)
    arguments["per_device_train_batch_size"] //= processes * steps
    return {"base": str(base), "out": str(out), **settings, "arguments": arguments}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("distributed") / "base"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED | {"intermediate_size": 49})).save_pretrained(
        folder
    )
    return folder


@pytest.fixture(scope="module")
def alone(base) -> dict[str, dict[str, torch.Tensor]]:
    """The adapters that one process makes."""
    trainings = [
        training(base, base.parent / name, settings, 1)
        for name, settings in (("whole", WHOLE), ("inside", INSIDE), ("odd", ODD))
    ]
    run(1, trainings, {"ACCELERATE_USE_CPU": "true"})
    return {name: load_file(base.parent / name / "adapter_model.safetensors") for name in ("whole", "inside", "odd")}


def check_saved(folder: Path) -> dict[str, torch.Tensor]:
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved
    for name, value in saved.items():
        assert value.dtype == torch.float32
        if "reft_R" in name:
            eye = torch.eye(value.shape[1]).expand(len(value), -1, -1)
            torch.testing.assert_close(value @ value.mT, eye, rtol=0, atol=1e-5)
    return saved


@pytest.mark.slow
@pytest.mark.parametrize("config", LAUNCHES)
def test_two_processes_end_where_one_does(config, base, alone, tmp_path):
    if config.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    # transformers 5.16 does not resume processes on CPUs: with LoRA it stops with "don't know how to restore data
    # location".
    resumes = Version(transformers.__version__) >= Version("5.23")
    launches = {name: run for name, run in LAUNCHES[config].items() if resumes or "resume" not in run[1]}
    trainings = []
    for name, (_, settings) in launches.items():
        if "resume" in settings:
            settings = settings | {"resume": str(tmp_path / settings["resume"])}
        trainings.append(training(base, tmp_path / name, settings, 2))
    run(2, trainings, launched_as(EXAMPLES / f"{config}.yaml"))
    engine = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(config, "DEEPSPEED")
    for name, (equal_to, _) in launches.items():
        notes = json.loads((tmp_path / name / "notes.json").read_text())
        assert (notes["engine"], notes["processes"]) == (f"DistributedType.{engine}", 2)
        assert (notes["parameters"].get("DTensor", 0) > 0) == (config == "fsdp2")
        assert ("CheckpointWrapper" in str(notes["modules"])) == ("checkpointed" in name)
        assert notes["modules"].get("FSDPReftLayer") is None  # the few weights are gathered once, with the root's
        assert len(notes["losses"]) == ARGUMENTS["max_steps"]
        assert notes["unedited"] == ([2] if equal_to == "odd" else [])  # rows 8 and 13 are the first process's
        saved = check_saved(tmp_path / name)
        assert saved.keys() == alone[equal_to].keys()
        for key, value in saved.items():
            difference = (value - alone[equal_to][key]).abs().max()
            assert difference < 1e-5, (name, key, difference)
        model = PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), tmp_path / name)
        with torch.no_grad(), model.disable_adapter():
            plain = model(**prompts(9, 7)).logits
        with torch.no_grad():
            assert not torch.allclose(model(**prompts(9, 7)).logits, plain, atol=1e-3)
        if "sharded" not in name:  # else the checkpoint holds shards
            check_saved(tmp_path / name / "checkpoint-4")


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def adapted(**settings) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(
        build("llama"), ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM", **settings)
    ).train()


def train(model: torch.nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=True)
    for step in range(steps):
        model(**labelled(9, 7, prompt=4, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("unit", ["edited blocks", "blocks", "all"])
def test_fully_shard_by_hand(unit, group):
    """Whichever modules FSDP wraps: before a forward, a layer's weights may be sharded or gathered already."""
    plain, sharded = adapted(), adapted()
    layers = sharded.base_model.model.model.layers
    for layer in {"edited blocks": layers, "blocks": [layer.base_layer for layer in layers], "all": []}[unit]:
        fully_shard(layer)
    fully_shard(sharded)
    train(plain)
    train(sharded)
    state = sharded.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name].full_tensor(), value, rtol=0, atol=1e-5)
    for layer in layers:
        R = weight(layer, "R").full_tensor()
        torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)


def test_version_1_of_fsdp_is_refused(group):
    model = adapted()
    layers = model.base_model.model.model.layers
    for layer in layers:
        layer.base_layer = FullyShardedDataParallel(
            layer.base_layer, device_id=torch.device("cpu"), use_orig_params=True
        )
    with pytest.raises(NotImplementedError, match="FSDP version 1.*fsdp_version: 2"):
        train(model)


def test_an_adapter_to_train_on_a_sharded_base_is_refused(group):
    base = build("llama")
    fully_shard(base)
    with pytest.raises(NotImplementedError, match="sharded already.*is_trainable=False"):
        get_peft_model(base, ReftConfig(r=4))


@pytest.mark.parametrize("split", ["cp_enabled", "sp_enabled"])
def test_parts_of_sequences_are_refused(split, group, monkeypatch):
    from accelerate.state import AcceleratorState

    config = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False} | {split: True})
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", config)
    with pytest.raises(NotImplementedError, match="part of every sequence.*cp_size and sp_size to 1"):
        adapted()(**labelled(9, 7, prompt=4, seed=0))
    everywhere = get_peft_model(build("llama"), ReftConfig(r=4, positions="all", task_type="CAUSAL_LM"))
    everywhere(**labelled(9, 7, prompt=4, seed=0))
