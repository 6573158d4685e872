"""The program of each process in a distributed test: runs trainings, one after the other, by transformers' Trainer."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from models import prompts
from peft import get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, set_seed

from peft_reft import ReftConfig


LENGTH = 12


class Sequential(Trainer):
    """Takes the rows in their order: of four, the first process of two gets the first two."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def dataset(rows: int, odd: list[int]) -> list[dict[str, torch.Tensor]]:
    """Sequences with prompts and answers of several lengths. The odd rows have no prompt."""
    batch = prompts(*[LENGTH] * rows, seed=5)
    data = []
    for row, ids in enumerate(batch["input_ids"]):
        labels = ids.clone()
        labels[: 0 if row in odd else 3 + row % 5] = -100
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return data


def train(
    base: str,
    out: str,
    reft: dict[str, Any],
    arguments: dict[str, Any],
    resume: str | None = None,
    odd: list[int] | None = None,
) -> None:
    AcceleratorState._reset_state()
    set_seed(0)
    arguments = TrainingArguments(out, report_to=[], disable_tqdm=True, **arguments)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), ReftConfig(task_type="CAUSAL_LM", **reft))
    trainer = (Trainer if odd is None else Sequential)(
        model, arguments, train_dataset=dataset(64, odd or []), data_collator=default_data_collator
    )
    trainer.train(resume_from_checkpoint=resume)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model()
    if trainer.args.should_save:
        notes = {
            "engine": str(trainer.accelerator.distributed_type),
            "processes": trainer.accelerator.num_processes,
            "parameters": Counter(type(parameter).__name__ for parameter in model.parameters()),
            "modules": Counter(type(module).__name__ for module in model.modules()),
            "unedited": [entry["reft_rows_unedited"] for entry in trainer.state.log_history if "reft_rows" in entry],
            "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        }
        Path(out, "notes.json").write_text(json.dumps(notes))


def on_cpus() -> None:
    """Have accelerate treat processes on CPUs as on GPUs: it offers neither FSDP nor DeepSpeed for CPUs."""
    PartialState._prepare_backend = lambda self, *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))


if __name__ == "__main__":
    if os.environ.get("ACCELERATE_USE_CPU") != "true":
        on_cpus()
    for training in json.loads(sys.argv[1]):
        with mock.patch.dict(os.environ, training.pop("environment", {})):
            train(**training)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    # What follows would be the interpreter's shutdown, in which torch's and DeepSpeed's libraries have aborted a
    # process whose trainings were over ("terminate called without an active exception", one run in some dozens).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
