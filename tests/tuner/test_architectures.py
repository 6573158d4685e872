"""ReFT on every architecture: blocks are found by structure, so no test names a module."""

from __future__ import annotations

import pytest
import torch
from models import DECODERS, ENCODERS, build, prompts, randomize
from peft import get_peft_model

from peft_reft import ReftConfig, ReftLayer


def blocks(model: torch.nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ReftLayer)]


def edited_inputs(model: torch.nn.Module, batch: dict) -> list[torch.Tensor]:
    return model(**batch, output_hidden_states=True).hidden_states


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_blocks_are_found_and_the_chosen_tokens_edited(name):
    base, batch = build(name), prompts(9, 4)
    with torch.no_grad():
        before = base(**batch, output_hidden_states=True)
        model = get_peft_model(base, ReftConfig(r=4, positions="f2+l1"))
        assert len(blocks(base)) == 3
        start = model(**batch, output_hidden_states=True)
        assert torch.equal(start.logits, before.logits)
        randomize(model)
        after = model(**batch, output_hidden_states=True)
    assert (after.logits - before.logits).abs().max() > 1e-2
    # output_hidden_states shows the edit, at the tokens that f2+l1 names and no other (layer 1 is fed the same input)
    assert len(after.hidden_states) == 4
    changed = (after.hidden_states[1] - before.hidden_states[1]).abs().amax(dim=-1) > 1e-4
    assert changed[0].nonzero().flatten().tolist() == [0, 1, 8]
    assert changed[1, :4].nonzero().flatten().tolist() == [0, 1, 3]
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, before.logits)


@pytest.mark.parametrize("name", DECODERS)
def test_training_reaches_every_adapter_weight_and_no_other(name):
    base, batch = build(name), prompts(9, 6)
    model = get_peft_model(base, ReftConfig(r=4, positions="f2+l1", task_type="CAUSAL_LM")).train()
    randomize(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    model(**batch, labels=labels).loss.backward()
    for parameter_name, parameter in model.named_parameters():
        if ".reft_" in parameter_name:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
        else:
            assert parameter.grad is None and not parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_train_with_a_head(name):
    base, batch = build(name), prompts(9, 6)
    heads = [key for key, _ in base.named_children() if "classifier" in key]
    config = ReftConfig(r=4, positions="f2+l1", task_type="SEQ_CLS", modules_to_save=heads)
    model = get_peft_model(base, config).train()
    randomize(model)
    model(**batch, labels=torch.tensor([0, 2])).loss.backward()
    trained = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert any("modules_to_save" in key for key in trained)
    assert sum(".reft_R." in key for key in trained) == 3


def test_layers_to_transform():
    base = build("llama")
    get_peft_model(base, ReftConfig(r=4, layers_to_transform=[0, 2]))
    assert blocks(base) == ["model.layers.0", "model.layers.2"]
    base = build("llama")
    get_peft_model(base, ReftConfig(r=4, layers_to_transform=1, target_modules=["mlp", "self_attn"]))
    assert blocks(base) == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    base = build("llama")
    get_peft_model(base, ReftConfig(r=4, exclude_modules=["layers.1"]))
    assert blocks(base) == ["model.layers.0", "model.layers.2"]


@pytest.mark.parametrize(
    "target_modules",
    [
        ["mlp"],
        ["self_attn"],
        ["down_proj"],
        r"model\.layers\.[02]\.(mlp|self_attn\.o_proj)",
        ["post_attention_layernorm"],
    ],
)
@pytest.mark.parametrize("positions", ["f2+l1", "all"])
def test_target_modules(target_modules, positions):
    base, batch = build("llama"), prompts(9, 4)
    plain = base(**batch).logits
    model = get_peft_model(base, ReftConfig(r=4, positions=positions, target_modules=target_modules))
    assert torch.equal(model(**batch).logits, plain)
    randomize(model)
    assert (model(**batch).logits - plain).abs().max() > 1e-2


def test_attributes_of_a_block_are_still_found():
    base = build("gemma2")
    kinds = [layer.attention_type for layer in base.model.layers if hasattr(layer, "attention_type")]
    get_peft_model(base, ReftConfig(r=4))
    assert [layer.attention_type for layer in base.model.layers if hasattr(layer, "attention_type")] == kinds
    assert base.model.layers[0].self_attn is base.model.layers[0].base_layer.self_attn
    assert not hasattr(base.model.layers[0], "no_such_attribute")


def test_any_module_outside_transformers():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 10))
            self.out = torch.nn.Linear(10, 2)

        def forward(self, x):
            return self.out(self.inner(x))

    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 10)
    plain = net(x)
    model = get_peft_model(net, ReftConfig(r=4, positions="all", target_modules=["inner"]))
    assert torch.equal(model(x), plain)
    randomize(model)
    assert (model(x) - plain).abs().max() > 1e-2
    model(x).sum().backward()
    net = Net()
    model = get_peft_model(net, ReftConfig(r=4, positions="f1", target_modules=["inner"]))
    with pytest.raises(ValueError, match="positions='f1' counts tokens.*positions='all'"):
        model(x)
