"""Settings of vLLM under which ReFT is wrong, or was never tried, are refused by a line that names the option."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest


pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from served import save_model
from vllm.config import CompilationMode
from vllm.engine.arg_utils import EngineArgs

from peft_reft.integrations.vllm.vllm_api import refuse_settings


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("settings"))


def settings(base: str, **given: Any) -> Any:
    defaults = {"skip_tokenizer_init": True, "enable_lora": True, "block_size": 32}
    return EngineArgs(base, **{**defaults, **given}).create_engine_config()


def test_an_ordinary_engine_is_not_refused(base: str) -> None:
    refuse_settings(settings(base))
    refuse_settings(settings(base, enforce_eager=True))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"enable_lora": False}, "--enable-lora"),
        ({"cpu_offload_gb": 1}, "--cpu-offload-gb"),
        ({"offload_group_size": 2}, "--offload-group-size"),
        ({"kv_sharing_fast_prefill": True}, "--kv-sharing-fast-prefill"),
    ],
)
def test_engine_arguments(base: str, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        refuse_settings(settings(base, **given))


@pytest.mark.parametrize(
    ("config", "field", "value", "words"),
    [
        # These can't be asked for on a CPU, or need several processes.
        ("parallel_config", "data_parallel_size", 2, "--data-parallel-size"),
        ("parallel_config", "enable_dbo", True, "--enable-dbo"),
        ("parallel_config", "prefill_context_parallel_size", 2, "--prefill-context-parallel-size"),
        ("parallel_config", "decode_context_parallel_size", 2, "--decode-context-parallel-size"),
        ("compilation_config", "mode", CompilationMode.STOCK_TORCH_COMPILE, "STOCK_TORCH_COMPILE"),
        ("lora_config", "enable_tower_connector_lora", True, "--enable-tower-connector-lora"),
        ("model_config", "runner_type", "pooling", "--runner"),
        (None, "diffusion_config", SimpleNamespace(), "--diffusion-config"),
        (None, "kv_transfer_config", SimpleNamespace(), "--kv-transfer-config"),
        (None, "speculative_config", SimpleNamespace(enable_adaptive_verification=True), "adaptive_verification"),
    ],
)
def test_settings_of_other_machines(base: str, config: str | None, field: str, value: Any, words: str) -> None:
    vllm_config = settings(base)
    object.__setattr__(getattr(vllm_config, config) if config else vllm_config, field, value)
    with pytest.raises(ValueError, match=words):
        refuse_settings(vllm_config)


def test_the_rust_frontend_is_refused(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes requests past the plugin."""
    vllm_config = settings(base)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    refuse_settings(vllm_config)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND. Leave it out"):
        refuse_settings(vllm_config)


def test_what_nobody_has_run_is_refused_unless_it_is_asked_for(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for field, words in (
        ("use_v2_model_runner", "VLLM_USE_V2_MODEL_RUNNER=0"),
        ("tensor_parallel_size", "--tensor-parallel-size"),
        ("pipeline_parallel_size", "--pipeline-parallel-size"),
    ):
        vllm_config = settings(base)
        with monkeypatch.context() as patch:
            if field == "use_v2_model_runner":
                patch.setattr(type(vllm_config), field, True)
            else:
                object.__setattr__(vllm_config.parallel_config, field, 2)
            with pytest.raises(ValueError, match=words):
                refuse_settings(vllm_config)
            patch.setenv("PEFT_REFT_VLLM_UNTESTED", "1")
            refuse_settings(vllm_config)
