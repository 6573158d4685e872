"""A run that is killed with SIGKILL at any moment and resumed ends with the adapter of a run that was not killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from paths import HELPERS
from safetensors.torch import save_file

from peft_reft import last_complete_checkpoint


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_runs_end_where_others_do(tmp_path):
    """killed_worker.py kills runs, up to four times each, makes every state in which a kill leaves a checkpoint, and
    compares."""
    worker = HELPERS / "killed_worker.py"
    run = subprocess.run(
        [sys.executable, str(worker), str(tmp_path), "5"], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["kills"] >= 5
    assert result["passed_over"] >= 1  # some kills left an incomplete checkpoint
    assert result["written_last"] == "trainer_state.json"
    assert (
        result["refused"] == result["states"] >= 7
    )  # resuming from a half-written checkpoint is an error, never a different run


def checkpoint(folder: Path, step: int) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    save_file({"a": torch.ones(3)}, made / "adapter_model.safetensors")
    torch.save({"a": torch.ones(3)}, made / "optimizer.pt")
    (made / "trainer_state.json").write_text('{"global_step": 1}')
    return made


def test_the_newest_complete_checkpoint(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nothing") is None
    for step in (2, 9, 10):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-11").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


@pytest.mark.parametrize(
    "file, said",
    [
        ("trainer_state.json", r"has no trainer_state.json"),
        ("trainer_state.json", r"trainer_state.json can't be read"),
        ("adapter_model.safetensors", r"adapter_model.safetensors can't be read"),
        ("optimizer.pt", r"optimizer.pt is cut off"),
    ],
)
def test_a_checkpoint_that_is_cut_off_is_passed_over(tmp_path, file, said):
    checkpoint(tmp_path, 1)
    broken = checkpoint(tmp_path, 2) / file
    if "has no" in said:
        broken.unlink()
    else:
        os.truncate(broken, broken.stat().st_size // 2)
    with pytest.warns(UserWarning, match=f"checkpoint-2 is not complete: .*{said}"):
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
