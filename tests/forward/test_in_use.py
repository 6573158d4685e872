"""What is remembered of the layers from one forward to the next: every change that matters is seen in the next one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from models import build, prompts, randomize, weight
from peft import PeftModel, get_peft_model
from torch import nn

from peft_reft import ReftConfig
from peft_reft.tuner.layer import ReftLayer


def two_adapters(**settings) -> PeftModel:
    config = ReftConfig(r=4, positions="f2+l3", task_type="CAUSAL_LM", **settings)
    model = get_peft_model(build("llama"), config)
    model.add_adapter("other", config)
    randomize(model)
    return model.eval()


def layers_of(model: PeftModel) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def replace_parameter(model: PeftModel) -> None:
    layer = layers_of(model)[1]
    layer.reft_W["default"] = nn.Parameter(torch.randn_like(layer.reft_W["default"]))


def replace_the_dict(model: PeftModel) -> None:
    """As compressed-tensors does for modules that it offloads."""
    weights = layers_of(model)[1].reft_b
    weights._parameters = {name: nn.Parameter(torch.randn_like(b)) for name, b in weights._parameters.items()}


@torch.no_grad()
def write_to_a_bias(model: PeftModel) -> None:
    weight(layers_of(model)[2], "b").add_(1.0)


@torch.no_grad()
def write_to_a_basis(model: PeftModel) -> None:
    weight(layers_of(model)[0], "R").mul_(3.0)


def data_and_eval(model: PeftModel) -> None:
    weight(layers_of(model)[0], "W").data = torch.randn_like(weight(layers_of(model)[0], "W"))
    model.eval()


def cast_the_data(model: PeftModel) -> None:
    for layer in layers_of(model):
        for letter in "RWb":
            weight(layer, letter).data = weight(layer, letter).data.double()


def switch_off_one_layer(model: PeftModel) -> None:
    layers_of(model)[1].enable_adapters(False)


def delete(model: PeftModel) -> None:
    model.delete_adapter("default")


CHANGES: dict[str, Callable[[PeftModel], None]] = {
    "another adapter": lambda model: model.set_adapter("other"),
    "both adapters": lambda model: model.base_model.set_adapter(["default", "other"]),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "one layer switched off": switch_off_one_layer,
    "deleted": delete,
    "a replaced parameter": replace_parameter,
    "a replaced dict": replace_the_dict,
    "a write to b": write_to_a_bias,
    "a write to R": write_to_a_basis,
    "a write through data, then eval()": data_and_eval,
    "a cast of the data": cast_the_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_a_change_is_seen_by_the_next_forward(change: Callable[[PeftModel], None]) -> None:
    told, untold = two_adapters(), two_adapters()
    batch = prompts(7, 5)
    before = untold(**batch).logits
    assert untold.base_model._context.state.in_use is not None
    torch.testing.assert_close(untold(**batch).logits, before, rtol=0, atol=0)

    for model in (told, untold):
        torch.manual_seed(5)
        change(model)
    after = untold(**batch).logits
    assert not torch.allclose(after, before, atol=1e-6) or change in (cast_the_data, write_to_a_basis)
    # `told` has run no forward before its change, so it remembers nothing.
    torch.testing.assert_close(after, told(**batch).logits, rtol=0, atol=0)


@torch.no_grad()
def test_dropout_that_is_switched_on_alone_is_seen() -> None:
    model, batch = two_adapters(dropout=0.5), prompts(7, 5)
    before = model(**batch).logits
    for layer in layers_of(model):
        layer.reft_dropout.train()
    assert not torch.allclose(model(**batch).logits, before)
    for layer in layers_of(model):
        layer.reft_dropout["default"].p = 0.0
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)


@torch.no_grad()
def test_nothing_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = two_adapters(), prompts(7, 5)
    model(**batch)
    monkeypatch.setattr(ReftLayer, "adapters_in_use", lambda *_: pytest.fail("a layer was asked again"))
    model(**batch)
