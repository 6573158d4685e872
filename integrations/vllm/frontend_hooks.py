"""Puts the frontend's part where vLLM takes requests, loads and removes adapters, and answers over HTTP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import vllm_api
from .vllm_api import wrap


def serve_in_frontend() -> None:
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.engine.llm_engine import LLMEngine

    from .frontend import Frontend

    def process_inputs(original: Callable) -> Callable:
        def process(self: Any, *args: Any, **kwargs: Any) -> Any:
            request = original(self, *args, **kwargs)
            with vllm_api.as_client_errors():
                Frontend.of(self).add_plan(request)
            return request

        return process

    def asked_for(engine: Any, prompt: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Frontend, Any, bool]:
        """The frontend, the LoRARequest of a request, and whether it names an adapter that must be loaded first."""
        frontend = Frontend.of(engine.input_processor)
        given = kwargs.get("lora_request", args[1] if len(args) > 1 else None)
        with vllm_api.as_client_errors():
            if isinstance(prompt, EngineCoreRequest) and frontend.folder_of(prompt.lora_request) is not None:
                raise ValueError("A request to a ReFT adapter must be given as a prompt, not as EngineCoreRequest.")
            return frontend, given, frontend.must_load(given)

    # vLLM's workers load an adapter when its first step runs, where an error ends the engine. So a ReFT adapter is
    # loaded before its first request is taken.
    def add_request(original: Callable) -> Callable:
        def add(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            _, given, must_load = asked_for(self, prompt, args, kwargs)
            if must_load:
                self.add_lora(given)
            return original(self, request_id, prompt, params, *args, **kwargs)

        return add

    def add_request_async(original: Callable) -> Callable:
        async def add(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
            frontend, given, must_load = asked_for(self, prompt, args, kwargs)
            if must_load:
                await self.add_lora(given)
            if frontend.folder_of(given) is None:
                return await original(self, request_id, prompt, params, *args, **kwargs)
            async with frontend.turns.of_request(given.lora_int_id):
                return await original(self, request_id, prompt, params, *args, **kwargs)

        return add

    def add_lora(original: Callable) -> Callable:
        def add(self: Any, lora_request: Any) -> Any:
            frontend = Frontend.of(self.input_processor)
            with vllm_api.as_client_errors():
                adapter = frontend.read(lora_request)
            if adapter is None:
                return original(self, lora_request)
            with vllm_api.as_client_errors(Exception):
                answer = original(self, lora_request)
                frontend.loaded(lora_request.lora_int_id, adapter)
            return answer

        return add

    def add_lora_async(original: Callable) -> Callable:
        async def add(self: Any, lora_request: Any) -> Any:
            frontend = Frontend.of(self.input_processor)
            async with frontend.turns.of_change(lora_request.lora_int_id):
                with vllm_api.as_client_errors():
                    adapter = frontend.read(lora_request)
                if adapter is None:
                    return await original(self, lora_request)
                with vllm_api.as_client_errors(Exception):
                    answer = await original(self, lora_request)
                    frontend.loaded(lora_request.lora_int_id, adapter)
                return answer

        return add

    def remove_lora(original: Callable) -> Callable:
        def remove(self: Any, lora_id: int) -> Any:
            answer = original(self, lora_id)
            Frontend.of(self.input_processor).forget(lora_id)
            return answer

        return remove

    def remove_lora_async(original: Callable) -> Callable:
        async def remove(self: Any, lora_id: int) -> Any:
            frontend = Frontend.of(self.input_processor)
            async with frontend.turns.of_change(lora_id):
                answer = await original(self, lora_id)
                frontend.forget(lora_id)
                return answer

        return remove

    def beam_search(original: Callable) -> Callable:
        def search(self: Any, prompt: Any, *args: Any, **kwargs: Any) -> Any:
            engine = self.llm_engine if hasattr(self, "llm_engine") else self.engine_client
            # lora_request is the third argument of LLM.beam_search, and the fourth over HTTP.
            for given in (*args, kwargs.get("lora_request")):
                if type(given).__name__ in ("LoRARequest", "list", "tuple"):
                    with vllm_api.as_client_errors():
                        Frontend.of(engine.input_processor).refuse_beam_search(given)
            return original(self, prompt, *args, **kwargs)

        return search

    wrap(InputProcessor, "process_inputs", process_inputs)
    wrap(LLMEngine, "add_request", add_request)
    wrap(AsyncLLM, "add_request", add_request_async)
    wrap(LLMEngine, "add_lora", add_lora)
    wrap(AsyncLLM, "add_lora", add_lora_async)
    wrap(LLMEngine, "remove_lora", remove_lora)
    wrap(AsyncLLM, "remove_lora", remove_lora_async)
    wrap(BeamSearchOfflineMixin, "beam_search", beam_search)
    wrap(BeamSearchOnlineMixin, "beam_search", beam_search)


def serve_over_http() -> None:
    """A ReFT adapter that can't be loaded is the client's error, 400, where vLLM answers 500. One that is unloaded is
    removed from the engine, where vLLM only forgets its name. vLLM's resolvers find ReFT adapters too."""
    try:
        from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    except ImportError:  # a worker of an installation without a server
        return
    from vllm.lora.request import LoRARequest
    from vllm.lora.utils import get_adapter_absolute_path
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    from . import adapters
    from .frontend import Frontend, without_load_inplace

    def is_readable_lora(folder: str) -> bool:
        try:
            return not adapters.is_reft(folder)
        except ValueError:
            return False

    def load_lora_adapter(original: Callable) -> Callable:
        async def load(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            answer = await original(self, request, *args, **kwargs)
            error = getattr(answer, "error", None)
            if error is not None and error.code == 500:
                if not is_readable_lora(get_adapter_absolute_path(request.lora_path)):
                    error.code, error.type = 400, "BadRequestError"
                    error.message = f"{request.lora_name!r} was not loaded. {error.message}"
            elif error is None:
                loaded = self.lora_requests[request.lora_name]
                if Frontend.of(self.input_processor).folder_of(loaded) is not None:
                    self.lora_requests[request.lora_name] = without_load_inplace(loaded)
            return answer

        return load

    def unload_lora_adapter(original: Callable) -> Callable:
        async def unload(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            named = self.lora_requests.get(request.lora_name)
            answer = await original(self, request, *args, **kwargs)
            if getattr(answer, "error", None) is None and Frontend.of(self.input_processor).folder_of(named):
                await self.engine_client.remove_lora(named.lora_int_id)
            return answer

        return unload

    def resolve(original: Callable) -> Callable:
        async def find(self: Any, lora_name: str, lora_path: str, base_model_name: str) -> Any:
            found = await original(self, lora_name, lora_path, base_model_name)
            if found is None and adapters.is_reft(lora_path) and adapters.base_of(lora_path) == base_model_name:
                found = LoRARequest(lora_name, abs(hash(lora_name)), lora_path)  # the caller gives it a number
            return found

        return find

    wrap(OpenAIServingModels, "load_lora_adapter", load_lora_adapter)
    wrap(OpenAIServingModels, "unload_lora_adapter", unload_lora_adapter)
    wrap(FilesystemResolver, "_get_lora_req_from_path", resolve)
