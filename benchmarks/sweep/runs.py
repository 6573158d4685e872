"""Makes a run: trains a method on a task and scores it. One run after the other, in one process.

The optimiser is AdamW with a linear schedule after a warmup of a tenth of the steps, and gradients are clipped to a
norm of 1, as transformers' Trainer and axolotl do by default.
"""

from __future__ import annotations

import importlib.metadata
import math
import random
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from .methods import apply_method, count_trained
from .settings import Run
from .tasks import TASKS, Batch, Example, Places, SweepTask, test_sample


WARMUP = 0.1
MAX_GRAD_NORM = 1.0
TEST_BATCH = 32
SORTED_TOGETHER = 8  # training batches whose examples are sorted by length, which saves padding
VERSIONS = ("torch", "transformers", "peft")


class Runner:
    """Makes runs. It keeps the encoded examples of each task, and nothing of a model.

    Args:
        places (`Places`): Where models and data are.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self._encoded: dict[str, tuple[Any, list[Example], list[Example]]] = {}

    def make(self, run: Run) -> dict[str, Any]:
        """Make a run.

        Returns:
            `dict`: `score`; `metric`; `loss`, the mean of the last tenth of the steps, None where it is no number;
                `trained`, the number of trained weights without a classifier; `cpu_seconds`; `versions`.
        """
        started = time.process_time()
        task = TASKS[run.task]
        tokenizer, train, test = self._examples(run.task)
        if run.examples > len(train):
            raise ValueError(f"examples={run.examples}: {run.task} has {len(train)}.")
        set_seed(run.seed)
        model = apply_method(run, task.load_model(self.places), task.task_type)
        trained = count_trained(model) if run.method != "base" else 0
        losses = []
        if run.method != "base":
            chosen = random.Random(run.seed).sample(train, run.examples)
            losses = fit(run, task, model, tokenizer, chosen)
        model.eval()
        with torch.no_grad():
            score = task.score(model, test_batches(run, task, tokenizer, test), tokenizer)
        last = losses[-max(1, len(losses) // 10) :]
        loss = sum(last) / len(last) if last else math.nan
        return {
            "metric": task.metric,
            "score": round(score, 5),
            "loss": round(loss, 5) if math.isfinite(loss) else None,
            "trained": trained,
            "cpu_seconds": round(time.process_time() - started, 1),
            "versions": {name: importlib.metadata.version(name) for name in VERSIONS},
        }

    def _examples(self, name: str) -> tuple[Any, list[Example], list[Example]]:
        if name not in self._encoded:
            task = TASKS[name]
            tokenizer = task.load_tokenizer(self.places)
            test = test_sample(task, task.examples("test", self.places, tokenizer))
            self._encoded[name] = tokenizer, task.examples("train", self.places, tokenizer), test
        return self._encoded[name]


def fit(run: Run, task: SweepTask, model: Any, tokenizer: Any, examples: list[Example]) -> list[float]:
    """Train the weights of a model that need gradients. Returns the loss of each step."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=run.rate, weight_decay=run.weight_decay, fused=True)
    steps = run.epochs * math.ceil(len(examples) / task.batch)
    warmup = max(1, round(WARMUP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    losses = []
    for epoch in range(run.epochs):
        for rows in train_batches(examples, task.batch, random.Random(f"{run.seed} {epoch}")):
            batch = task.batch_of(rows, tokenizer)
            loss = task.loss(model, batch, told_of(run, task, batch))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
    return losses


def train_batches(examples: list[Example], size: int, draw: random.Random) -> list[list[Example]]:
    """The batches of an epoch, in random order: of random examples, those of a few batches sorted by length."""
    shuffled = draw.sample(examples, len(examples))
    batches = []
    for start in range(0, len(shuffled), size * SORTED_TOGETHER):
        near = sorted(shuffled[start : start + size * SORTED_TOGETHER], key=length)
        batches += [near[first : first + size] for first in range(0, len(near), size)]
    draw.shuffle(batches)
    return batches


def test_batches(
    run: Run, task: SweepTask, tokenizer: Any, test: list[Example]
) -> Iterator[tuple[list[Example], Batch, Batch]]:
    """The test batches, with what ReFT is told of each."""
    in_order = sorted(test, key=length)
    for start in range(0, len(in_order), TEST_BATCH):
        rows = in_order[start : start + TEST_BATCH]
        batch = task.batch_of(rows, tokenizer)
        yield rows, batch, told_of(run, task, batch)


def length(example: Example) -> int:
    """The number of tokens of an example."""
    return len(example.get("input_ids", ())) + len(example.get("prompt", ())) + 0


def told_of(run: Run, task: SweepTask, batch: Batch) -> Batch:
    """What ReFT is told of a batch's prompts: where they end, or which of their tokens to edit."""
    lengths = task.prompt_lengths(batch) if run.is_reft and run.positions != "all" else None
    if lengths is None:
        if run.is_reft and not run.first_token:
            raise ValueError(f"first_token=False is for prompts of a language model, and {run} has none.")
        return {}
    if run.first_token:
        return {"prompt_lengths": lengths}
    return {"intervention_mask": mask_without_first(batch["attention_mask"], lengths, run)}


def mask_without_first(attention_mask: Tensor, lengths: Tensor, run: Run) -> Tensor:
    """int64 [B, S]: 1 at the first tokens that are edited, 2 at the last ones where these have weights of their own.
    The first token of a sequence is left out: f7 is tokens 2 to 7."""
    from peft_reft.tuner.positions.spec import PositionSpec

    spec = PositionSpec.parse(run.positions)
    groups = spec.groups(run.share_weights)
    mask = torch.zeros_like(attention_mask)
    starts = attention_mask.argmax(1)
    for row, (start, count) in enumerate(zip(starts.tolist(), lengths.tolist())):
        first, last = spec.counts(count)
        mask[row, start + 1 : start + first] = 1
        mask[row, start + count - last : start + count] = groups
    return mask
