"""The worker's part: keeps the adapters of a model, and before each step tells the layers which tokens to edit.

Dimensions: F tokens of the step, T tokens to edit of one request, G groups of weights, R rank.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peft_reft.tuner.interventions.apply import EditWeights

from .adapters import Adapter
from .layers import find_blocks, find_layout
from .operation import Job, Place, edited_class
from .plans import Plan


# A request's ReFT adapter by its number (0: none), its plan, the position of its first token in the step, and how many
# tokens it has there.
Request = tuple[int, Plan | None, int, int]


class EditedModel:
    """The decoder layers of one model in a worker, and the ReFT adapters that edit them.

    For each step worker_hooks.py calls `plan`, `start`, and after the model ran `finish`.

    Args:
        model (`torch.nn.Module`): The model, as vLLM loaded it.
        vllm_config (`vllm.config.VllmConfig`): The settings of the engine.

    Attributes:
        edits (`bool`): Whether the planned step has something to edit. It then can't replay a CUDA graph.

    Raises:
        ValueError: when the model's decoder layers can't be found, or return something unknown.
    """

    def __init__(self, model: nn.Module, vllm_config: Any) -> None:
        from vllm.config import CompilationMode

        model_config = vllm_config.model_config
        self.model, text = model, model_config.hf_text_config
        self.width, self.dtype = model_config.get_hidden_size(), model_config.dtype
        owner, blocks = find_blocks(model, text.num_hidden_layers)
        self.names = set(blocks)
        self.blocks = {name: block for name, block in blocks.items() if "PPMissingLayer" not in type(block).__name__}
        of_class = {type(block): block for block in self.blocks.values()}
        layouts = {find_layout(model.get_submodule(owner), block) for block in of_class.values()}
        if len(layouts) != 1:
            raise ValueError(
                f"ReFT adapters are not supported on {type(model).__name__}: its decoder layers return different "
                f"things ({', '.join(sorted(layouts))})."
            )
        (layout,), here = layouts, next(iter(self.blocks.values()))
        if self.dtype == torch.float16 and any(
            getattr(module, "routed_scaling_factor", None) not in (None, 1.0) for module in model.modules()
        ):
            raise ValueError(
                f"ReFT adapters are not supported on {type(model).__name__} in float16, in which vLLM divides its "
                "hidden states by routed_scaling_factor. Start the engine with --dtype bfloat16."
            )
        self.device = next(parameter.device for parameter in here.parameters())
        self.places = {name: Place(self.device) for name in self.blocks}
        # A model that is compiled is traced once, and so all its layers carry the operation. Otherwise only layers
        # with something to edit do, for the step, and all other steps run the code that they run without the plugin.
        self.traced = vllm_config.compilation_config.mode not in (None, CompilationMode.NONE)
        classes: dict[str, Any] = {name: type(block) for name, block in self.blocks.items()}
        self.classes = {name: (own, edited_class(own, layout, self.traced)) for name, own in classes.items()}
        for name, block in self.blocks.items():
            block.__dict__["_reft_place"] = self.places[name].tensor
        if self.traced:
            self._carry_operation(self.names)
        # Kept until vLLM removes the adapter by its id: vLLM's own cache drops adapters and reads them again from
        # their folders, which may have changed under the requests that run.
        self.adapters: dict[int, Adapter] = {}
        self.weights: dict[int, dict[str, EditWeights]] = {}
        self.edits = False
        self._planned: dict[str, list[Job]] = {}
        self._started: dict[str, list[Job]] = {}

    def _carry_operation(self, names: set[str]) -> None:
        for name, block in self.blocks.items():  # not by nn.Module's own __setattr__, which is slow
            object.__setattr__(block, "__class__", self.classes[name][name in names])

    def add(self, number: int, adapter: Adapter) -> None:
        """Add an adapter, or replace that of the same number.

        Raises:
            ValueError: when it is not one of this model, or edits modules other than decoder layers.
        """
        weights = adapter.weights_for(self.dtype, self.device)
        ready = {}
        for module, of_module in weights.items():
            name = self._name_here(module)
            if name not in self.names:
                raise ValueError(
                    f"The ReFT adapter {adapter.folder!r} edits {module!r}, which is no decoder layer of "
                    f"{type(self.model).__name__} ({', '.join(sorted(self.names)[:2])}, ... of {len(self.names)}). "
                    "vLLM serves edits of decoder layers alone."
                )
            width = of_module.R_QD.shape[-1]
            if width != self.width:
                raise ValueError(
                    f"The ReFT adapter {adapter.folder!r} edits states of width {width} in {module!r}, and the served "
                    f"model has {self.width}. It is an adapter of another model"
                    f" ({adapter.config.base_model_name_or_path})."
                )
            ready[name] = of_module
        self.adapters[number], self.weights[number] = adapter, ready

    def remove(self, number: int) -> None:
        self.adapters.pop(number, None)
        self.weights.pop(number, None)

    def _name_here(self, module: str) -> str:
        """The name of a module in vLLM, from its name in transformers."""
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        if mapper is None:
            return module
        # The mapper takes names of tensors, and may drop those that it does not know.
        mapped = mapper.get_rename_mapper()._map_name(f"{module}.weight")
        return module if mapped is None else mapped.removesuffix(".weight")

    def plan(self, requests: list[Request]) -> None:
        """Find out what the next step edits.

        Args:
            requests (`list[Request]`): The requests of the step, in the order of their tokens there.

        Raises:
            RuntimeError: when a request has an adapter and no plan, or one of another content of the adapter.
        """
        # Tokens of one adapter are edited together, whichever requests they belong to.
        tokens: dict[int, list[tuple[Plan, np.ndarray, np.ndarray]]] = {}
        row = 0
        for number, plan, start, count in requests:
            if number and (plan is None or plan.end is None or start < plan.end):
                self._check(self.adapters[number], plan)
                assert plan is not None
                positions, groups = plan.within(start, start + count)
                if len(positions):
                    tokens.setdefault(number, []).append((plan, positions - start + row, groups))
            row += count
        self._planned = {}
        for number, of_requests in tokens.items():
            adapter = self.adapters[number]
            edit, index_T = adapter.edit, self._on_device(np.concatenate([rows for _, rows, _ in of_requests]))
            scale_T1 = self._scale(of_requests)
            unused_of: dict[int, Tensor | None] = {}  # Q of a layer -> its mask
            for name, weights in self.weights[number].items():
                if name in self.blocks:
                    directions = len(weights.R_QD)
                    if directions not in unused_of:
                        unused_of[directions] = self._unused(adapter, of_requests, directions)
                    job = Job(index_T, edit, weights, unused_of[directions], scale_T1)
                    self._planned.setdefault(name, []).append(job)
        self.edits = bool(self._planned)

    def start(self) -> None:
        """Tell the layers what is planned. Without a plan since the last step, nothing is edited."""
        if not self.traced and self._planned.keys() != self._started.keys():
            self._carry_operation(set(self._planned))
        for name in self._started.keys() | self._planned.keys():
            self.places[name].start(self._planned.get(name, []))
        self._started, self._planned, self.edits = self._planned, {}, bool(self._planned)

    def finish(self) -> None:
        """See that the model, which has run, made all edits.

        Raises:
            RuntimeError: when it did not.
        """
        missing = [name for name in self._started if not self.places[name].done]
        if missing:
            raise RuntimeError(
                f"vLLM ran {type(self.model).__name__} without the edits of a ReFT adapter in {', '.join(missing)}. "
                "Its answers would be wrong. Start the engine with --enforce-eager, and report this, please."
            )

    @staticmethod
    def _check(adapter: Adapter, plan: Plan | None) -> None:
        if plan is None or plan.fingerprint != adapter.fingerprint:
            raise RuntimeError(
                f"A request to the ReFT adapter {adapter.folder!r} "
                + ("does not say which tokens are edited" if plan is None else "was made for another content of it")
                + ". Requests must go through LLM, LLMEngine or AsyncLLM."
            )

    def _on_device(self, values: np.ndarray) -> Tensor:
        """Copy to the device without waiting for it."""
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)

    def _unused(
        self, adapter: Adapter, of_requests: list[tuple[Plan, np.ndarray, np.ndarray]], directions: int
    ) -> Tensor | None:
        """[T, Q], the directions in which each token is not edited: those of the other group of weights, which lie
        side by side as in EditWeights, and those of unused subspaces."""
        groups = adapter.config.groups
        narrowed = any(plan.directions is not None for plan, _, _ in of_requests)
        if groups == 1 and not narrowed:
            return None
        rank = directions // groups
        unused = []
        for plan, rows, group_T in of_requests:
            unused_TGR = np.repeat((group_T[:, None] != np.arange(groups))[..., None], rank, axis=-1)
            if plan.directions is not None:
                unused_TGR |= ~np.array(plan.directions)
            unused.append(unused_TGR.reshape(len(rows), directions))
        return self._on_device(np.concatenate(unused))

    def _scale(self, of_requests: list[tuple[Plan, np.ndarray, np.ndarray]]) -> Tensor | None:
        """[T, 1], the strength of each token's edit. None: it is 1 everywhere."""
        if all(plan.scale == 1 for plan, _, _ in of_requests):
            return None
        scales = [np.full((len(rows), 1), plan.scale) for plan, rows, _ in of_requests]
        return self._on_device(np.concatenate(scales))


def requests_of(runner: Any, edited: EditedModel, counts: np.ndarray) -> list[Request]:
    """The requests of a step of model runner V1, as `EditedModel.plan` takes them.

    Args:
        runner (`GPUModelRunner`): The runner.
        edited (`EditedModel`): Its model.
        counts (`numpy.ndarray`): The number of tokens of each request in the step.
    """
    batch = runner.input_batch
    numbers = batch.request_lora_mapping[: len(counts)].tolist()
    if edited.adapters.keys().isdisjoint(numbers):
        return []
    requests: list[Request] = []
    for index, (name, number) in enumerate(zip(itertools.islice(batch.req_ids, len(counts)), numbers)):
        number = number if number in edited.adapters else 0
        plan = Plan.of(runner.requests[name].sampling_params) if number else None
        requests.append((number, plan, int(batch.num_computed_tokens_cpu[index]), int(counts[index])))
    return requests


def requests_of_v2(runner: Any, edited: EditedModel, plans: dict[str, Plan], state: Any) -> list[Request]:
    """The requests of a step of model runner V2, as `EditedModel.plan` takes them.

    Args:
        runner (`GPUModelRunner`): The runner.
        edited (`EditedModel`): Its model.
        plans (`dict[str, Plan]`): The plans of the requests that it has taken.
        state (`BatchReqState`): The requests of the step.
    """
    indices = state.idx_mapping_np
    numbers = runner.lora_state.lora_ids[indices].tolist()
    if edited.adapters.keys().isdisjoint(numbers):
        return []
    starts = runner.req_states.num_computed_tokens_np[indices].tolist()
    return [
        (number if number in edited.adapters else 0, plans.get(name), start, count)
        for name, number, start, count in zip(state.req_ids, numbers, starts, state.num_scheduled_tokens.tolist())
    ]
