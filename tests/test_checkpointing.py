"""Gradient checkpointing gives the gradients of plain training."""

from __future__ import annotations

import pytest
import torch
from models import build, prompts, randomize
from peft import get_peft_model

from peft_reft import ReftConfig


def gradients(name: str, checkpointing: dict | None, batches: list[dict], **settings) -> dict[str, torch.Tensor]:
    base = build(name)
    settings = {"r": 4, "positions": "f2+l1", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base, ReftConfig(**settings)).train()
    randomize(model)
    if checkpointing is not None:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    losses = [model(**batch).loss for batch in batches]  # several forwards before one backward
    sum(losses).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None and ".reft_" in key}


def labelled(*lengths: int, prompt: int, seed: int) -> dict:
    batch = prompts(*lengths, seed=seed)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :prompt] = -100
    return {**batch, "labels": labels}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_same_gradients_with_two_forwards_before_one_backward(name, use_reentrant):
    batches = [labelled(9, 6, prompt=4, seed=1), labelled(12, 7, prompt=2, seed=2)]
    plain = gradients(name, None, batches)
    assert len(plain) == 9
    recomputed = gradients(name, {"use_reentrant": use_reentrant}, batches)
    assert plain.keys() == recomputed.keys()
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("target_modules", [["mlp"], ["self_attn", "down_proj"]])
def test_edits_inside_the_recomputed_part(target_modules, use_reentrant):
    """Each forward's recompute edits that forward's tokens: the batches differ in shape and in their prompts."""
    batches = [labelled(9, 6, prompt=4, seed=1), labelled(12, 7, prompt=2, seed=2)]
    plain = gradients("llama", None, batches, target_modules=target_modules)
    recomputed = gradients("llama", {"use_reentrant": use_reentrant}, batches, target_modules=target_modules)
    assert plain.keys() == recomputed.keys() and len(plain) == 9 * len(target_modules)
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-5)


def test_unloading_gives_the_checkpoint_functions_back():
    base = build("llama")
    base.gradient_checkpointing_enable()
    before = base.model.layers[0]._gradient_checkpointing_func
    model = get_peft_model(base, ReftConfig(r=4, target_modules=["mlp"], task_type="CAUSAL_LM")).train()
    model(**labelled(9, prompt=4, seed=1))
    assert base.model.layers[0]._gradient_checkpointing_func is not before
    model.unload()
    assert base.model.layers[0]._gradient_checkpointing_func is before


def test_a_recompute_that_can_not_be_bound_is_an_error_rather_than_a_guess():
    from torch.utils.checkpoint import checkpoint

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.inner = torch.nn.Embedding(97, 16), torch.nn.Linear(16, 16)

        def forward(self, input_ids):
            return checkpoint(self.inner, self.embed(input_ids).requires_grad_(), use_reentrant=False)

    model = get_peft_model(Block(), ReftConfig(r=4, positions="f1", target_modules=["inner"])).train()
    output = model(prompts(6)["input_ids"], prompt_lengths=torch.tensor([3]))
    with pytest.raises(RuntimeError, match="'inner' ran without a Selection.*activation checkpointing"):
        output.sum().backward()
