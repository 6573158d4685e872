"""Requests to the base model, to ReFT and to LoRA adapters, in one engine of vLLM in this process.

Timed is processor time, of all threads: on a shared machine the clock counts other processes too. A round asks for
equally many answers of one kind. Prefill is everything up to the first token: taking the requests, finding the tokens
to edit, scheduling, the model and sampling. Each later token of all requests is a decode step.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .methods import LORA_TARGETS, SIZES, VOCABULARY, Setting, base_model


KINDS = ("base", "reft", "lora")
ALL_LINEAR = sorted({*LORA_TARGETS, "o_proj", "gate_proj"})


@dataclass
class Served:
    """An engine with a model and its adapters.

    Args:
        engine (`vllm.LLM`): The engine.
        adapters (`dict`): Kind of request -> LoRARequest, None for the base.
        length (`int`): Tokens of a prompt.
    """

    engine: Any
    adapters: dict[str, Any]
    length: int
    _made: int = 0

    def round(self, kind: str, requests: int, tokens: int) -> tuple[float, float]:
        """Seconds of processor time of a prefill and of a decode step.

        Args:
            kind (`str`): One of `KINDS`.
            requests (`int`): How many requests at once.
            tokens (`int`): The tokens of each answer, two at least.
        """
        from vllm import SamplingParams

        engine = self.engine.llm_engine
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(3, VOCABULARY, (requests, self.length), generator=generator).tolist()
        before = time.process_time()
        for prompt in prompts:
            self._made += 1
            params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
            engine.add_request(str(self._made), {"prompt_token_ids": prompt}, params, lora_request=self.adapters[kind])
        engine.step()
        prefilled = time.process_time()
        steps = 0
        while engine.has_unfinished_requests():
            engine.step()
            steps += 1
        if steps != tokens - 1:
            raise RuntimeError(f"{requests} prompts of {self.length} tokens took {steps + 1 - tokens} further steps.")
        return prefilled - before, (time.process_time() - prefilled) / steps


def serve(folder: Path, setting: Setting, requests: int, compiled: bool) -> Served:
    """Make a model and random adapters of it, and start an engine.

    Args:
        folder (`Path`): Where to save them.
        setting (`Setting`): The model's size, the rank, ReFT's positions, the device and the dtype.
        requests (`int`): The most requests at once.
        compiled (`bool`): Whether vLLM compiles the model. vLLM for CPUs does not, as soon as it serves LoRA.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that this process does all the work
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    folders = {kind: str(folder / kind) for kind in KINDS}
    if setting.size == "deep":
        SIZES["deep"]["num_attention_heads"] = 2  # vLLM's attention on CPUs takes heads of 32 or wider
    model = base_model(setting)
    model.save_pretrained(folders["base"])
    for kind in ("reft", "lora"):
        _save_adapter(model, kind, setting, folders[kind])
    dtype: Any = setting.dtype
    engine = LLM(
        folders["base"],
        dtype=dtype,
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=2,
        max_lora_rank=max(8, setting.rank),
        enforce_eager=not compiled,
        enable_prefix_caching=False,
        max_model_len=1024,
        max_num_seqs=requests,
        max_num_batched_tokens=requests * setting.length + 1024,
        kv_cache_memory_bytes=1 << 29 if setting.device == "cpu" else None,
        disable_log_stats=True,
        generation_config="vllm",
    )
    adapters: dict[str, Any] = {"base": None}
    for number, kind in enumerate(("reft", "lora"), start=1):
        adapters[kind] = LoRARequest(kind, number, folders[kind])
    return Served(engine, adapters, setting.length)


def _save_adapter(model: Any, kind: str, setting: Setting, folder: str) -> None:
    from peft import LoraConfig, PeftConfig, get_peft_model

    from peft_reft import ReftConfig

    config: PeftConfig
    if kind == "reft":
        config = ReftConfig(
            r=setting.rank,
            positions=setting.positions,
            share_weights=setting.tied,
            layers_to_transform=setting.layers,
            init_weights="pyreft",
            task_type="CAUSAL_LM",
        )
    else:
        config = LoraConfig(r=setting.rank, target_modules=ALL_LINEAR, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(folder)
    adapted.unload()
