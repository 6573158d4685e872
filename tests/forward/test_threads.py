"""Threads share one model: each has the tokens of its own batch, and none changes what another reads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import build, labelled, prompts, randomize, weight
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig
from peft_reft.tuner.interventions import orthogonal


def adapted(**settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l2", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build("llama"), ReftConfig(**settings))
    randomize(model)
    return model.eval()


def at_once(*jobs: Callable) -> list:
    """What the jobs return, each in a thread of its own, started together."""
    start = threading.Barrier(len(jobs))

    def run(job: Callable):
        start.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as threads:
        return [future.result() for future in [threads.submit(run, job) for job in jobs]]


def forward(model: torch.nn.Module, **batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


# Batches of different shapes, whose callers give the prompts in different ways.
BATCHES = [
    prompts(9, 4),
    {**prompts(6, 6, 3, seed=4), "prompt_lengths": torch.tensor([5, 4, 2])},
    {**prompts(7, 2, side="left", seed=5), "intervention_mask": torch.ones(2, 7, dtype=torch.int64)},
    labelled(8, 5, prompt=3, seed=6),
]


def test_forwards_and_generations_at_once():
    model = adapted()
    greedy = {"max_new_tokens": 6, "do_sample": False}
    with_lengths = {**BATCHES[0], "prompt_lengths": torch.tensor([3, 2])}
    jobs = [lambda batch=batch: forward(model, **batch) for batch in BATCHES]
    jobs += [lambda batch=batch: model.generate(**batch, **greedy) for batch in (BATCHES[0], with_lengths)]
    jobs.append(lambda: model.generate(**BATCHES[0], **greedy, num_beams=2))
    alone = [job() for job in jobs]
    assert not torch.equal(alone[4], alone[5])  # the prompt lengths make a difference
    repeated = [lambda job=job: [job() for _ in range(5)] for job in jobs]
    for expected, results in zip(alone, at_once(*repeated)):
        assert all(torch.equal(result, expected) for result in results)


def test_a_call_within_another_thread_s_call():
    """Turn about, at the worst moment: while the other thread is inside its forward."""
    model = adapted()
    alone = [forward(model, **batch) for batch in BATCHES[:2]]
    inside, done = threading.Event(), threading.Event()

    def wait(module: torch.nn.Module, args: tuple) -> None:
        if threading.current_thread().name == "first":
            inside.set()
            assert done.wait(20)

    model.base_model.model.model.layers[1].register_forward_pre_hook(wait)
    results = []
    first = threading.Thread(target=lambda: results.append(forward(model, **BATCHES[0])), name="first")
    first.start()
    assert inside.wait(20)
    second = forward(model, **BATCHES[1])
    done.set()
    first.join()
    assert torch.equal(results[0], alone[0]) and torch.equal(second, alone[1])


def test_one_thread_makes_a_basis_orthonormal_again_and_the_other_waits(monkeypatch):
    """After an optimizer step two forwards find the basis changed: it must not be written while the other reads it."""
    model = adapted()
    layers = model.base_model.model.model.layers
    with torch.no_grad():
        for layer in layers:
            weight(layer, "R").add_(0.1)
    expected = [weight(layer, "R").detach().clone() for layer in layers]
    retract, calls = orthogonal.retract, []
    retract(expected)

    def slowly(parameters):
        calls.append(threading.get_ident())
        parameters = list(parameters)
        threading.Event().wait(0.2)
        retract(parameters)

    monkeypatch.setattr(orthogonal, "retract", slowly)
    first, second = at_once(*[lambda: forward(model, **BATCHES[0])] * 2)
    assert len(calls) == 1
    assert all(torch.equal(weight(layer, "R"), R) for layer, R in zip(layers, expected))
    assert torch.equal(first, second) and torch.equal(first, forward(model, **BATCHES[0]))


@pytest.mark.parametrize("fused", [False, True])
def test_training_is_not_changed_by_evaluation_in_another_thread(fused):
    """With a lock around what writes to the weights, as for any model of torch's."""

    def train(steps: int, evaluating: bool = False) -> dict[str, torch.Tensor]:
        model = adapted()  # in evaluation mode, which belongs to the model and not to a thread; there is no dropout
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, fused=fused)
        lock, over, seen = threading.Lock(), threading.Event(), []

        def evaluate() -> None:
            while not over.is_set():
                with lock:
                    seen.append(forward(model, **BATCHES[1]))

        other = threading.Thread(target=evaluate)
        if evaluating:
            other.start()
        for step in range(steps):
            model(**labelled(8, 5, prompt=3, seed=step)).loss.backward()
            with lock:
                optimizer.step()
                optimizer.zero_grad()
        over.set()
        if evaluating:
            other.join()
            assert len(seen) > 1 and all(bool(logits.isfinite().all()) for logits in seen)
        return {name: tensor.clone() for name, tensor in model.state_dict().items() if "reft_" in name}

    alone, together = train(8), train(8, evaluating=True)
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=0, msg=name)
