"""Quantized bases of every kind that runs on a CPU, on a tiny Llama: train, save, load, generate, and edit the layers
themselves."""

from __future__ import annotations

import peft
import pytest
import torch
from models import labelled
from packaging.version import Version
from peft import PeftModel, get_peft_model
from quantized import BASES, plain
from torch import nn

from peft_reft import ReftConfig


PROMPT = 8
BATCH = labelled(12, 12, prompt=PROMPT, seed=1)
# This kind rounds activations, which passes no gradient: an edit learns through the residual stream only.
ROUNDED_ACTIVATIONS = {"compressed-tensors fp8"}
EDITED = {"blocks": {"positions": "f2+l2"}, "down_proj": {"positions": "all", "target_modules": ["down_proj"]}}


def logits(model: nn.Module, **batch) -> torch.Tensor:
    with torch.no_grad():
        return model(**(batch or BATCH)).logits


def names(module: nn.Module) -> set[str]:
    """Names of the classes of a layer and of its weight."""
    return {kind.__name__ for kind in (*type(module).__mro__, *type(getattr(module, "weight", None)).__mro__)}


@pytest.mark.parametrize("edited", EDITED)
@pytest.mark.parametrize("kind", BASES)
def test_train_save_load_and_generate(kind, edited, tmp_path):
    load, quantized = BASES[kind]
    base = load(tmp_path / "base")
    assert "unpacked" in quantized or quantized in names(base.model.layers[0].mlp.down_proj)
    assert all(p.device.type == "cpu" for p in base.parameters())
    before = logits(base)
    whole = logits(plain())
    assert not torch.equal(before, whole)
    assert (before - whole).norm() < 0.5 * whole.norm()  # close to the model before quantization

    torch.manual_seed(0)
    config = ReftConfig(r=4, task_type="CAUSAL_LM", **EDITED[edited])
    model = get_peft_model(base, config)
    assert torch.equal(logits(model), before)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(10):
        loss = model(**BATCH).loss
        loss.backward()
        losses.append(loss.item())
        gradients = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert gradients == {name for name, _ in model.named_parameters() if ".reft_" in name}
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < (0.9 if kind in ROUNDED_ACTIVATIONS else 0.5) * losses[0]

    model.eval()
    prompt = BATCH["input_ids"][:, :PROMPT]
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    told = {"prompt_lengths": torch.tensor([PROMPT, PROMPT])}
    forced = logits(model, input_ids=out.sequences, attention_mask=torch.ones_like(out.sequences), **told)
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced[:, PROMPT - 1 : -1], rtol=0, atol=1e-4)

    trained = logits(model)
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "adapter")
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(
            load(tmp_path / "base"), tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.equal(logits(loaded), trained)
    assert torch.equal(logits(loaded.unload()), before)


# How far the largest weight of a group is from the next number of the kind, as a part of it. Others can't be merged
# into.
STEPS = {
    "torchao int8": 1 / 127,
    "torchao int4": 1 / 7,
    "torchao float8": 1 / 16,
    "hqq 8 bit": 2 / 255,
    "hqq 4 bit": 2 / 15,
}
MERGED_AS_ORDINARY = {"fp8"}  # which transformers unpacks while it loads


@pytest.mark.parametrize("kind", BASES)
def test_merge(kind, tmp_path):
    model = get_peft_model(
        BASES[kind][0](tmp_path / "base"),
        ReftConfig(r=4, positions="all", target_modules=["down_proj"], add_bias=False, init_weights="pyreft"),
    ).eval()
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    unpacked_by_peft = layer.quantization_backend is not None and kind in STEPS
    assert unpacked_by_peft == (kind in STEPS) or Version(peft.__version__) < Version(
        "0.21"
    )  # PEFT 0.20 unpacks only int8 of torchao
    if not unpacked_by_peft and kind not in MERGED_AS_ORDINARY:
        logits(model)
        before, modules = logits(model), [type(module) for module in model.modules()]
        with pytest.raises(NotImplementedError, match=r"can't be merged: .*'model\.layers\.0\.mlp\.down_proj'"):
            model.merge_adapter()
        assert torch.equal(logits(model), before) and [type(module) for module in model.modules()] == modules
        return
    R, W, _ = (None if weight is None else weight[0].detach() for weight in layer.weights("default"))
    before = layer.get_base_weight().detach().clone().float()
    exact = before + R.mT @ (W - R) @ before
    quantized = names(layer.base_layer)
    model.merge_adapter()
    assert names(layer.base_layer) == quantized
    merged = layer.get_base_weight().detach().float()
    step = STEPS.get(kind, 1e-6)
    assert (merged - exact).abs().max() <= step * exact.abs().max()
    assert (merged - exact).norm() < 0.5 * (exact - before).norm()
    # The layer computes with it.
    x = torch.randn(2, 5, before.shape[1])
    torch.testing.assert_close(layer(x), x @ merged.mT, rtol=1e-3, atol=1e-3)
