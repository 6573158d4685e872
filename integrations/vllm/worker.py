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
from .layers import Job, Layout, edited_class, find_blocks, find_layout
from .plans import Plan


class EditedModel:
    """The decoder layers of one model in a worker, and the ReFT adapters that edit them.

    Args:
        model (`torch.nn.Module`): The model, as vLLM loaded it.
        model_config (`vllm.config.ModelConfig`): Its config.
    """

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        self.model, text = model, model_config.hf_text_config
        self.width, self.dtype = model_config.get_hidden_size(), model_config.dtype
        owner, self.blocks = find_blocks(model, text.num_hidden_layers)
        here = [block for block in self.blocks.values() if "PPMissingLayer" not in type(block).__name__]
        self.layout: Layout = find_layout(model.get_submodule(owner), here[0])
        self.device = next(parameter.device for parameter in here[0].parameters())
        self.classes = {name: type(block) for name, block in self.blocks.items()}
        # Kept until vLLM removes the adapter by its id: vLLM's own cache drops adapters and reads them again from
        # their folders, which may have changed under the requests that run.
        self.adapters: dict[int, Adapter] = {}
        self.weights: dict[int, dict[str, EditWeights]] = {}
        self._edited: set[str] = set()

    def add(self, number: int, adapter: Adapter) -> None:
        """Add an adapter, or replace that of the same number.

        Raises:
            ValueError: when it is not one of this model, or edits modules other than decoder layers.
        """
        weights = adapter.weights_for(self.dtype, self.device)
        ready = {}
        for module, of_module in weights.items():
            name = self._name_here(module)
            if name not in self.blocks:
                raise ValueError(
                    f"The ReFT adapter {adapter.folder!r} edits {module!r}, which is no decoder layer of "
                    f"{type(self.model).__name__} ({', '.join(list(self.blocks)[:2])}, ... of {len(self.blocks)}). "
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

    def prepare(self, requests: list[tuple[int, Plan | None, int, int]]) -> None:
        """Tell the layers what to edit in the next step.

        Args:
            requests (`list`): For each request of the step, in the order of its tokens there: the number of its ReFT
                adapter or 0, its plan, the position of its first token in the step, and how many it has there.

        Raises:
            RuntimeError: when a request has an adapter and no plan, or one of another content of the adapter.
        """
        jobs: dict[str, list[Job]] = {}
        row = 0
        for number, plan, start, count in requests:
            if number and (plan is None or plan.end is None or start < plan.end):
                adapter = self.adapters[number]
                self._check(adapter, plan)
                assert plan is not None
                self._add_jobs(jobs, number, adapter, plan, row, start, count)
            row += count
        for name in self._edited - jobs.keys():
            self.blocks[name].__class__ = self.classes[name]
            self.blocks[name].__dict__.pop("_reft_jobs")
        for name, of_block in jobs.items():
            block = self.blocks[name]
            block.__dict__.update(_reft_jobs=of_block, _reft_layout=self.layout)
            block.__class__ = edited_class(self.classes[name])  # type: ignore
        self._edited = set(jobs)

    @staticmethod
    def _check(adapter: Adapter, plan: Plan | None) -> None:
        if plan is None or plan.fingerprint != adapter.fingerprint:
            raise RuntimeError(
                f"A request to the ReFT adapter {adapter.folder!r} "
                + ("does not say which tokens are edited" if plan is None else "was made for another content of it")
                + ". Requests must go through LLM, LLMEngine or AsyncLLM."
            )

    def _add_jobs(
        self, jobs: dict[str, list[Job]], number: int, adapter: Adapter, plan: Plan, row: int, start: int, count: int
    ) -> None:
        positions, groups = plan.within(start, start + count)
        if len(positions) == 0:
            return
        index_T = torch.from_numpy(positions - start + row).to(self.device)
        unused_TGR = self._unused(adapter, plan, groups)
        for name, weights in self.weights[number].items():
            if "PPMissingLayer" not in self.classes[name].__name__:
                jobs.setdefault(name, []).append(Job(index_T, adapter.edit, weights, unused_TGR))

    def _unused(self, adapter: Adapter, plan: Plan, groups: np.ndarray) -> Tensor | None:
        """The directions in which each token is not edited: those of the other group and of unused subspaces."""
        unused = None
        if adapter.config.groups == 2:
            own_T = torch.from_numpy(groups).to(self.device)
            unused = (own_T[:, None] != torch.arange(2, device=self.device))[..., None]
        if plan.directions is not None:
            unused_1R = ~torch.tensor(plan.directions, device=self.device)[None, None]
            unused = unused_1R.expand(len(groups), -1, -1) if unused is None else unused | unused_1R
        return unused


def requests_of(runner: Any, edited: EditedModel, counts: np.ndarray) -> list[tuple[int, Plan | None, int, int]]:
    """The requests of a step of model runner V1, as `EditedModel.prepare` takes them.

    Args:
        runner (`GPUModelRunner`): The runner.
        edited (`EditedModel`): Its model.
        counts (`numpy.ndarray`): The number of tokens of each request in the step.
    """
    batch = runner.input_batch
    requests = []
    for index, (name, count) in enumerate(zip(itertools.islice(batch.req_ids, len(counts)), counts)):
        number = int(batch.request_lora_mapping[index])
        number = number if number in edited.adapters else 0
        plan = Plan.of(runner.requests[name].sampling_params) if number else None
        requests.append((number, plan, int(batch.num_computed_tokens_cpu[index]), int(count)))
    return requests
