"""A compiled model in vLLM: every answer is compared with `generate` of the PEFT model, in float32.

vLLM's CPU build compiles nothing as soon as it serves LoRA, so these tests switch that off. CUDA graphs need a GPU:
test_vllm_gpu.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import compiling, prompts_of
from test_vllm import LENGTHS, Server
from vllm.config import CompilationMode


pytestmark = pytest.mark.slow

ADAPTERS: dict[str, dict[str, Any]] = {"loreft": {}, "all": {"positions": "all", "layers_to_transform": [1]}}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


def edited(server: Server) -> Any:
    core = server.engine.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner.lora_manager._reft_model


@pytest.mark.parametrize("mode", ["VLLM_COMPILE", "DYNAMO_TRACE_ONCE"])
def test_a_batch_of_a_compiled_model_twice(tmp_path: Path, cache: Path, mode: str) -> None:
    asked = [(prompt, name) for prompt in prompts_of(LENGTHS) for name in (None, "loreft")]
    with compiling(CompilationMode[mode]) as settings:
        server = Server(tmp_path, ADAPTERS, engine=settings)
        assert edited(server).traced and list(cache.rglob("rank_0_0/model"))
        for _ in range(2):
            server.check(asked)
        server.check([(prompt, name) for prompt in prompts_of([3, 40, 101]) for name in (None, "all", "loreft")])
