"""A compiled model in vLLM: every answer is compared with `generate` of the PEFT model, in float32.

vLLM's CPU build compiles nothing as soon as it serves LoRA, so these tests switch that off. CUDA graphs need a GPU:
test_vllm_gpu.py.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest


pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import compiling, prompts_of, save_model, start
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


@pytest.fixture
def server_config(tmp_path: Path) -> Any:
    """The settings of an engine, which is not started."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return EngineArgs(
        save_model(tmp_path / "base"), skip_tokenizer_init=True, enable_lora=True, block_size=32
    ).create_engine_config()


@pytest.mark.parametrize("mode", ["VLLM_COMPILE", "DYNAMO_TRACE_ONCE"])
def test_a_batch_of_a_compiled_model_twice(tmp_path: Path, cache: Path, mode: str) -> None:
    asked = [(prompt, name) for prompt in prompts_of(LENGTHS) for name in (None, "loreft")]
    with compiling(CompilationMode[mode]) as settings:
        server = Server(tmp_path, ADAPTERS, engine=settings)
        assert edited(server).traced and len(list(cache.rglob("rank_0_0/model"))) == 1
        for _ in range(2):
            server.check(asked)
        server.check([(prompt, name) for prompt in prompts_of([3, 40, 101]) for name in (None, "all", "loreft")])
        if mode == "VLLM_COMPILE":  # an engine that finds the compiled code in vLLM's cache
            del server.engine  # one engine at a time in a process
            gc.collect()
            server.engine = start(server.base, **settings)
            assert edited(server).model.model.was_aot_compile_fn_loaded_from_disk
            server.check(asked)


def test_compiled_code_is_not_shared_with_engines_without_the_plugin(server_config: Any) -> None:
    without_plugin = type(server_config).compute_hash.__wrapped__
    assert server_config.compute_hash() != without_plugin(server_config)
    assert server_config.compute_hash() == server_config.compute_hash()
    with pytest.MonkeyPatch.context() as patch:  # an engine that refuses adapters has no code of the plugin
        patch.setenv("VLLM_USE_RUST_FRONTEND", "1")
        assert server_config.compute_hash() == without_plugin(server_config)
    lora, server_config.lora_config = server_config.lora_config, None
    assert server_config.compute_hash() == without_plugin(server_config)  # such an engine serves no adapter
    server_config.lora_config = lora
