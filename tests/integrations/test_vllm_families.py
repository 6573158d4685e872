"""Engines of vLLM's CPU build with settings or models of their own: chunked prefill, preemption, other families. Every
answer is compared with `generate` of the PEFT model, in float32."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import prompts_of
from test_vllm import ADAPTERS, LENGTHS, Server


pytestmark = pytest.mark.slow


def test_chunked_prefill_and_preemption(tmp_path: Path) -> None:
    adapters = {name: ADAPTERS[name] for name in ("loreft", "every", "all")}
    server = Server(tmp_path, adapters, engine={"max_num_batched_tokens": 32, "max_num_seqs": 8, "max_loras": 4})
    prompts = prompts_of(LENGTHS)
    for _ in range(2):
        server.check([(prompt, name) for prompt in prompts for name in (None, "loreft", "every")])
    scheduler = server.engine.llm_engine.engine_core.engine_core.scheduler
    schedule, steps, preempted = scheduler.schedule, iter(range(1_000_000)), []

    def with_preemption(*args: Any, **kwargs: Any) -> Any:
        if next(steps) % 3 == 2 and scheduler.running:
            preempted.append(scheduler.running[-1].request_id)
            scheduler.reset_prefix_cache()
            scheduler._preempt_request(scheduler.running.pop(), 0.0)
        return schedule(*args, **kwargs)

    scheduler.schedule = with_preemption
    server.check([(prompt, name) for prompt in prompts[4:] for name in (None, *adapters)])
    assert len(preempted) > 10


FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2": {},
    "Qwen3": {},
    "Gemma2": {"query_pre_attn_scalar": 32, "initializer_range": 0.05, "sliding_window": 64},
    "Cohere": {"initializer_range": 0.1},  # the first element of the pair is already the output
    "Granite": {},  # a tensor alone
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    server = Server(tmp_path, {"loreft": {}}, family, **FAMILIES[family])
    asked = [(prompt, name) for prompt in prompts_of([1, 5, 33, 100, 210]) for name in (None, "loreft")]
    assert server.changes(asked[-1][0], "loreft")
    for _ in range(2):
        server.check(asked)
