"""Tiny models and adapters for vLLM, and what the PEFT model says of the same prompts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_reft import ReftConfig, rescale_adapter_scale


VOCABULARY = 199
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 3,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # states of this size make an edit's effect on log-probabilities large
}


def save_model(folder: Path, family: str = "Llama", **settings: Any) -> str:
    """Save a random model of a family of transformers in float32."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config).float()
    model.save_pretrained(folder)
    return str(folder)


def save_adapter(base: str, folder: Path, seed: int = 1, **fields: Any) -> str:
    """Save a random ReFT adapter of a saved model. Its edits are as large as the states."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    fields = {"r": 4, "init_weights": "pyreft", "task_type": "CAUSAL_LM", **fields}
    adapted = get_peft_model(model, ReftConfig(**fields))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "reft_W" in name or "reft_b" in name:
                parameter.copy_(torch.randn_like(parameter))
    adapted.save_pretrained(folder)
    return str(folder)


def save_lora(base: str, folder: Path, rank: int = 4) -> str:
    """Save a random LoRA adapter of a saved model, on attention and MLP."""
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) / 10)
    adapted.save_pretrained(folder)
    return str(folder)


BROKEN = [
    "missing folder",
    "truncated",
    "truncated config",
    "NaN",
    "rank",
    "no block",
    "another model",
    "more layers",
    "unknown edit",
    "modules_to_save",
]


def break_adapter(base: str, good: str, folder: Path, what: str) -> tuple[Path, str]:
    """A folder with something wrong, and words of the error."""
    if what == "missing folder":
        return folder / "nowhere", "No adapter found"
    shutil.copytree(good, folder, dirs_exist_ok=True)
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config, weights = json.loads(config_path.read_text()), load_file(weights_path)
    words = what
    if what == "truncated":
        weights_path.write_bytes(weights_path.read_bytes()[:-100])
        return folder, "adapter_model.safetensors"
    if what == "truncated config":
        config_path.write_bytes(config_path.read_bytes()[:-100])
        return folder, "adapter_config.json"
    if what == "NaN":
        next(iter(weights.values()))[0] = float("nan")
    elif what == "rank":
        return Path(save_adapter(base, folder / "rank", r=16)), "--max-lora-rank"
    elif what == "no block":
        return Path(save_adapter(base, folder / "mlp", target_modules=["mlp"])), "mlp"
    elif what == "another model":
        other = save_model(folder / "other", hidden_size=96)
        return Path(save_adapter(other, folder / "adapter")), "width 96"
    elif what == "more layers":
        other = save_model(folder / "other", num_hidden_layers=5)
        return Path(save_adapter(other, folder / "adapter")), "layers.3"
    elif what == "unknown edit":
        config["intervention"], words = "superreft", "superreft"
    elif what == "modules_to_save":
        config["modules_to_save"] = ["lm_head"]
    config_path.write_text(json.dumps(config))
    save_file(weights, weights_path)
    return folder, words


def prompts_of(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts that share their first tokens, as prompts with a system message do."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randint(5, VOCABULARY, (512,), generator=generator).tolist()
    own = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    return [shared[: length * 3 // 4] + one[length * 3 // 4 :] for length, one in zip(lengths, own)]


class Reference:
    """A saved model, and adapters of it, in transformers and PEFT."""

    def __init__(self, base: str, adapters: dict[str, str]) -> None:
        self.base = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self.adapted: dict[str, Any] = {}
        for name, folder in adapters.items():
            model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            self.adapted[name] = PeftModel.from_pretrained(model, folder).eval()

    @torch.no_grad()
    def answer(
        self, prompt: list[int], adapter: str | None, tokens: int, **given: Any
    ) -> tuple[list[int], list[float]]:
        """The tokens that `generate` gives, and the log-probability of each."""
        model = self.base if adapter is None else self.adapted[adapter]
        scale = given.pop("scale", None)
        if scale is not None and adapter is not None:
            with rescale_adapter_scale(model, scale):
                return self.answer(prompt, adapter, tokens, **given)
        out = model.generate(
            input_ids=torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **given,
        )
        ids = out.sequences[0, len(prompt) :].tolist()
        logp = [float(logits[0].float().log_softmax(-1)[index]) for logits, index in zip(out.logits, ids)]
        return ids, logp


def start(base: str, **settings: Any) -> Any:
    """An engine in this process, in float32."""
    from vllm import LLM

    return LLM(
        **{
            "model": base,
            "dtype": "float32",
            "skip_tokenizer_init": True,
            "enable_lora": True,
            "max_loras": 4,
            "max_lora_rank": 8,
            "enforce_eager": True,
            "block_size": 32,
            "max_model_len": 400,
            "max_num_seqs": 32,
            "kv_cache_memory_bytes": 1 << 26,
            "generation_config": "vllm",
            **settings,
        }
    )


def ask(
    engine: Any, requests: list[tuple[list[int], Any]], tokens: int, **extra: Any
) -> list[tuple[list[int], list[float]]]:
    """What an engine answers to prompts with LoRARequests, all in one batch, as `Reference.answer` says it."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=1, ignore_eos=True, detokenize=False, extra_args=extra or None
    )
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for prompt, _ in requests],
        params,
        lora_request=[adapter for _, adapter in requests],
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        ids = list(output.outputs[0].token_ids)
        answers.append((ids, [step[index].logprob for step, index in zip(output.outputs[0].logprobs, ids)]))
    return answers


@contextmanager
def compiling(mode: Any) -> Iterator[dict[str, Any]]:
    """Engines started in this block compile their model on a CPU. Gives the settings that they need."""
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__

    def check(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        compilation = vllm_config.compilation_config
        compilation.mode, compilation.backend, compilation.compile_sizes = mode, "inductor", []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check))
        # This pass is about vLLM's own kernels, and names some that its CPU build lacks.
        patch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)
        yield {"enforce_eager": False, "compilation_config": {"mode": mode}}
