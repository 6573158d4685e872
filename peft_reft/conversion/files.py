"""Reads the files of a checkpoint that another library wrote: tensors and JSON, or an error that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.parameters.loading import read


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle, on the CPU.

    A pickle is read only with torch's `weights_only=True`, which runs no code from the file.

    Args:
        path (`Path`): `*.safetensors`, or else a pickle of a dict of tensors by their names.

    Returns:
        `dict[str, torch.Tensor]`: The tensors by their names, detached, in the dtypes of the file.

    Raises:
        ValueError: when the file holds anything else, naming the file and what it holds.
    """
    if path.suffix == ".safetensors":
        return read(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises several kinds, depending on the damage
        raise ValueError(
            f"{path} ({os.path.getsize(path):,} bytes) can't be read as tensors alone (torch.load with "
            f"weights_only=True): {_first_line(error)} It is damaged, or it holds other Python objects, which could "
            "run code when they are loaded: such files are refused. If you trust who made it, load it yourself and "
            "save the dict of its tensors with torch.save."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a dict of tensors by their names should be.")
    for name, value in content.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise ValueError(
                f"{path}: {name!r} is a {type(value).__name__}, and only plain tensors by their names are read. Take "
                "it out of the file, if the adapter does without."
            )
    return {name: value.detach() for name, value in content.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: when the file is not readable, or holds no object, naming the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object with named fields should be.")
    return content


def new_folder(out: str | os.PathLike) -> Path:
    """The path of a folder to write to, which is not made yet.

    Raises:
        ValueError: when the path is a file, or a folder with something in it.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already and is not an empty folder. Give a new one: nothing is written over.")
    return path


def _first_line(error: Exception) -> str:
    """The first line of a message as a sentence: torch.load's messages go on with advice that weakens the refusal."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
