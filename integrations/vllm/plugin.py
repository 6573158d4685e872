"""Registers the plugin in a process of vLLM: puts its parts where vLLM handles LoRA adapters."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any

from . import vllm_api


def register() -> None:
    """Called by vLLM in each of its processes, perhaps several times in one."""
    refusal = vllm_api.refusal_of_version()
    if refusal is not None:
        _refuse_adapters(refusal)
        return
    from vllm.v1.core import kv_cache_utils

    if hasattr(kv_cache_utils.generate_block_hash_extra_keys, "_serves_reft"):
        return
    _serve_in_frontend()
    _serve_over_http()
    _serve_in_core()
    _serve_in_worker()


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace a function of a module or class by one that is made from it."""
    original = getattr(owner, name)
    wrapped = functools.wraps(original)(make(original))
    wrapped._serves_reft = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _refuse_adapters(refusal: str) -> None:
    """On a version that was not tested: ReFT adapters are refused where vLLM reads an adapter's config."""
    try:
        from vllm.lora.peft_helper import PEFTHelper

        original = PEFTHelper.from_local_dir.__func__  # type: ignore[attr-defined]
    except (ImportError, AttributeError):
        return  # vLLM refuses the config by itself: it lacks LoRA's fields

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        from .adapters import is_reft

        if is_reft(lora_path):
            raise ValueError(refusal)
        return original(cls, lora_path, *args, **kwargs)

    PEFTHelper.from_local_dir = classmethod(from_local_dir)  # type: ignore[method-assign, assignment]


def _serve_in_frontend() -> None:
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    from . import frontend

    def process_inputs(original: Callable) -> Callable:
        def process(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, request_id, prompt, params, *args, **kwargs)
            frontend.add_plan(request, request.lora_request, self.vllm_config)
            return request

        return process

    def to_load(engine: Any, prompt: Any, lora_request: Any) -> Any:
        """The adapter of a request that the workers have not confirmed yet, with its fingerprint."""
        if isinstance(prompt, EngineCoreRequest):
            if frontend.folder_of(prompt.lora_request) is not None:
                raise ValueError("A request to a ReFT adapter must be given as a prompt, not as EngineCoreRequest.")
            return None
        folder = frontend.folder_of(lora_request)
        if folder is None:
            return None
        adapter = frontend.adapter_of(lora_request, folder, engine.vllm_config)
        confirmed = engine.__dict__.setdefault("_reft_confirmed", set())
        name = (lora_request.lora_int_id, adapter.fingerprint)
        return None if name in confirmed else (confirmed, name)

    # vLLM's workers load an adapter when its first step runs, where an error ends the engine. So a ReFT adapter is
    # loaded before its first request is taken.
    def add_request(original: Callable) -> Callable:
        def add(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            lora_request = kwargs.get("lora_request", args[1] if len(args) > 1 else None)
            missing = to_load(self, prompt, lora_request)
            if missing is not None:
                self.add_lora(lora_request)
                missing[0].add(missing[1])
            return original(self, request_id, prompt, params, *args, **kwargs)

        return add

    def add_request_async(original: Callable) -> Callable:
        async def add(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            lora_request = kwargs.get("lora_request", args[1] if len(args) > 1 else None)
            missing = to_load(self, prompt, lora_request)
            if missing is not None:
                await self.add_lora(lora_request)
                missing[0].add(missing[1])
            return await original(self, request_id, prompt, params, *args, **kwargs)

        return add

    def read(engine: Any, lora_request: Any) -> bool:
        folder = frontend.folder_of(lora_request)
        if folder is not None:
            frontend.adapter_of(lora_request, folder, engine.vllm_config, anew=True)
        return folder is not None

    def add_lora(original: Callable) -> Callable:
        def add(self: Any, lora_request: Any) -> Any:
            if not read(self, lora_request):
                return original(self, lora_request)
            try:
                return original(self, lora_request)
            except Exception as error:
                raise ValueError(str(error)) from error

        return add

    def add_lora_async(original: Callable) -> Callable:
        async def add(self: Any, lora_request: Any) -> Any:
            if not read(self, lora_request):
                return await original(self, lora_request)
            try:
                return await original(self, lora_request)
            except Exception as error:
                raise ValueError(str(error)) from error

        return add

    def beam_search(original: Callable) -> Callable:
        def search(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            # lora_request is the third argument of LLM.beam_search, and the fourth over HTTP.
            for given in (*args, kwargs.get("lora_request")):
                if type(given).__name__ in ("LoRARequest", "list", "tuple"):
                    frontend.refuse_beam_search(given)
            return original(self, prompt, *args, **kwargs)

        return search

    _wrap(InputProcessor, "process_inputs", process_inputs)
    _wrap(LLMEngine, "add_request", add_request)
    _wrap(AsyncLLM, "add_request", add_request_async)
    _wrap(LLMEngine, "add_lora", add_lora)
    _wrap(AsyncLLM, "add_lora", add_lora_async)
    _wrap(BeamSearchOfflineMixin, "beam_search", beam_search)
    _wrap(BeamSearchOnlineMixin, "beam_search", beam_search)


def _serve_over_http() -> None:
    """A ReFT adapter that can't be loaded is the client's error, 400, where vLLM answers 500."""
    try:
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    except ImportError:  # a worker of an installation without a server
        return

    def load_lora_adapter(original: Callable) -> Callable:
        async def load(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            from .adapters import is_reft

            answer = await original(self, request, *args, **kwargs)
            error = getattr(answer, "error", None)
            if error is not None and error.code == 500 and is_reft(request.lora_path):
                error.code, error.type = 400, "BadRequestError"
            return answer

        return load

    _wrap(OpenAIServingModels, "load_lora_adapter", load_lora_adapter)


def _serve_in_core() -> None:
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.simple_kv_offload import manager

    from .adapters import is_reft
    from .plans import Plan

    def keys(original: Callable) -> Callable:
        def generate(request: Any, start: int, end: int, start_mm_idx: int) -> tuple[tuple[Any, ...] | None, int]:
            extra_keys, mm_idx = original(request, start, end, start_mm_idx)
            plan = Plan.of(request.sampling_params) if request.lora_request is not None else None
            if plan is None:
                return extra_keys, mm_idx
            # The hash of a block holds that of the block before it, and so all edits before it.
            others = [key for key in extra_keys or () if key[0] != "lora"]
            key = plan.key(start, end)
            found = (*([] if key is None else [("reft", key)]), *others)
            return found or None, mm_idx

        return generate

    def add_lora(original: Callable) -> Callable:
        def add(self: Any, lora_request: Any) -> Any:
            if lora_request.load_inplace and is_reft(lora_request.lora_path):
                users = [
                    request.request_id
                    for request in self.scheduler.requests.values()
                    if request.lora_request is not None
                    and request.lora_request.lora_int_id == lora_request.lora_int_id
                ]
                if users:
                    raise ValueError(
                        f"The ReFT adapter {lora_request.lora_name!r} can't be replaced while {len(users)} requests "
                        "use it. Load it when they are done, or under another name."
                    )
            return original(self, lora_request)

        return add

    for module in (kv_cache_utils, block_pool, manager):
        _wrap(module, "generate_block_hash_extra_keys", keys)
    _wrap(EngineCore, "add_lora", add_lora)


def _serve_in_worker() -> None:
    from vllm.config import VllmConfig
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker import gpu_model_runner as v1
    from vllm.v1.worker.gpu import model_runner as v2
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from . import adapters
    from .operation import SCHEMA
    from .plans import Plan
    from .worker import EditedModel, requests_of, requests_of_v2

    def edited_of(runner: Any) -> EditedModel | None:
        return getattr(getattr(runner, "lora_manager", None), "_reft_model", None)

    def load_lora_model(original: Callable) -> Callable:
        def load(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
            loaded = original(self, model, vllm_config, device)
            self.lora_manager._reft_model = self.lora_manager._reft_refusal = None
            try:
                vllm_api.refuse_settings(vllm_config)
                self.lora_manager._reft_model = EditedModel(self.lora_manager._adapter_manager.model, vllm_config)
            except ValueError as error:  # of ReFT adapters, when one is loaded
                self.lora_manager._reft_refusal = str(error)
            return loaded

        return load

    def load_adapter(original: Callable) -> Callable:
        def load(self: Any, lora_request: Any) -> Any:
            number, folder = lora_request.lora_int_id, get_adapter_absolute_path(lora_request.lora_path)
            edited = self._reft_model
            known = edited.adapters.get(number) if edited is not None else None
            if known is None and not adapters.is_reft(folder):
                return original(self, lora_request)
            if edited is None:
                raise ValueError(self._reft_refusal)
            if known is not None and (known.folder != folder or lora_request.load_inplace):
                known = None
            if known is None and not adapters.is_reft(folder):
                edited.remove(number)
                return original(self, lora_request)
            if known is None:
                edited.add(number, adapters.load(folder, self.lora_config.max_lora_rank))
            return LoRAModel(number, edited.adapters[number].config.r, {})

        return load

    def merge(original: Callable) -> Callable:
        def merged(self: Any, lora_model: Any) -> None:
            if lora_model.loras:  # a ReFT adapter has none
                original(self, lora_model)

        return merged

    # Model runner V1 takes the plan of a step here, and V2 where it gathers the requests of a step.
    def set_active_loras(original: Callable) -> Callable:
        def set_active(self: Any, input_batch: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
            edited = edited_of(self)
            if edited is not None:
                edited.plan(requests_of(self, edited, counts))
            return original(self, input_batch, counts, *args, **kwargs)

        return set_active

    def gather_batch_req_state(original: Callable) -> Callable:
        def gather(self: Any, *args: Any, **kwargs: Any) -> Any:
            returned = original(self, *args, **kwargs)
            edited = edited_of(self)
            if edited is not None:
                is_dummy = returned[0] is None
                edited.plan([] if is_dummy else requests_of_v2(self, edited, self._reft_plans, returned[0]))
                if is_dummy:
                    edited.start()
                if self.cudagraph_manager is not None:
                    self.cudagraph_manager._reft_edits = edited.edits
            return returned

        return gather

    def add_requests(original: Callable) -> Callable:
        def add(self: Any, scheduler_output: Any) -> Any:
            plans = self.__dict__.setdefault("_reft_plans", {})
            for name in scheduler_output.finished_req_ids:
                plans.pop(name, None)
            for request in scheduler_output.scheduled_new_reqs:
                plan = Plan.of(request.sampling_params)
                if plan is not None:
                    plans[request.req_id] = plan
            return original(self, scheduler_output)

        return add

    def set_mapping(original: Callable) -> Callable:
        """Steps and dummy steps alike come here. vLLM's LoRA kernels skip the tokens of ReFT requests."""

        def set_active(self: Any, prompts: tuple, tokens: tuple, *args: Any, **kwargs: Any) -> Any:
            edited = edited_of(self)
            if edited is not None:
                edited.start()
                if not edited.adapters.keys().isdisjoint(prompts):
                    prompts = tuple(0 if number in edited.adapters else number for number in prompts)
                    tokens = tuple(0 if number in edited.adapters else number for number in tokens)
            return original(self, prompts, tokens, *args, **kwargs)

        return set_active

    # A CUDA graph holds no kernel of the plugin: steps with something to edit run without one.
    def determine(original: Callable) -> Callable:
        def without_graphs(self: Any, *args: Any, **kwargs: Any) -> Any:
            edited = edited_of(self)
            if edited is not None and edited.edits:
                kwargs["force_eager"] = True
            return original(self, *args, **kwargs)

        return without_graphs

    def dispatch(original: Callable) -> Callable:
        def without_graphs(manager: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(manager, "_reft_edits", False):
                kwargs["need_eager"] = True
            return original(manager, *args, **kwargs)

        return without_graphs

    def compute_hash(original: Callable) -> Callable:
        """vLLM finds compiled code by this hash. With the plugin it is another: code that was compiled without it
        lacks the operation."""

        def compute(self: Any, *args: Any, **kwargs: Any) -> str:
            of_engine = original(self, *args, **kwargs)
            if self.lora_config is None:
                return of_engine
            return hashlib.sha256(f"{of_engine} peft-reft {SCHEMA}".encode()).hexdigest()[: len(of_engine)]

        return compute

    def execute_model(original: Callable) -> Callable:
        def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            edited = edited_of(self)
            if edited is not None:
                edited.finish()
            return output

        return execute

    _wrap(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    _wrap(LoRAModelRunnerMixin, "set_active_loras", set_active_loras)
    _wrap(LoRAModelRunnerMixin, "_set_active_loras", set_mapping)
    _wrap(WorkerLoRAManager, "_load_adapter", load_adapter)
    _wrap(LoRAModelManager, "_create_merged_loras_inplace", merge)
    _wrap(v1.GPUModelRunner, "_determine_batch_execution_and_padding", determine)
    _wrap(v1.GPUModelRunner, "execute_model", execute_model)
    _wrap(v2.GPUModelRunner, "add_requests", add_requests)
    _wrap(v2.GPUModelRunner, "gather_batch_req_state", gather_batch_req_state)
    _wrap(v2.GPUModelRunner, "execute_model", execute_model)
    _wrap(v2, "dispatch_cg_and_sync_dp", dispatch)
    _wrap(VllmConfig, "compute_hash", compute_hash)
