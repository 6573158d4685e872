"""Quantized bases, on the real SmolLM2-135M-Instruct: train, save, load, generate."""

from __future__ import annotations

import math

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

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


def packed_gguf(smollm2: str, gguf: tuple[str, str]) -> torch.nn.Module:
    kernels = pytest.importorskip(
        "transformers.integrations.gguf.kernels",
        reason="this transformers has no packed GGUF: it dequantizes on loading",
    )
    folder, file = gguf

    class UnpackAndMultiply:
        """The one thing that has to stand in: transformers takes its matrix-vector product for packed blocks from the hub.
        The blocks, the layers and everything else are transformers' own."""

        def supports(self, ggml_type: int) -> bool:
            return True

        def mul_mat_vec(self, weight, x, ggml_type, out_features):
            return x @ kernels.dequantize_blocks(weight, ggml_type, out_features, x.shape[-1], x.dtype).T

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_gguf_kernel", UnpackAndMultiply())
        patch.setattr("transformers.integrations.gguf.kernels.is_kernels_available", lambda: False)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, attn_implementation="sdpa")
    kernels._gguf_kernel = UnpackAndMultiply()
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
    "packed GGUF": (packed_gguf, "GgufLinear"),
}


@pytest.mark.parametrize("kind", BASES)
def test_train_save_load_and_generate(kind, smollm2, smollm2_gguf, tmp_path):
    load, quantized_class = BASES[kind]
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    base = load(smollm2, smollm2_gguf)
    quantized = [module for module in base.modules() if type(module).__name__ == quantized_class]
    assert len(quantized) == 30 * 7  # every linear layer of every block

    if quantized_class != "GgufLinear":
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

    with torch.no_grad():
        plain = base(**batch).logits
    model = get_peft_model(base, config)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    losses = []
    for _ in range(STEPS):
        losses.append(model(**batch).loss)
        losses[-1].backward()
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
