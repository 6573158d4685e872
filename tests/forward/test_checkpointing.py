"""Gradient checkpointing gives the gradients of plain training."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from models import build, labelled, prompts, randomize
from peft import get_peft_model

from peft_reft import ReftConfig


def gradients(
    name: str,
    checkpointing: dict | Callable | None,
    batches: list[dict],
    autocast: torch.dtype | None = None,
    dtype: torch.dtype | None = None,
    accumulate: bool = False,
    **settings,
) -> dict[str, torch.Tensor]:
    """Gradients of the adapter, after several forwards with one backward for all, or with a backward for each."""
    base = build(name).to(dtype or torch.float32)
    settings = {"r": 4, "positions": "f2+l1", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(base, ReftConfig(**settings)).train()
    randomize(model)
    if callable(checkpointing):
        checkpointing(base)
    elif checkpointing is not None:
        base.enable_input_require_grads()
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    losses = []
    for batch in batches:
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            losses.append(model(**batch).loss)
        if accumulate:
            losses.pop().backward()
    if losses:
        sum(losses).backward()
    return {key: p.grad for key, p in model.named_parameters() if p.grad is not None and ".reft_" in key}


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


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("target_modules", [["fc2"], r".*encoder.*fc2", r".*decoder.*fc2"])
def test_edits_inside_the_recomputed_parts_of_an_encoder_decoder(target_modules, use_reentrant):
    """The recompute of an encoder edits the encoder's tokens, not the decoder's, though its forward is long over."""
    batches = []
    for lengths, seed in (((9, 6), 1), ((12, 7), 2)):
        batches.append({**prompts(*lengths, seed=seed), "labels": prompts(5, 5, seed=seed + 5)["input_ids"]})
    settings = {"target_modules": target_modules, "positions": "f1", "task_type": "SEQ_2_SEQ_LM"}
    plain = gradients("bart", None, batches, **settings)
    recomputed = gradients("bart", {"use_reentrant": use_reentrant}, batches, **settings)
    assert plain.keys() == recomputed.keys() and len(plain) >= 6
    for key in plain:
        torch.testing.assert_close(recomputed[key], plain[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("around", ["block", "edit"])
@pytest.mark.parametrize("target_modules", [None, ["mlp"]])
@pytest.mark.parametrize("reentrant", [True, False])
def test_torchs_checkpoint_wrapper(around, target_modules, reentrant):
    """As accelerate's FSDP option checkpoints blocks: inside the edit or, with another policy, outside."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        apply_activation_checkpointing,
        checkpoint_wrapper,
    )

    def wrap(base: torch.nn.Module) -> None:
        base.enable_input_require_grads()
        base.config.use_cache = False  # else the recompute would fill the cache a second time
        chosen = [
            layer.get_base_layer() if around == "block" and target_modules is None else layer
            for layer in base.model.layers
        ]
        apply_activation_checkpointing(
            base,
            checkpoint_wrapper_fn=lambda m: checkpoint_wrapper(
                m, checkpoint_impl=CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
            ),
            check_fn=lambda m: any(m is one for one in chosen),
        )
        wrappers = [module for module in base.modules() if "checkpoint_fn" in module.__dict__]
        assert len(wrappers) == 3

    batches = [labelled(9, 6, prompt=4, seed=1), labelled(12, 7, prompt=2, seed=2)]
    plain = gradients("llama", None, batches, target_modules=target_modules)
    recomputed = gradients("llama", wrap, batches, target_modules=target_modules)
    assert plain.keys() == {key.replace("_checkpoint_wrapped_module.", "") for key in recomputed}
    for key, gradient in recomputed.items():
        expected = plain[key.replace("_checkpoint_wrapped_module.", "")]
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["autocast", "base"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_16_bits(dtype, how, checkpointing):
    """Autocast and 16-bit bases: gradients in float32 that point where those of full precision do."""
    batches = [labelled(9, 6, prompt=4, seed=1), labelled(12, 7, prompt=2, seed=2)]
    plain = gradients("llama", None, batches)
    half = gradients(
        "llama",
        checkpointing,
        batches,
        autocast=dtype if how == "autocast" else None,
        dtype=dtype if how == "base" else None,
    )
    assert plain.keys() == half.keys()
    for key, expected in plain.items():
        assert half[key].dtype == torch.float32
        assert F.cosine_similarity(half[key].flatten(), expected.flatten(), dim=0) > 0.98, key


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}], ids=str)
def test_accumulated_gradients_are_those_of_one_backward(checkpointing):
    batches = [labelled(9, 6, prompt=4, seed=1), labelled(12, 7, prompt=2, seed=2), labelled(7, 8, prompt=3, seed=3)]
    at_once = gradients("llama", checkpointing, batches)
    accumulated = gradients("llama", checkpointing, batches, accumulate=True)
    for key in at_once:
        torch.testing.assert_close(accumulated[key], at_once[key], rtol=1e-4, atol=1e-5)


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
