"""Requests to the base model, to ReFT and to LoRA adapters, in one engine of vLLM in this process.

Timed is processor time, of all threads: on a shared machine the clock counts other processes too. A round asks for
equally many answers of one kind. Prefill is everything up to the first token: taking the requests, finding the tokens
to edit, scheduling, the model and sampling. Each later token of all requests is a decode step.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .methods import LORA_TARGETS, SIZES, VOCABULARY, Setting, base_model
from .pairs import Ratio
from .report import print_table, ratio_text
from .session import OUT, Device, Out, Pairs, Session, Size, Threads, interleave_shown


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


def start_engine(folder: Path, setting: Setting, requests: int, compiled: bool) -> Served:
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


def measure(served: Served, requests: int, pairs: int, tokens: int) -> dict[str, dict[str, dict[str, float]]]:
    """Ask for answers of each kind in turn, and compare each with the base's of the same turn.

    Args:
        served (`Served`): The engine.
        requests (`int`): How many requests at once.
        pairs (`int`): How many turns.
        tokens (`int`): The tokens of each answer.

    Returns:
        `dict`: Kind -> `"prefill"` and `"decode"` -> the fields of a `Ratio`.
    """
    decode: dict[str, list[float]] = {kind: [] for kind in KINDS}

    def run(kind: str) -> float:
        first, later = served.round(kind, requests, tokens)
        decode[kind].append(later)
        return first

    prefill = interleave_shown({kind: partial(run, kind) for kind in KINDS}, pairs, f"{requests} requests")
    of_turns = {kind: seconds[-pairs:] for kind, seconds in decode.items()}  # without those of the warm-up
    return {
        kind: {
            "prefill": Ratio.of(prefill[kind], prefill["base"]).as_dict(),
            "decode": Ratio.of(of_turns[kind], of_turns["base"]).as_dict(),
        }
        for kind in KINDS
    }


def serve(
    pairs: Pairs = 20,
    out: Out = OUT,
    threads: Threads = 1,
    device: Device = "cpu",
    size: Size = "deep",
    requests: Annotated[list[int], typer.Option(help="requests at once; several times for several")] = [1, 8, 32],  # noqa: B006
    length: Annotated[int, typer.Option(help="tokens of a prompt")] = 96,
    tokens: Annotated[int, typer.Option(help="tokens of an answer")] = 16,
    compiled: Annotated[bool, typer.Option(help="let vLLM compile the model; on a GPU")] = False,
) -> None:
    """Base, ReFT and LoRA requests in one engine of vLLM: time of prefill and decode. Needs the stack vllm."""
    torch.set_num_threads(threads)
    dtype = "float32" if device == "cpu" else "bfloat16"
    setting = Setting(size=size, device=device, dtype=dtype, length=length)
    with Session(out, threads) as session, tempfile.TemporaryDirectory() as folder:
        served = start_engine(Path(folder), setting, max(requests), compiled)
        session.results["serve"] = found = {count: measure(served, count, pairs, tokens) for count in requests}
        print_table(
            f"tokens a second of processor time, prompts of {length}",
            ["requests", "prefill", "its time to the base's", "decode", "its time to the base's"],
            [
                [
                    f"{count} {kind}",
                    f"{count * length / measured['prefill']['seconds']:.0f}",
                    ratio_text(measured["prefill"]),
                    f"{count / measured['decode']['seconds']:.0f}",
                    ratio_text(measured["decode"]),
                ]
                for count, of_kinds in found.items()
                for kind, measured in of_kinds.items()
            ],
        )
        session.save(f"serve-{size}")
