"""The worker's hooks: where vLLM loads adapters, says which requests are in a step, and runs the model.

Each model runner makes a plan of the step, starts it where it activates the step's LoRAs, and sees behind the model
that all was edited. A dummy step activates LoRAs too, without a plan, and so edits nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from peft_reft.tuner.versions import installed

from . import vllm_api
from .vllm_api import wrap


def serve_in_worker() -> None:
    """Put the worker's part where vLLM loads and removes adapters, and before and behind each step."""
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
            except ValueError as error:  # of ReFT adapters alone, when one is loaded
                self.lora_manager._reft_refusal = str(error)
            except Exception as error:
                self.lora_manager._reft_refusal = (
                    f"ReFT adapters are not supported on {type(model).__name__}, which is not built as the models "
                    f"that were tested: {type(error).__name__}: {error}"
                )
            return loaded

        return load

    def load_adapter(original: Callable) -> Callable:
        def load(self: Any, lora_request: Any) -> Any:
            number, edited = lora_request.lora_int_id, self._reft_model
            known = edited.adapters.get(number) if edited is not None else None
            # The core lets no other adapter have the number of one that is known. Its path is not looked at: the
            # folder may be gone, or a hub id may name a newer one.
            if known is None or lora_request.load_inplace:
                folder = get_adapter_absolute_path(lora_request.lora_path)
                if not adapters.is_reft(folder):
                    return original(self, lora_request)
                if edited is None:
                    raise ValueError(self._reft_refusal)
                edited.add(number, adapters.load(folder, self.lora_config.max_lora_rank))
            return LoRAModel(number, edited.adapters[number].config.r, {})

        return load

    def remove_lora(original: Callable) -> Callable:
        def remove(self: Any, lora_id: int) -> Any:
            edited = edited_of(self)
            if edited is not None:
                edited.remove(lora_id)
            return original(self, lora_id)

        return remove

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
        """vLLM finds compiled code by this hash. With the plugin it is another: code that was compiled without it, by
        another version of it, or in an engine whose settings it refuses, may lack the operation."""

        def compute(self: Any, *args: Any, **kwargs: Any) -> str:
            of_engine = original(self, *args, **kwargs)
            if self.lora_config is None:
                return of_engine
            try:
                vllm_api.refuse_settings(self)
            except ValueError:
                return of_engine
            salted = f"{of_engine} peft-reft {installed('peft-reft')} {SCHEMA}"
            return hashlib.sha256(salted.encode()).hexdigest()[: len(of_engine)]

        return compute

    def execute_model(original: Callable) -> Callable:
        def execute(self: Any, *args: Any, **kwargs: Any) -> Any:
            output = original(self, *args, **kwargs)
            edited = edited_of(self)
            if edited is not None:
                edited.finish()
            return output

        return execute

    wrap(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)
    wrap(LoRAModelRunnerMixin, "set_active_loras", set_active_loras)
    wrap(LoRAModelRunnerMixin, "_set_active_loras", set_mapping)
    wrap(LoRAModelRunnerMixin, "remove_lora", remove_lora)
    wrap(WorkerLoRAManager, "_load_adapter", load_adapter)
    wrap(LoRAModelManager, "_create_merged_loras_inplace", merge)
    wrap(v1.GPUModelRunner, "_determine_batch_execution_and_padding", determine)
    wrap(v1.GPUModelRunner, "execute_model", execute_model)
    wrap(v2.GPUModelRunner, "add_requests", add_requests)
    wrap(v2.GPUModelRunner, "gather_batch_req_state", gather_batch_req_state)
    wrap(v2.GPUModelRunner, "execute_model", execute_model)
    wrap(v2, "dispatch_cg_and_sync_dp", dispatch)
    wrap(VllmConfig, "compute_hash", compute_hash)
