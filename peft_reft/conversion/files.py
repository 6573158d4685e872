"""Reads the files of a checkpoint that something else wrote. Tensors and JSON come out, or an error that names the file."""

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

    A pickle is read with torch's `weights_only=True` alone, which runs nothing that a file could bring along.

    Args:
        path (`Path`): `*.safetensors`, or else a pickle of a dict of tensors by their names.

    Raises:
        ValueError: when the file holds anything else, naming it and what it holds.
    """
    if path.suffix == ".safetensors":
        return read(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of several kinds, as the damage is
        raise ValueError(
            f"{path} ({os.path.getsize(path):,} bytes) can't be read as tensors alone (torch.load with weights_only=True): "
            f"{_first_line(error)} It is damaged, or it holds other Python objects, which could run code when they are loaded: "
            "such files are refused. If you trust who made it, load it yourself and save the dict of its tensors with torch.save."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where a dict of tensors by their names should be.")
    for name, value in content.items():
        if not isinstance(name, str) or type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided:
            raise ValueError(
                f"{path}: {name!r} is a {type(value).__name__}, and only plain tensors by their names are read. Take it out of "
                "the file, if the adapter does without."
            )
    return {name: value.detach() for name, value in content.items()}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: when it is not readable, or not an object, naming the file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, where an object with named fields should be.")
    return content


def new_folder(out: str | os.PathLike) -> Path:
    """A folder to write to.

    Raises:
        ValueError: when there is something in it already.
    """
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already and is not an empty folder. Give a new one: nothing is written over.")
    return path


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."
