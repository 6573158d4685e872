"""Registers the plugin in a process of vLLM: puts its parts where vLLM handles LoRA adapters."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from . import frontend_hooks, vllm_api, worker_hooks
from .adapters import fingerprint, is_reft, refuse_change
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
    worker_hooks.serve_in_worker()


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
    import msgspec
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

    def plans(core: Any, number: int) -> list[Plan | None]:
        """The plans of the requests to the adapter of a number. None: of a request to a LoRA adapter."""
        return [
            Plan.of(request.sampling_params)
            for request in core.scheduler.requests.values()
            if request.lora_request is not None and request.lora_request.lora_int_id == number
        ]

    def users(core: Any, number: int) -> int:
        """How many requests of the engine use the ReFT adapter of a number."""
        return sum(plan is not None for plan in plans(core, number))

    # A worker that learns of such a request in a step ends the engine. An error here is of the request alone.
    def preprocess_add_request(original: Callable) -> Callable:
        def preprocess(self: Any, request: Any) -> Any:
            if request.lora_request is not None:
                number, plan = request.lora_request.lora_int_id, Plan.of(request.sampling_params)
                content = self.__dict__.get("_reft_contents", {}).get(number)
                if content != (None if plan is None else plan.fingerprint):
                    raise ValueError(
                        f"The request {request.request_id} to {request.lora_request.lora_name!r} was not made for the "
                        f"adapter that the engine knows by lora_int_id {number}. Load the adapter anew, and send "
                        "requests through LLM, LLMEngine or AsyncLLM."
                    )
            return original(self, request)

        return preprocess

    def add_lora(original: Callable) -> Callable:
        def add(self: Any, lora_request: Any) -> Any:
            number, name = lora_request.lora_int_id, lora_request.lora_name
            folder = get_adapter_absolute_path(lora_request.lora_path)
            remove_unused(self)
            kept = self.__dict__.setdefault("_reft_contents", {})
            if not is_reft(folder):
                if number in kept:
                    raise ValueError(
                        f"lora_int_id {number} of {name!r} is that of a ReFT adapter, which requests may still use. "
                        "Give each adapter a number of its own."
                    )
                return original(self, lora_request)
            if number not in kept and (number in self.list_loras() or None in plans(self, number)):
                raise ValueError(
                    f"lora_int_id {number} of the ReFT adapter {name!r} is that of a LoRA adapter. Give each adapter "
                    "a number of its own."
                )
            content = fingerprint(folder)
            # A removed adapter is still there while requests use it, and its folder may have changed since.
            replaces = number in kept and (lora_request.load_inplace or kept[number] != content)
            count = users(self, number) if replaces else 0
            if count:
                raise ValueError(
                    f"The ReFT adapter {name!r} can't be replaced while {count} requests use it. Load it when they "
                    "are done, or under another name."
                )
            self._reft_to_remove.discard(number)
            answer = original(self, msgspec.structs.replace(lora_request, load_inplace=replaces))
            kept[number] = content
            try:
                refuse_change(folder, content)  # the workers have read it meanwhile
            except (OSError, ValueError):
                kept.pop(number)
                self.model_executor.remove_lora(number)
                raise
            return answer

        return add

    def remove_unused(core: Any) -> None:
        to_remove = core.__dict__.setdefault("_reft_to_remove", set())
        for number in [number for number in to_remove if not users(core, number)]:
            to_remove.remove(number)
            core._reft_contents.pop(number, None)
            core.model_executor.remove_lora(number)

    def remove_lora(original: Callable) -> Callable:
        """Requests that use a ReFT adapter keep it until they are done; the next call here removes it then."""

        def remove(self: Any, lora_id: int) -> Any:
            remove_unused(self)
            if users(self, lora_id):
                self._reft_to_remove.add(lora_id)
                return True
            self.__dict__.setdefault("_reft_contents", {}).pop(lora_id, None)
            return original(self, lora_id)

        return remove

    for module in (kv_cache_utils, block_pool, manager):
        wrap(module, "generate_block_hash_extra_keys", keys)
    wrap(EngineCore, "preprocess_add_request", preprocess_add_request)
    wrap(EngineCore, "add_lora", add_lora)
    wrap(EngineCore, "remove_lora", remove_lora)
