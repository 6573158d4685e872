"""Registers the plugin in a process of vLLM: puts its parts where vLLM handles LoRA adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import frontend_hooks, vllm_api
from .adapters import is_reft
from .vllm_api import wrap


def register() -> None:
    """Called by vLLM in each of its processes, perhaps several times in one."""
    refusal = vllm_api.refusal_of_version()
    if refusal is not None:
        _refuse_adapters(refusal)
        return
    from vllm.v1.core import kv_cache_utils

    if hasattr(kv_cache_utils.generate_block_hash_extra_keys, "_serves_reft"):
        return
    frontend_hooks.serve_in_frontend()
    frontend_hooks.serve_over_http()
    _serve_in_core()
    _serve_in_worker()


def _refuse_adapters(refusal: str) -> None:
    """On a version that was not tested: ReFT adapters are refused where vLLM takes a request, which leaves the engine
    as it was, and where it reads an adapter's config. LoRA and the base are served as always."""
    try:
        from vllm.v1.engine.input_processor import InputProcessor

        process_inputs = InputProcessor.process_inputs
    except (ImportError, AttributeError):
        pass
    else:

        @functools.wraps(process_inputs)
        def process(self: Any, *args: Any, **kwargs: Any) -> Any:
            for given in (*args, *kwargs.values()):
                if type(given).__name__ == "LoRARequest" and is_reft(given.lora_path):
                    raise ValueError(f"{given.lora_name!r}: {refusal}")
            return process_inputs(self, *args, **kwargs)

        setattr(InputProcessor, "process_inputs", process)  # noqa: B010  (mypy allows no assignment)
    try:
        from vllm.lora.peft_helper import PEFTHelper

        original = vars(PEFTHelper)["from_local_dir"].__func__
    except (ImportError, KeyError):
        return  # vLLM refuses the config by itself: it lacks LoRA's fields

    def from_local_dir(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        if is_reft(lora_path):
            raise ValueError(refusal)
        return original(cls, lora_path, *args, **kwargs)

    setattr(PEFTHelper, "from_local_dir", classmethod(from_local_dir))  # noqa: B010


def _serve_in_core() -> None:
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.simple_kv_offload import manager

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

    def users(core: Any, number: int) -> int:
        """How many requests of the engine use the ReFT adapter of a number."""
        return sum(
            request.lora_request is not None
            and request.lora_request.lora_int_id == number
            and Plan.of(request.sampling_params) is not None
            for request in core.scheduler.requests.values()
        )

    def add_lora(original: Callable) -> Callable:
        def add(self: Any, lora_request: Any) -> Any:
            number, name = lora_request.lora_int_id, lora_request.lora_name
            if not is_reft(get_adapter_absolute_path(lora_request.lora_path)):
                return original(self, lora_request)
            kept = self.__dict__.setdefault("_reft_numbers", set())
            if number not in kept and number in self.list_loras():
                raise ValueError(
                    f"lora_int_id {number} of the ReFT adapter {name!r} is that of a LoRA adapter. Give each adapter "
                    "a number of its own."
                )
            count = users(self, number) if lora_request.load_inplace else 0
            if count:
                raise ValueError(
                    f"The ReFT adapter {name!r} can't be replaced while {count} requests use it. Load it when they "
                    "are done, or under another name."
                )
            self.__dict__.setdefault("_reft_to_remove", set()).discard(number)
            remove_unused(self)
            answer = original(self, lora_request)
            kept.add(number)
            return answer

        return add

    def remove_unused(core: Any) -> None:
        to_remove = core.__dict__.setdefault("_reft_to_remove", set())
        for number in [number for number in to_remove if not users(core, number)]:
            to_remove.remove(number)
            core._reft_numbers.discard(number)
            core.model_executor.remove_lora(number)

    def remove_lora(original: Callable) -> Callable:
        """Requests that use a ReFT adapter keep it until they are done; the next call here removes it then."""

        def remove(self: Any, lora_id: int) -> Any:
            remove_unused(self)
            if users(self, lora_id):
                self._reft_to_remove.add(lora_id)
                return True
            self.__dict__.setdefault("_reft_numbers", set()).discard(lora_id)
            return original(self, lora_id)

        return remove

    for module in (kv_cache_utils, block_pool, manager):
        wrap(module, "generate_block_hash_extra_keys", keys)
    wrap(EngineCore, "add_lora", add_lora)
    wrap(EngineCore, "remove_lora", remove_lora)


def _serve_in_worker() -> None:
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.model_manager import LoRAModelManager
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from . import adapters
    from .worker import EditedModel, requests_of

    def load_lora_model(original: Callable) -> Callable:
        def load(self: Any, model: Any, vllm_config: Any, device: Any) -> Any:
            loaded = original(self, model, vllm_config, device)
            self.lora_manager._reft_config = vllm_config
            self.lora_manager._reft_model = None
            return loaded

        return load

    def load_adapter(original: Callable) -> Callable:
        def load(self: Any, lora_request: Any) -> Any:
            number, folder = lora_request.lora_int_id, get_adapter_absolute_path(lora_request.lora_path)
            edited = self._reft_model
            known = edited.adapters.get(number) if edited is not None else None
            if known is None and not adapters.is_reft(folder):
                return original(self, lora_request)
            if known is not None and (known.folder != folder or lora_request.load_inplace):
                known = None
            if known is None and not adapters.is_reft(folder):
                edited.remove(number)
                return original(self, lora_request)
            if known is None:
                vllm_api.refuse_settings(self._reft_config)
                adapter = adapters.load(folder, self.lora_config.max_lora_rank)
                if edited is None:
                    edited = EditedModel(self._adapter_manager.model, self._reft_config.model_config)
                edited.add(number, adapter)
                self._reft_model = edited
            return LoRAModel(number, edited.adapters[number].config.r, {})

        return load

    def remove_lora(original: Callable) -> Callable:
        def remove(self: Any, lora_id: int) -> Any:
            if self.lora_manager._reft_model is not None:
                self.lora_manager._reft_model.remove(lora_id)
            return original(self, lora_id)

        return remove

    def merge(original: Callable) -> Callable:
        def merged(self: Any, lora_model: Any) -> None:
            if lora_model.loras:  # a ReFT adapter has none
                original(self, lora_model)

        return merged

    def set_active_loras(original: Callable) -> Callable:
        def set_active(self: Any, input_batch: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
            answer = original(self, input_batch, counts, *args, **kwargs)
            edited = self.lora_manager._reft_model
            if edited is not None:
                edited.prepare(requests_of(self, edited, counts))
            return answer

        return set_active

    def set_mapping(original: Callable) -> Callable:
        """vLLM's LoRA kernels skip the tokens of ReFT requests. Dummy steps, which come here alone, edit nothing."""

        def set_active(self: Any, prompts: tuple, tokens: tuple, *args: Any, **kwargs: Any) -> Any:
            edited = getattr(self, "lora_manager", None) and self.lora_manager._reft_model
            if edited is not None:
                edited.prepare([])
                if not edited.adapters.keys().isdisjoint(prompts):
                    prompts = tuple(0 if number in edited.adapters else number for number in prompts)
                    tokens = tuple(0 if number in edited.adapters else number for number in tokens)
            return original(self, prompts, tokens, *args, **kwargs)

        return set_active

    wrap(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    wrap(LoRAModelRunnerMixin, "set_active_loras", set_active_loras)
    wrap(LoRAModelRunnerMixin, "_set_active_loras", set_mapping)
    wrap(LoRAModelRunnerMixin, "remove_lora", remove_lora)
    wrap(WorkerLoRAManager, "_load_adapter", load_adapter)
    wrap(LoRAModelManager, "_create_merged_loras_inplace", merge)
