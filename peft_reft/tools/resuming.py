"""Which checkpoint of a Trainer a killed run can resume from.

transformers' `get_last_checkpoint`, and with it `resume_from_checkpoint=True`, takes the checkpoint of the highest step, also where
the run was killed while it was written. This module knows what a Trainer's checkpoint is made of, and nothing of ReFT.
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path

from safetensors import safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


def last_complete_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint in a Trainer's output folder that was written to its end, None where there is none.

    `trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))` starts a run, and starts it again after it
    was killed at any moment. Checkpoints that are passed over are named in a warning; the run writes them anew.

    Args:
        output_dir (`str` or `os.PathLike`): The `output_dir` of the TrainingArguments. It may not exist yet.
    """
    folders = [folder for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _step(folder) >= 0]
    for folder in sorted(folders, key=_step, reverse=True):
        fault = _fault(folder)
        if fault is None:
            return str(folder)
        warnings.warn(f"{folder} is not complete: {fault}. The checkpoint before it is taken.")
    return None


def _step(folder: Path) -> int:
    step = folder.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isdigit() and folder.is_dir() else -1


def _fault(folder: Path) -> str | None:
    """What a checkpoint lacks. A Trainer writes its state last."""
    if not (folder / TRAINER_STATE_NAME).exists():
        return f"it has no {TRAINER_STATE_NAME}, which is written last"
    # A checkpoint that is written over an earlier one of the same step has that one's files to its end.
    for file in sorted(folder.rglob("*")):
        try:
            whole = _is_whole(file)
        except Exception as error:
            return f"{file.name} can't be read ({error})"
        if not whole:
            return f"{file.name} is cut off"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file ends where it says, for the kinds of file that do say."""
    if file.suffix == ".json":
        json.loads(file.read_text())
    elif file.suffix == ".safetensors":
        with safe_open(file, framework="pt"):  # compares the file's length with what its header says
            pass
    elif file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)  # torch.save writes a zip file, whose table of contents stands at its end
    return True
