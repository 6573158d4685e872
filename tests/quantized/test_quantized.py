"""Quantized bases, on the real SmolLM2-135M-Instruct: train, save, load, generate."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from peft_reft import ReftConfig


pytestmark = pytest.mark.slow

QUESTION = "What is the capital of France?"
ANSWER = "Aye, that be Paris, matey!"
STEPS = 12


def bnb(**settings):
    def load(smollm2: str, gguf: tuple[str, str]) -> torch.nn.Module:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(**settings)
        return AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=torch.float32)

    return load


def torchao(smollm2: str, gguf: tuple[str, str]) -> torch.nn.Module:
    quantization = pytest.importorskip("torchao.quantization")
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=torch.float32)


def quanto(smollm2: str, gguf: tuple[str, str]) -> torch.nn.Module:
    pytest.importorskip("optimum.quanto")
    config = QuantoConfig(weights="int8")
    return AutoModelForCausalLM.from_pretrained(smollm2, quantization_config=config, dtype=torch.float32)


def gguf(smollm2: str, gguf: tuple[str, str]) -> torch.nn.Module:
    """The file as transformers loads it: for a Llama it unpacks the blocks, and still marks the model as quantized."""
    return AutoModelForCausalLM.from_pretrained(gguf[0], gguf_file=gguf[1], dtype=torch.float32)


def packed_gguf(smollm2: str, gguf: tuple[str, str]) -> torch.nn.Module:
    """The file's own blocks in transformers' own packed layers.

    Two things are replaced: transformers 5.23 keeps blocks packed for the architectures Qwen
    3.5 and LFM2 alone, so the layers are put in by hand; and it takes its product of packed blocks with a few rows
    from the hub.
    """
    kernels = pytest.importorskip(
        "transformers.integrations.gguf.kernels",
        reason="this transformers has no packed GGUF: it unpacks while loading",
    )
    from gguf import GGUFReader
    from transformers.integrations.gguf.utils import GgufLinear

    class UnpackAndMultiply:
        def mul_mat_vec(self, weight, x, ggml_type, out_features):
            return x @ kernels.dequantize_blocks(weight, ggml_type, out_features, x.shape[-1], x.dtype).T

    kernels._gguf_kernel = UnpackAndMultiply()
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    blocks = {tensor.name: tensor for tensor in GGUFReader(f"{gguf[0]}/{gguf[1]}").tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj"}
    heads = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for name, ours in names.items():
            tensor = blocks[f"blk.{index}.{name}.weight"]
            packed = torch.tensor(tensor.data)
            if (
                name in heads
            ):  # llama.cpp interleaves the two halves of each rotary head; rows can be moved while packed
                packed = packed.view(heads[name], -1, 2, packed.shape[-1]).transpose(1, 2).reshape(packed.shape)
            linear = layer.get_submodule(ours)
            quantized = GgufLinear(linear.in_features, linear.out_features, int(tensor.tensor_type))
            quantized.weight.data = packed
            layer.set_submodule(ours, quantized)
    return model


BASES = {
    "nf4 with double quantization": (
        bnb(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        "Linear4bit",
    ),
    "8 bit": (bnb(load_in_8bit=True), "Linear8bitLt"),
    "torchao int8": (torchao, "TorchAOBaseTensor"),
    "quanto int8": (quanto, "QLinear"),
    "GGUF": (gguf, "Linear"),
    "packed GGUF": (packed_gguf, "GgufLinear"),
}


def names(module: torch.nn.Module) -> set[str]:
    """Names of the classes of a layer and of its weight."""
    return {kind.__name__ for kind in (type(module), *type(getattr(module, "weight", None)).__mro__)}


@pytest.mark.parametrize("kind", BASES)
def test_train_save_load_and_generate(kind, smollm2, smollm2_gguf, tmp_path):
    load, quantized_class = BASES[kind]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = load(smollm2, smollm2_gguf)
    quantized = [module for module in base.modules() if quantized_class in names(module)]
    assert len(quantized) == 30 * 7 + (quantized_class == "Linear")  # every linear layer of every block; lm_head stays

    if "GGUF" not in kind:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    torch.manual_seed(0)
    config = ReftConfig(r=4, positions="f2+l2", layers_to_transform=[8, 16, 24], task_type="CAUSAL_LM")
    chat = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt").input_ids
    answer = tokenizer(ANSWER + tokenizer.eos_token, return_tensors="pt").input_ids
    batch = {"input_ids": torch.cat([prompt, answer], dim=1)}
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : prompt.shape[1]] = -100

    # In evaluation mode bitsandbytes repacks 4-bit weights for CPUs with AVX512-BF16, and gives no gradient from then
    # on.
    base.train()
    with torch.no_grad():
        plain = base(**batch).logits
    assert plain.argmax(dim=-1)[0, prompt.shape[1] - 1] == tokenizer("The").input_ids[0]  # an answer, not noise
    model = get_peft_model(base, config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0] and math.isfinite(losses[-1])
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".reft_" not in name)

    model.eval()
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        trained = model(**batch).logits
    generated = model.generate(input_ids=prompt, **options)
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=prompt, **options), generated)
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(load(smollm2, smollm2_gguf), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, trained, rtol=0, atol=1e-4)
    assert torch.equal(loaded.generate(input_ids=prompt, **options), generated)
