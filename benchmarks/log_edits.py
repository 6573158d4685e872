"""Measures what the callback LogEdits costs a Trainer: in the steps between those that it logs, and in these.

Runs without the callback, with one that never comes to a step to log, and with one that logs each step take turns.
Processor time is measured, from the beginning of a step to its end, so that other work on the machine adds little.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from typing import Annotated, Any

import torch
import typer
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_reft import ReftConfig
from peft_reft.tools.log_edits import LogEdits

from .report import print_table


NEVER = 10**9
KINDS: dict[str, int | None] = {"without LogEdits": None, "a step between": NEVER, "a logged step": 1}
WARM_UP = 10  # steps of a run that do not count


class _Clock(TrainerCallback):
    """Notes the processor milliseconds of each step. Before LogEdits in the list of callbacks, it ends a step before
    that does, so it begins the next one there: what LogEdits does at the end of a step counts for the next."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self._before: float | None = None

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        now = time.process_time()
        if self._before is not None:
            self.milliseconds.append(1000 * (now - self._before))
        self._before = now


def _steps(every: int | None, layers: int, steps: int) -> list[float]:
    """The processor milliseconds of the steps of one run."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=128))
    model = get_peft_model(base, ReftConfig(r=4, positions="f7+l7", task_type="CAUSAL_LM"))
    ids = torch.randint(3, 97, (40,))
    row = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.cat([ids[:30] * 0 - 100, ids[30:]]),
    }
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps + WARM_UP, per_device_train_batch_size=2, report_to=[], save_strategy="no",
            use_cpu=True, disable_tqdm=True, logging_steps=NEVER, logging_first_step=False, log_level="error",
        )  # fmt: skip
        callbacks = [clock, *([] if every is None else [LogEdits(every)])]
        trainer = Trainer(model, args=arguments, train_dataset=[row] * 16, callbacks=callbacks)
        for callback in list(trainer.callback_handler.callbacks):
            if type(callback).__name__ == "PrinterCallback":  # printing is not measured
                trainer.remove_callback(callback)
        trainer.train()
    return clock.milliseconds[WARM_UP:]


def log_edits(
    runs: Annotated[int, typer.Option(help="how many times each is run")] = 5,
    steps: Annotated[int, typer.Option(help="steps of a run")] = 40,
    layers: Annotated[int, typer.Option(help="of the small Llama, all edited")] = 32,
) -> None:
    """Processor time of a training step without LogEdits, between the steps that it logs, and of one that it logs."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(runs):
        for kind, every in KINDS.items():
            found[kind].append(statistics.median(_steps(every, layers, steps)))
    base = found["without LogEdits"]
    rows = []
    for kind, times in found.items():
        ratios = [one / other for one, other in zip(times, base)]
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append([kind, f"{statistics.median(times):.2f}", f"{statistics.median(ratios):.3f}", spread])
    print_table(
        f"a step of a Llama of {layers} layers, all edited: medians of {steps} steps, {runs} runs",
        ["", "processor ms", "by a step without", "of all runs"],
        rows,
    )
