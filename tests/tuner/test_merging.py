"""Merging edits of every token into linear layers: exact, and taken back; everything else is refused before it is
begun."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import GROUPED, build, prompts, randomize
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig, ReftLayer
from peft_reft.tuner.interventions.formulas import INTERVENTIONS


BATCH = prompts(9, 4)
LINEAR = {"llama": ["down_proj", "q_proj"], "gpt2": ["c_proj"]}  # no bias; transposed, with a bias


def adapted(architecture: str = "llama", base: torch.nn.Module | None = None, **settings) -> PeftModel:
    settings = {"r": 4, "positions": "all", "target_modules": LINEAR[architecture], **settings}
    model = get_peft_model(
        build(architecture) if base is None else base, ReftConfig(**settings, task_type="CAUSAL_LM")
    )
    randomize(model, scale=0.2)
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**BATCH).logits


@pytest.mark.parametrize("intervention", INTERVENTIONS)
@pytest.mark.parametrize("architecture", LINEAR)
def test_merged_model_gives_the_adapters_logits(architecture, intervention):
    plain = logits(build(architecture))
    model = adapted(architecture, intervention=intervention, init_weights="pyreft")
    edited = logits(model)
    assert not torch.allclose(edited, plain, atol=1e-2)

    names = list(model.state_dict())
    model.merge_adapter()
    assert all(layer.merged_adapters == ["default"] for layer in model.modules() if isinstance(layer, ReftLayer))
    torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert list(model.state_dict()) == names  # a bias that the merge has made is gone
    torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)

    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged) is type(build(architecture)) and not any(isinstance(m, ReftLayer) for m in merged.modules())
    assert not merged._forward_pre_hooks and "generate" not in merged.__dict__
    torch.testing.assert_close(logits(merged), edited, rtol=1e-4, atol=1e-4)


def test_switching_off_a_merged_adapter_unmerges_it():
    plain, model = logits(build("llama")), adapted()
    edited = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), edited, rtol=1e-4, atol=1e-4)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, ReftLayer))


def test_without_a_bias_the_layers_stay_without_one():
    model = adapted(add_bias=False)
    names = set(build("llama").state_dict())
    edited = logits(model)
    merged = model.merge_and_unload()
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(logits(merged), edited, rtol=1e-4, atol=1e-4)


def test_a_merged_bias_that_the_architecture_lacks_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"'model\.layers\.0\..*' had no bias, and has one now") as caught:
        merged = adapted().merge_and_unload()
    assert sum("had no bias" in str(warning.message) for warning in caught) == 1
    merged.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.allclose(logits(reloaded), logits(merged), atol=1e-3)  # what the warning is about


def test_merging_right_after_an_optimizer_step():
    model = adapted(init_weights="pyreft").train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**BATCH).logits.square().mean().backward()
    optimizer.step()
    model.eval()
    twin = copy.deepcopy(model)
    edited = logits(twin)  # whose forward has made R orthonormal again
    torch.testing.assert_close(logits(model.merge_and_unload()), edited, rtol=1e-4, atol=1e-4)


def test_several_adapters_are_merged_in_their_order():
    model = adapted()
    model.add_adapter("other", ReftConfig(r=2, positions="all", target_modules=["down_proj"], intervention="nodireft"))
    randomize(model, scale=0.3, seed=5)
    expected = {}
    for names in (["default", "other"], ["other", "default"]):
        model.base_model.set_adapter(names)
        expected[tuple(names)] = logits(model)
    first, second = expected.values()
    assert not torch.allclose(first, second, atol=1e-3)
    for names, edited in expected.items():
        twin = copy.deepcopy(model)
        twin.base_model.set_adapter(list(names))
        twin.merge_adapter()
        torch.testing.assert_close(logits(twin), edited, rtol=1e-4, atol=1e-4)
        twin.unmerge_adapter()
        torch.testing.assert_close(logits(twin), edited, rtol=1e-4, atol=1e-4)
        twin.base_model.set_adapter("default")
        merged = twin.merge_and_unload(adapter_names=list(names))
        torch.testing.assert_close(logits(merged), edited, rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_once():
    model = adapted(base=build("llama").bfloat16())
    weight = model.base_model.model.model.layers[0].mlp.down_proj.base_layer.weight
    before = weight.clone()
    model.merge_adapter()
    assert weight.dtype == torch.bfloat16
    model.unmerge_adapter()
    torch.testing.assert_close(weight, before, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_layers_are_merged_by_way_of_their_unpacked_weight(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the extra `bnb`")
    wide = LlamaConfig(**{**GROUPED, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 97})
    torch.manual_seed(0)
    LlamaForCausalLM(wide).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.float32)
    model = adapted(base=base, add_bias=False, target_modules=["down_proj"])
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    kind, before = type(layer.base_layer), layer.get_base_weight().float()
    R, W, _ = (None if weight is None else weight[0].detach() for weight in layer.weights("default"))
    exact = before + R.mT @ (W - R) @ before
    with pytest.warns(UserWarning, match=f"Merged weights are rounded to bnb {bits}bit again"):
        model.merge_adapter()
    merged = layer.get_base_weight().float()
    assert type(layer.base_layer) is kind
    # The widest gap of nf4 is 0.304 of the largest number of 64, a step of int8 is 1/127 of the largest of a row.
    if bits == 4:
        bound = exact.view(-1, 64).abs().amax(dim=1, keepdim=True) * 0.153
        assert ((merged - exact).view(-1, 64).abs() <= bound).all()
    else:
        assert ((merged - exact).abs() <= exact.abs().amax(dim=1, keepdim=True) / 127).all()
    assert (merged - exact).norm() < 0.3 * (exact - before).norm()
    assert type(model.merge_and_unload().model.layers[0].mlp.down_proj) is kind


def test_weights_that_bitsandbytes_has_packed_for_the_cpu_are_refused(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs the extra `bnb`")
    if not getattr(functional, "has_avx512bf16", lambda: False)():
        pytest.skip("bitsandbytes packs them on a CPU with AVX512-BF16 alone")
    wide = LlamaConfig(**{**GROUPED, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 97})
    LlamaForCausalLM(wide).save_pretrained(tmp_path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization, dtype=torch.bfloat16)
    model = adapted(base=base, target_modules=["down_proj"])
    before = logits(model)
    with pytest.raises(
        NotImplementedError, match="bitsandbytes has packed the weight of .* Merge right after loading"
    ):
        model.merge_adapter()
    assert torch.equal(logits(model), before)


REFUSED = {
    "it edits hidden states at chosen positions": {"positions": "f2+l2"},
    "act_fn='gelu' makes the edit nonlinear": {"act_fn": "gelu"},
    "it has subspaces": {"subspaces": {"a": 2, "b": 2}},
    r"'model\.layers\.0' is a LlamaDecoderLayer": {"target_modules": None},
    r"'model\.embed_tokens' is a Embedding": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("how", ["merge_and_unload", "merge_adapter"])
@pytest.mark.parametrize("reason", REFUSED)
def test_refusals_change_nothing(reason, how):
    model = adapted(**REFUSED[reason])
    before, modules = logits(model), [type(module) for module in model.modules()]
    with pytest.raises(NotImplementedError, match=rf"The adapter 'default' can't be merged: .*{reason}"):
        getattr(model, how)()
    assert torch.equal(logits(model), before) and [type(module) for module in model.modules()] == modules


def test_one_layer_that_cannot_be_merged_keeps_all_as_they_are():
    model = adapted(
        target_modules=["down_proj", "mlp"],
        layers_to_transform=[0, 1],
        exclude_modules=r".*\.0\.mlp|.*\.1\.mlp\.down_proj",
    )
    before = logits(model)
    with pytest.raises(NotImplementedError, match="is a LlamaMLP"):
        model.merge_adapter()
    assert torch.equal(logits(model), before) and not any(
        m.merged for m in model.modules() if isinstance(m, ReftLayer)
    )


def test_tied_weights_are_refused():
    base = build("llama")
    base.lm_head.weight = base.model.embed_tokens.weight
    model = adapted(base=base, target_modules=["lm_head"])
    with pytest.raises(NotImplementedError, match=r"Merging into 'lm_head' would change 'model\.embed_tokens' too"):
        model.merge_and_unload()


def test_lora_between_is_refused():
    base = get_peft_model(build("llama"), LoraConfig(target_modules=["down_proj"])).get_base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, ReftConfig(positions="all", target_modules=["down_proj"]), adapter_name="reft")
    with pytest.raises(NotImplementedError, match="there is another adapter between"):
        model.merge_adapter()


def test_unknown_names_and_broken_adapters():
    model = adapted()
    with pytest.raises(ValueError, match="There is no adapter 'other' to merge. Loaded are: default"):
        model.merge_adapter(adapter_names=["other"])
    with torch.no_grad():
        model.base_model.model.model.layers[2].mlp.down_proj.reft_b["default"][0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights.*'model\.layers\.2\.mlp\.down_proj'"):
        model.merge_adapter(safe_merge=True)
    assert not any(layer.merged for layer in model.modules() if isinstance(layer, ReftLayer))


def test_mixed_batches_of_merged_adapters_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"call `unmerge_adapter` first. Merged are: default"):
        model(**BATCH, adapter_names=["default", "__base__"])
