"""Trains a tiny model in processes that are killed, and compares the final adapters: a program for test_killed.py.

This process imports the libraries once and trains nothing. Every run is a fork of it.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
from models import build, labelled
from peft import get_peft_model
from transformers.trainer_utils import get_last_checkpoint

from peft_reft import ReftConfig, last_complete_checkpoint


STEPS = 6
FINAL = "adapter_model.safetensors"


def train(folder: Path, resume: str | None) -> None:
    """Train as an ordinary script does, with all the randomness that a run may have: start, dropout, order."""
    settings = {"r": 4, "positions": "f2+l2", "dropout": 0.2, "init_weights": "pyreft", "task_type": "CAUSAL_LM"}
    torch.manual_seed(1)
    model = get_peft_model(build("llama"), ReftConfig(**settings))
    examples = [{key: value[0] for key, value in labelled(9, prompt=4, seed=seed).items()} for seed in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.02,
        warmup_steps=2,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        use_cpu=True,
        seed=3,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=examples)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))
    (folder / "done").touch()


def fork(run: Callable[[], None]) -> int:
    """Start a run in a process of its own, and return the process's id."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                run()
            code = 0
        except Exception as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return process


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def resume(folder: Path) -> None:
    train(folder, last_complete_checkpoint(folder))


def killed(reference: Path, folder: Path, seconds: float, chance: random.Random) -> tuple[int, int]:
    """Kill a run up to four times, at a random moment or while it saves, and let it finish. Returns the number of
    kills and of incomplete checkpoints that were passed over."""
    kills = passed_over = 0
    while not (folder / "done").exists():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            last = last_complete_checkpoint(folder)
        passed_over += len(caught)
        process = fork(lambda: resume(folder))
        if kills < 4:
            limit = time.monotonic() + chance.uniform(0.1, 0.7) * seconds
            step = 1 + int((last or "-0").rpartition("-")[2])
            appears = (
                folder / f"checkpoint-{step}" / chance.choice(["README.md", FINAL, "optimizer.pt", "rng_state.pth"])
            )
            at_random = chance.random() < 0.5 or appears.exists()
            while (time.monotonic() < limit) if at_random else not appears.exists() and not (folder / "done").exists():
                time.sleep(0.0005)
            os.kill(process, signal.SIGKILL)
        code = finish(process)
        assert code in (0, -signal.SIGKILL), code
        kills += code != 0
    assert (folder / "final" / FINAL).read_bytes() == (reference / "final" / FINAL).read_bytes(), "another adapter"
    return kills, passed_over


def half_written(checkpoint: Path) -> Iterator[Callable[[Path], None]]:
    """The states in which a kill may leave a checkpoint: the files written so far, the last of them half written. Each
    is a function that brings a copy of the checkpoint into that state."""
    files = sorted((f for f in checkpoint.rglob("*") if f.is_file()), key=lambda file: file.stat().st_mtime_ns)
    for number, file in enumerate(files):

        def cut(copy: Path, number: int = number, file: Path = file) -> None:
            for later in files[number + 1 :]:
                (copy / later.relative_to(checkpoint)).unlink()
            os.truncate(copy / file.relative_to(checkpoint), file.stat().st_size // 2)

        yield cut


def main(root: Path) -> None:
    reference = root / "reference"
    started = time.monotonic()
    assert finish(fork(lambda: train(reference, None))) == 0
    seconds = time.monotonic() - started
    files = sorted((reference / "checkpoint-4").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    result: dict = {"written_last": files[-1].name, "kills": 0, "passed_over": 0, "states": 0, "refused": 0}

    chance = random.Random(0)
    for number in range(int(sys.argv[2])):
        kills, passed_over = killed(reference, root / f"killed-{number}", seconds, chance)
        result["kills"] += kills
        result["passed_over"] += passed_over

    for cut in half_written(reference / "checkpoint-4"):
        folder = root / "half"
        shutil.rmtree(folder, ignore_errors=True)
        for step in (3, 4):
            shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        cut(folder / "checkpoint-4")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert last_complete_checkpoint(folder) == str(folder / "checkpoint-3")
        result["states"] += 1
        # transformers itself chooses the half-written checkpoint.
        code = finish(fork(lambda: train(root / "half", get_last_checkpoint(root / "half"))))
        result["refused"] += code == 1
    # Resume from an early checkpoint, and from the last one, as of a run killed before it saved the final adapter.
    # From the last one, transformers trains one more step, with the learning rate at the end of its schedule: 0.
    for step in (3, STEPS):
        folder = root / f"from-{step}"
        shutil.copytree(reference / f"checkpoint-{step}", folder / f"checkpoint-{step}")
        assert finish(fork(functools.partial(resume, folder))) == 0
        assert (folder / "final" / FINAL).read_bytes() == (reference / "final" / FINAL).read_bytes(), step
    print(json.dumps({**result, "seconds of a run": round(seconds, 2)}))


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    # Done once here instead of in every fork: transformers builds its rules for renaming weights, and the garbage
    # collector goes through all objects of the imports.
    get_peft_model(build("llama"), ReftConfig(r=4))
    gc.freeze()
    main(Path(sys.argv[1]))
