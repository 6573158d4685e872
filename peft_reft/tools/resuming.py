"""Finds the checkpoint of a Trainer that a killed run can resume from.

transformers' `get_last_checkpoint`, and with it `resume_from_checkpoint=True`, takes the checkpoint of the highest
step even if the run was killed while writing it. This module knows the files of a Trainer's checkpoint, and nothing of
ReFT.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path

from safetensors import safe_open


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint in a Trainer's output folder.

    `trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))` starts a run, and resumes it
    after it was killed at any moment. A warning names each incomplete checkpoint; the resumed run writes it again.

    Args:
        output_dir (`str` or `os.PathLike`): The `output_dir` of the TrainingArguments. It may not exist yet.

    Returns:
        `str`, *optional*: The checkpoint's folder. None: there is no complete one, and the run starts anew.
    """
    # Imported here: an import of this module of transformers may be what imports PEFT, and with it this package.
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    prefix = f"{PREFIX_CHECKPOINT_DIR}-"
    steps = {folder: _step(folder, prefix) for folder in Path(output_dir).glob(f"{prefix}*")}
    for folder in sorted((one for one, step in steps.items() if step >= 0), key=lambda one: steps[one], reverse=True):
        fault = _fault(folder)
        if fault is None:
            return str(folder)
        warnings.warn(f"{folder} is not complete: {fault}. The checkpoint before it is taken.")
    return None


def _step(folder: Path, prefix: str) -> int:
    """The step of a checkpoint's folder, -1 for anything else."""
    step = folder.name.removeprefix(prefix)
    return int(step) if step.isdigit() and folder.is_dir() else -1


def _fault(folder: Path) -> str | None:
    """Why a checkpoint is incomplete. None: it is complete."""
    from transformers.trainer import TRAINER_STATE_NAME  # here, because Trainer takes a second to import

    if not (folder / TRAINER_STATE_NAME).exists():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    # A checkpoint written over an earlier one of the same step still has that one's trainer state while it is written:
    # its files must be looked at, too.
    for file in sorted(folder.rglob("*")):
        try:
            whole = _is_whole(file)
        except Exception as error:
            return f"{file.name} can't be read ({error})"
        if not whole:
            return f"{file.name} is cut off"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file is not cut off, for the kinds of file whose contents show it. True for all others."""
    if file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):  # raises where the file's length is not the one in its header
            pass
    elif file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)  # torch.save writes a zip file, whose table of contents is at the end
    return True
