"""torch.compile: the gradients and tokens of the plain model, and no compilation for each new batch."""

from __future__ import annotations

import inspect

import pytest
import torch
from models import build, labelled, prompts, randomize
from peft import PeftModel, get_peft_model
from torch._dynamo.utils import counters

from peft_reft import ReftConfig


REASONED = "reason" in inspect.signature(torch.compiler.disable).parameters  # from torch 2.8 on
BACKEND = "aot_eager"  # traces as the default backend does, and leaves out the compiler


def adapted(**settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build("llama"), ReftConfig(**settings))
    randomize(model)
    return model


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def packed(*lengths: int, seed: int) -> dict:
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = prompts(sum(lengths), seed=seed)["input_ids"]
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(positions < 2, -100),
        "position_ids": positions,
        "use_cache": False,
    }


BATCHES = {
    "padded": [
        labelled(9, 6, prompt=4, seed=1),
        labelled(9, 7, prompt=2, seed=2),  # other lengths, same width
        labelled(11, 8, prompt=3, seed=3),  # another width: sizes become symbols
        labelled(13, 4, prompt=4, seed=4),
        labelled(17, 5, prompt=5, seed=5),
    ],
    "packed": [
        packed(9, 6, 5, seed=1),
        packed(7, 6, 7, seed=2),
        packed(8, 9, 5, 6, seed=3),
        packed(4, 5, 6, 7, 8, seed=4),
        packed(6, 6, 7, 5, 4, 8, 7, 9, 5, seed=5),
    ],
}


@pytest.mark.parametrize(
    "settings",
    [{}, {"share_weights": True, "intervention": "nodireft"}, {"target_modules": ["mlp"]}, {"positions": "all"}],
    ids=str,
)
@pytest.mark.parametrize("kind", BATCHES)
def test_training(kind, settings):
    plain, model = adapted(**settings).train(), adapted(**settings).train()
    compiled = torch.compile(model, backend=BACKEND)
    so_far = []
    for batch in BATCHES[kind] * 2:
        losses = []
        for run in (plain, compiled):
            run.zero_grad()
            losses.append(run(**batch).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses)
        for (name, expected), parameter in zip(plain.named_parameters(), model.parameters()):
            if expected.grad is not None:
                torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-4, atol=1e-5, msg=name)
        so_far.append(graphs())
    assert so_far[0] == 1, "the model is one graph"
    # Of one group of weights, batches in which every slot holds a token are a kind of their own.
    kinds = 2 if settings.get("share_weights") and kind == "padded" else 1
    assert so_far[-1] <= kinds + 2 and so_far[-1] == so_far[len(BATCHES[kind]) - 1], (
        "batches are not compiled for again"
    )
    if kinds == 1:
        assert so_far[-1] == so_far[-2], "new batches are not compiled for"


def test_packed_rows_with_static_shapes():
    """Even there, rows of one width with any number of sequences need few graphs: one for each power of two."""
    compiled = torch.compile(adapted().train(), backend=BACKEND, dynamic=False)
    so_far = []
    for lengths in ([8, 8, 8], [6, 6, 6, 6], [9, 4, 5, 6], [4] * 6, [6, 4, 4, 5, 5], [3, 4, 3, 3, 3, 4, 4]):
        compiled(**packed(*lengths, seed=1)).loss.backward()
        so_far.append(graphs())
    assert so_far == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(cache):
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "cache_implementation": cache}
    model = adapted().eval()
    batches = [prompts(9, 4, side="left", seed=seed) for seed in (1, 2, 3)]
    expected = [model.generate(**batch, **options) for batch in batches]
    model.get_base_model().compile(backend=BACKEND)
    so_far = []
    for batch, tokens in zip(batches, expected):
        assert torch.equal(model.generate(**batch, **options), tokens)
        so_far.append(graphs())
    assert so_far[0] > 0 and so_far[-1] == so_far[0], "a new prompt is not compiled for"


def test_changed_weights_and_adapters_are_seen():
    """The hooks run outside the graph, at every call: they retract R, and switch adapters."""
    model = adapted().eval()
    compiled = torch.compile(model, backend=BACKEND)
    batch = prompts(9, 6)
    with torch.no_grad():
        before = compiled(**batch).logits
        for name, parameter in model.named_parameters():
            if ".reft_R." in name:
                parameter.mul_(2)  # off the manifold, as an optimizer leaves it
        torch.testing.assert_close(compiled(**batch).logits, before, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            torch.testing.assert_close(compiled(**batch).logits, build("llama")(**batch).logits)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_export_is_refused_with_a_way_out(positions, strict):
    model = adapted(positions=positions).eval()
    batch = {"input_ids": prompts(9)["input_ids"], "use_cache": False}
    way_out = "merge_and_unload" if not strict or REASONED else "torch.compiler.disable"
    with pytest.raises((NotImplementedError, torch._dynamo.exc.Unsupported), match=way_out):
        torch.export.export(model, (), batch, strict=strict)
    expected = adapted(positions=positions).eval()(**batch).logits
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)  # nothing is left behind


def test_a_merged_model_is_exported():
    model = adapted(positions="all", target_modules=["down_proj", "o_proj"]).eval()
    batch = {"input_ids": prompts(9)["input_ids"], "use_cache": False}
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        exported = torch.export.export(merged, (), batch)
        torch.testing.assert_close(exported.module()(**batch).logits, expected, rtol=1e-4, atol=1e-4)
