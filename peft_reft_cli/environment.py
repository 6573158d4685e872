"""`peft-reft env`: what a report of a problem needs to say of the machine, the libraries and the adapter.

Versions are read from the installed packages' metadata, so a library that can't be imported is named all the same, and
an adapter's settings from its files.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import Json, check_model, print_json


LIBRARIES = (
    "peft-reft", "torch", "peft", "transformers", "accelerate", "tokenizers", "safetensors", "huggingface_hub",
    "axolotl", "trl", "datasets", "bitsandbytes", "gguf", "torchao", "deepspeed", "lm_eval", "vllm",
)  # fmt: skip
VARIABLES = ("HF_", "TRANSFORMERS_", "CUDA_VISIBLE_DEVICES", "PYTORCH_", "OMP_NUM_THREADS", "PEFT_REFT_", "AXOLOTL_")
# Variables whose names hold one of these are not shown.
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def env(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter's folder, whose settings are shown too.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a report of a problem needs to say.

    Versions, devices, the variables that these libraries read and, of an adapter, its settings.
    """
    if adapter is not None:
        if not adapter.is_dir():
            raise ValueError(f"{adapter} is no folder. Give the folder of an adapter.")
        check_model("ADAPTER", str(adapter), "adapter_config.json")
    report: dict[str, Any] = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        "peft_reft": _import_peft_reft(),
        "devices": _devices(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not any(word in name for word in SECRET)
        },
    }
    if adapter is not None:
        report["adapter"] = _adapter(adapter)
    if as_json:
        print_json(report)
    else:
        typer.echo("\n".join(_lines(report)))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _import_peft_reft() -> dict[str, Any]:
    """Whether an import registers ReFT with PEFT, and which libraries are of another version than those that were
    tested."""
    try:
        import peft_reft
        from peft_reft.tuner.versions import KNOWN_TO_WORK
    except Exception as error:  # a broken installation is what is reported here
        return {"imports": f"{type(error).__name__}: {error}"}
    untested = {
        name: f"{found}, tested are {', '.join(known)}"
        for name, known in KNOWN_TO_WORK.items()
        if (found := _version(name)) and found not in known
    }
    return {"imports": "yes", "folder": Path(peft_reft.__file__).parent, "untested": untested}


def _devices() -> dict[str, Any]:
    """The accelerators that torch sees, or the error of its import."""
    try:
        import torch

        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = "cpu" if device is None else device.type
        found: dict[str, Any] = {"kind": kind, "torch built for CUDA": torch.version.cuda}
        if kind == "cuda":
            found["names"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        elif kind != "cpu":
            found["count"] = torch.accelerator.device_count()
        return {**found, "cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _adapter(folder: Path) -> dict[str, Any]:
    """An adapter's settings, as its file has them, without those that are not set, and the sizes of its files."""
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return {
        "settings": {name: value for name, value in settings.items() if value not in (None, {}, [])},
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()},
    }


def _lines(report: dict[str, Any], indent: str = "") -> list[str]:
    """A report as lines `name: value`, the names below one another indented."""
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", *(_lines(value, f"{indent}  ") or [f"{indent}  none"])]
        else:
            lines.append(f"{indent}{name}: {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return lines
