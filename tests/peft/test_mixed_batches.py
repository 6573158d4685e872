"""`adapter_names`: an adapter for each example of one batch gives each example what its adapter alone gives it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from models import build, prompts, randomize
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reft import ReftConfig


NAMES = ["one", "__base__", "two", "all", "one", "two"]
BATCH = prompts(9, 4, 7, 6, 3, 8)
ADAPTERS = {
    "one": {"r": 4, "positions": "f2+l2"},
    "two": {"r": 2, "positions": "l3", "intervention": "nodireft", "layers_to_transform": [1]},
    "all": {"r": 3, "positions": "all", "layers_to_transform": [0, 1]},
}


def adapted(architecture: str, **settings) -> PeftModel:
    base = build(architecture)
    model = None
    for name, adapter in ADAPTERS.items():
        config = ReftConfig(**adapter, **settings)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    randomize(model)
    return model.eval()


def by_adapter(model: PeftModel, run) -> list[torch.Tensor]:
    """Each example's output when the whole batch runs with that example's adapter."""
    results = {}
    for name in dict.fromkeys(NAMES):
        if name != "__base__":
            model.base_model.set_adapter(name)
        with model.disable_adapter() if name == "__base__" else nullcontext():
            results[name] = run()
    return [results[name][row] for row, name in enumerate(NAMES)]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "bert"])
def test_forward(architecture):
    model = adapted(architecture)
    alone = by_adapter(model, lambda: model(**BATCH)[0])
    model.base_model.set_adapter("two")
    all_two = model(**BATCH)[0]
    mixed = model(**BATCH, adapter_names=NAMES)[0]
    assert torch.equal(model(**BATCH)[0], all_two)  # the adapters of a call are forgotten after the call
    differing = 0
    for row, length in enumerate(BATCH["attention_mask"].sum(dim=1)):
        torch.testing.assert_close(mixed[row, :length], alone[row][:length], rtol=1e-5, atol=1e-5)
        differing += not torch.allclose(mixed[row, :length], alone[1 if row != 1 else 0][:length])
    assert differing


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_generate(architecture, beams):
    settings = {"target_modules": r"encoder\.block\.\d+"} if architecture == "t5" else {}
    model = adapted(architecture, **settings)
    batch = prompts(9, 4, 7, 6, 3, 8, side="left")
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    alone = by_adapter(model, lambda: model.generate(**batch, **options))
    mixed = model.generate(**batch, **options, adapter_names=NAMES)
    assert mixed.tolist() == [row.tolist() for row in alone]
    plain = alone[1].tolist()
    assert any(row.tolist()[-5:] != plain[-5:] for row in alone)


@torch.no_grad()
def test_trained_heads_go_with_their_adapters():
    model = get_peft_model(build("llama"), ReftConfig(modules_to_save=["lm_head"]), adapter_name="one")
    model.add_adapter("two", ReftConfig(modules_to_save=["lm_head"]))
    heads = model.base_model.model.lm_head.modules_to_save
    heads["one"].weight.mul_(2)
    heads["two"].weight.mul_(3)
    model.eval()
    with model.disable_adapter():
        plain = model(**BATCH)[0]
    names = ["one", "two", "__base__", "one", "two", "__base__"]
    mixed = model(**BATCH, adapter_names=names)[0]
    for row, factor in enumerate([2, 3, 1, 2, 3, 1]):
        torch.testing.assert_close(mixed[row], plain[row] * factor)

    heads["one"].weight.copy_(heads["one"].weight.flip(0))
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False}
    batch = prompts(9, 4, 7, 6, 3, 8, side="left")
    generated = model.generate(**batch, **options, adapter_names=names)
    for name in ("one", "two"):
        model.set_adapter(name)
        alone = model.generate(**batch, **options)
        for row in (row for row, its in enumerate(names) if its == name):
            assert generated[row].tolist() == alone[row].tolist()


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lin(x)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(4, 8), (4, 3, 8)])
def test_models_without_tokens(shape):
    torch.manual_seed(0)
    model = get_peft_model(Network(), ReftConfig(positions="all", target_modules=["lin"]), adapter_name="one")
    model.add_adapter("two", ReftConfig(positions="all", target_modules=["lin"]))
    randomize(model)
    x = torch.randn(shape)
    model.eval()
    mixed = model(x, adapter_names=["two", "one", "__base__", "two"])
    expected = []
    for name in ("one", "two"):
        model.set_adapter(name)
        expected.append(model(x))
    with model.disable_adapter():
        expected.append(model(x))
    for row, which in enumerate([1, 0, 2, 1]):
        torch.testing.assert_close(mixed[row], expected[which][row])


def test_refusals():
    model = adapted("llama")
    with pytest.raises(ValueError, match=r"non-existing adapter\(s\): other\. Loaded are: all, one, two"):
        model(**BATCH, adapter_names=["other"] * 6)
    for names in (["one"] * 3, ["one"] * 7):
        message = f"same as the number of inputs, but got {len(names)} and 6 respectively"
        with pytest.raises(ValueError, match=message):
            model(**BATCH, adapter_names=names)
        with pytest.raises(ValueError, match=message):
            model.generate(**BATCH, adapter_names=names, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"when the model is in training mode"):
        model.train()(**BATCH, adapter_names=NAMES)
