"""The strength of an edit, h + s · (edit(h) − h): 0 is the base model and 1 the adapter, to the bit."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from models import build, labelled, prompts, randomize, weight
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from peft_reft import ReftConfig, ReftLayer, rescale_adapter_scale
from peft_reft.conversion import export_pyreft
from peft_reft.tuner.config import own_fields
from peft_reft.tuner.interventions.formulas import INTERVENTIONS


BATCH = prompts(9, 4)
GENERATE = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
MANY = [("llama", torch.float32), ("gpt2", torch.float32), ("bert", torch.float32), ("llama", torch.bfloat16)]


def adapted(architecture: str = "llama", dtype: torch.dtype = torch.float32, **settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l3", "init_weights": "pyreft", **settings}
    model = get_peft_model(build(architecture).to(dtype), ReftConfig(**settings))
    randomize(model)
    return model.eval()


def layers_of(model: nn.Module) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


@torch.no_grad()
def states(model: nn.Module, batch: dict = BATCH) -> torch.Tensor:
    """The hidden states of all layers, and the output."""
    output = model(**batch, output_hidden_states=True)
    return torch.cat([state.flatten() for state in (*output.hidden_states, output.logits)])


@pytest.mark.parametrize("architecture, dtype", MANY)
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_0_is_the_base_and_1_the_adapter_to_the_bit(architecture, dtype, intervention):
    base = states(build(architecture).to(dtype))
    model = adapted(architecture, dtype, intervention=intervention)
    edited = states(model)
    assert not torch.allclose(edited, base, atol=1e-2)
    model.set_scale("default", 0)
    assert torch.equal(states(model), base)
    model.set_scale("default", 1)
    assert torch.equal(states(model), edited)


KINDS = [
    (name, settings) for name in INTERVENTIONS for settings in ({}, {"positions": "all"}, {"share_weights": True})
]
KINDS += [(name, {"act_fn": "gelu"}) for name, edit in INTERVENTIONS.items() if edit.has_source]


@pytest.mark.parametrize("intervention, settings", KINDS, ids=str)
def test_a_strength_is_a_factor_of_what_the_edit_adds(intervention, settings):
    # One layer is edited, so that its input is the same whatever the strength.
    model = adapted(intervention=intervention, layers_to_transform=[1], **settings)

    @torch.no_grad()
    def state(scale: float) -> torch.Tensor:
        model.set_scale("default", scale)
        return model(**BATCH, output_hidden_states=True).hidden_states[2]

    base, edited = state(0), state(1)
    for scale in (0.5, 1.75, -1.0):
        torch.testing.assert_close(state(scale), base + scale * (edited - base), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def folded(model: PeftModel, adapter: str, scale: float) -> None:
    """Give an adapter of loreft weights that edit as `scale` times what they did: W becomes R + s(W − R), b s·b."""
    for layer in layers_of(model):
        R, W, b = (weight(layer, letter, adapter) for letter in "RWb")
        W.copy_(R + scale * (W - R))
        b.mul_(scale)


@torch.no_grad()
def test_generate_and_mixed_batches():
    """Each example is generated with the strength of its own adapter."""
    models = []
    for _ in range(2):
        model = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l3"), adapter_name="one")
        model.add_adapter("two", ReftConfig(r=2, positions="l2"))
        randomize(model)
        models.append(model.eval())
    scaled, other = models
    batch, names = prompts(9, 4, 7, 6, side="left"), ["one", "__base__", "two", "one"]
    unscaled = scaled.generate(**batch, **GENERATE, adapter_names=names)
    strengths = {"one": 0.6, "two": 1.5}
    for name, strength in strengths.items():
        scaled.set_scale(name, strength)
        folded(other, name, strength)
    for options in ({"adapter_names": names}, {}):
        assert torch.equal(
            scaled.generate(**batch, **GENERATE, **options), other.generate(**batch, **GENERATE, **options)
        )
    assert not torch.equal(scaled.generate(**batch, **GENERATE, adapter_names=names), unscaled)

    scaled.set_scale("one", 0)
    base = build("llama").generate(**batch, **GENERATE)
    assert torch.equal(scaled.generate(**batch, **GENERATE), base)
    mixed = scaled.generate(**batch, **GENERATE, adapter_names=names)
    assert torch.equal(mixed[[0, 1, 3]], base[[0, 1, 3]]) and not torch.equal(mixed[2], base[2])


def double_one_entry(model: PeftModel) -> None:
    layers_of(model)[1].scaling["default"] = 2.0


def replace_the_dict(model: PeftModel) -> None:
    """As PEFT's rescale_adapter_scale does with LoRA's layers."""
    for layer in layers_of(model):
        layer.scaling = dict.fromkeys(layer.scaling, 2.0)


def scale_one_layer(model: PeftModel) -> None:
    layers_of(model)[2].set_scale("default", 0)


WAYS: dict[str, Callable[[PeftModel], None]] = {
    "set_scale": lambda model: model.set_scale("default", 0.5),
    "one layer": scale_one_layer,
    "scale_layer": lambda model: [layer.scale_layer(0.5) for layer in layers_of(model)],
    "an entry": double_one_entry,
    "the dict": replace_the_dict,
}


@torch.no_grad()
@pytest.mark.parametrize("change", WAYS.values(), ids=WAYS.keys())
def test_a_change_is_seen_by_the_next_forward(change):
    told, untold = adapted(), adapted()
    before = untold(**BATCH).logits
    assert untold.base_model._context.state.in_use is not None  # what the layers answered is remembered
    change(told)
    change(untold)
    after = untold(**BATCH).logits
    assert not torch.allclose(after, before, atol=1e-4)
    assert torch.equal(after, told(**BATCH).logits)  # `told` has run no forward before, so it remembers nothing
    for layer in layers_of(untold):
        layer.unscale_layer()
    assert torch.equal(untold(**BATCH).logits, before)


def test_it_comes_back_from_0():
    """At 0 an adapter is not among the adapters in use, and is missed when its strength changes."""
    model = adapted()
    edited = states(model)
    model.set_scale("default", 0)
    states(model)
    for layer in layers_of(model):
        layer.scaling["default"] = 1.0
    assert torch.equal(states(model), edited)


def test_rescale_adapter_scale_is_undone_at_its_end():
    model = adapted()
    base, edited = states(build("llama")), states(model)
    with rescale_adapter_scale(model, 0):
        assert torch.equal(states(model), base)
    assert torch.equal(states(model), edited)
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(model, 2):
        assert torch.equal(states(model), edited)
    with pytest.raises(KeyError), rescale_adapter_scale(model, 0.5):
        assert not torch.allclose(states(model), edited)
        raise KeyError
    assert torch.equal(states(model), edited)


def test_rescale_adapter_scale_reaches_lora_beside_reft():
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(build("llama"), lora, adapter_name="lora")
    model = get_peft_model(model, ReftConfig(r=4, positions="f2+l3"), adapter_name="reft")
    randomize(model)
    model.eval()
    base, edited = states(build("llama")), states(model)
    with rescale_adapter_scale(model, 0):
        assert torch.equal(states(model), base)
    assert torch.equal(states(model), edited)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    merged = states(model)
    with pytest.raises(ValueError, match="lora: LoRA adapters that are merged have their strength in the weights"):
        rescale_adapter_scale(model, 0).__enter__()
    with rescale_adapter_scale(model, 1):
        assert torch.equal(states(model), merged)


def test_methods_of_lora_layers():
    model = adapted(scale=0.5)
    layer = layers_of(model)[0]
    layer.scale_layer(3)
    assert layer.scaling == {"default": 1.5}
    layer.unscale_layer(2)
    assert layer.scaling == {"default": 0.75}
    layer.unscale_layer()
    assert layer.scaling == {"default": 0.5}
    layer.set_scale("default", 4)  # times the strength in the config, as LoRA's is times lora_alpha / r
    assert layer.scaling == {"default": 2.0}
    layer.set_scale("unknown", 3)
    assert layer.scaling == {"default": 2.0}
    model.delete_adapter("default")
    assert layer.scaling == {}


def test_merging_folds_the_strength_in():
    model = adapted(positions="all", target_modules=["down_proj"])
    base, edited = states(model.get_base_model()), states(model)
    model.set_scale("default", 0.5)
    half = states(model)
    assert not torch.allclose(half, edited, atol=1e-2) and not torch.allclose(half, base, atol=1e-2)
    with rescale_adapter_scale(model, 1):
        model.merge_adapter()
        torch.testing.assert_close(states(model), half, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="merged into .* with the strength 0.5, which can't change there"):
        model.set_scale("default", 1)
    model.unmerge_adapter()
    model.set_scale("default", 1)
    torch.testing.assert_close(states(model), edited, rtol=1e-4, atol=1e-4)


def test_a_merge_inside_the_context_is_taken_back_outside():
    model = adapted(positions="all", target_modules=["down_proj"])
    edited = states(model)
    with rescale_adapter_scale(model, 0.5):
        half = states(model)
        model.merge_adapter()
    torch.testing.assert_close(states(model), half, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(states(model), edited, rtol=1e-4, atol=1e-4)


def test_it_is_saved_only_when_the_config_has_it(tmp_path):
    model = adapted()
    edited = states(model)
    model.set_scale("default", 0.5)
    half = states(model)
    model.save_pretrained(tmp_path / "plain")
    saved = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert "scale" not in saved and "reft_format" not in saved
    assert torch.equal(states(PeftModel.from_pretrained(build("llama"), tmp_path / "plain")), edited)

    model.peft_config["default"].scale = 0.5
    model.save_pretrained(tmp_path / "half")
    saved = json.loads((tmp_path / "half" / "adapter_config.json").read_text())
    assert saved["scale"] == 0.5 and saved["reft_format"] == 1  # versions that don't know the field refuse it
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "half")
    assert torch.equal(states(loaded), half)
    assert PeftConfig.from_pretrained(tmp_path / "half").scale == 0.5
    with pytest.raises(ValueError, match="scale=0.5 of .* has no place in a checkpoint of pyreft"):
        export_pyreft(tmp_path / "half", tmp_path / "out", base_model="none")


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "not reentrant"])
def test_training_at_another_strength(checkpointing):
    """Gradients at s are those of the folded adapter, by the chain rule: dL/db = s · dL/d(s·b)."""
    batch = labelled(9, 7, prompt=4, seed=1)

    def gradients(scale: float, fold: float) -> list[torch.Tensor]:
        config = ReftConfig(r=4, positions="f2+l3", scale=scale, task_type="CAUSAL_LM")
        model = get_peft_model(build("llama"), config).train()
        randomize(model)
        folded(model, "default", fold)
        if checkpointing is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model(**batch).loss.backward()
        return [weight(layer, letter).grad for layer in layers_of(model) for letter in "Wb"]

    for scaled, plain in zip(gradients(0.5, 1.0), gradients(1.0, 0.5)):
        torch.testing.assert_close(scaled, 0.5 * plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["all layers", "one layer", "after a forward in evaluation"])
def test_training_at_strength_0_has_gradients_of_0(mode):
    """As LoRA at a scaling of 0: the loss is the base's, and each weight has a gradient, which DDP waits for."""
    batch = labelled(9, 7, prompt=4, seed=1)
    model = adapted(task_type="CAUSAL_LM")
    layers = layers_of(model)[: 1 if mode == "one layer" else None]
    for layer in layers:
        layer.set_scale("default", 0)
    if mode == "after a forward in evaluation":
        states(model)
        for module in model.modules():
            module.training = True
    else:
        model.train()
    loss = model(**batch).loss
    loss.backward()
    if mode != "one layer":
        assert loss.item() == build("llama").train()(**batch).loss.item()
    gradients = [weight(layer, letter).grad for layer in layers for letter in "RWb"]
    assert gradients and all(gradient is not None and not gradient.any() for gradient in gradients)


def test_compiled_models_see_a_change():
    torch.compiler.reset()
    model, plain = adapted(), adapted()
    compiled = torch.compile(model, backend="aot_eager")
    for scale in (1, 0.5, 0, 2):
        model.set_scale("default", scale)
        plain.set_scale("default", scale)
        torch.testing.assert_close(states(compiled), states(plain), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize(
    "scale, error",
    [("1", TypeError), (None, TypeError), (True, TypeError), (float("nan"), ValueError), (10**400, TypeError)],
)
def test_what_is_no_strength_is_refused(scale, error):
    model = adapted()
    for call in (
        lambda: model.set_scale("default", scale),
        lambda: layers_of(model)[0].scale_layer(scale),
        lambda: rescale_adapter_scale(model, scale).__enter__(),
    ):
        with pytest.raises(error, match="is no strength of an edit"):
            call()
    with pytest.raises(ValueError, match="scale=.* is not allowed in ReftConfig. Allowed: a finite number"):
        ReftConfig(scale=scale)


def test_what_can_not_be_scaled_is_refused():
    model = adapted()
    with pytest.raises(ValueError, match="There is no ReFT adapter 'other' to scale. Loaded are: default"):
        model.set_scale("other", 0.5)
    with pytest.raises(ValueError, match="scale=0 can't be divided by"):
        layers_of(model)[0].unscale_layer(0)
    with (
        pytest.raises(ValueError, match="LlamaForCausalLM has no ReFT adapter"),
        rescale_adapter_scale(build("llama"), 2),
    ):
        pass


def test_the_field_is_described():
    assert "strength" in own_fields()["scale"].metadata["help"]
