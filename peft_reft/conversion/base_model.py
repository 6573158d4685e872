"""The base model without its weights: which modules it has, and which of them a checkpoint's other tensors are.

Only the base model's config is read, and the model is made on the meta device, so that a large one costs no memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import TaskType
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from ..tuner.forward.transformers_api import encoder_of


_CLASSES_OF_TASK: dict[TaskType, dict[str, Any]] = {
    TaskType.SEQ_CLS: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TaskType.TOKEN_CLS: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    TaskType.QUESTION_ANS: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    TaskType.SEQ_2_SEQ_LM: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    TaskType.CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    TaskType.FEATURE_EXTRACTION: modeling_auto.MODEL_MAPPING_NAMES,
}


@dataclass
class Skeleton:
    """A base model on the meta device.

    Args:
        name (`str`): Its folder or hub name.
        model (`torch.nn.Module`): The model.
        task_type (`str`, *optional*): PEFT's name of what its class is for.
    """

    name: str
    model: nn.Module
    task_type: str | None

    @property
    def model_class(self) -> str:
        return type(self.model).__name__

    @property
    def modules(self) -> list[str]:
        """Names of its modules, in order."""
        return [name for name, _ in self.model.named_modules()]

    def refuse_decoder(self, modules: list[str]) -> None:
        """
        Raises:
            ValueError: when a module lies outside the encoder of an encoder-decoder model.
        """
        encoder = encoder_of(self.model)
        if encoder is None:
            return
        inside = set(encoder.modules())
        for name in modules:
            if self.model.get_submodule(name) not in inside:
                raise ValueError(
                    f"The checkpoint edits {name!r}, which lies outside the encoder of a {self.model_class}. Edits of decoders of "
                    "encoder-decoder models can't be converted: their prompt is not the encoder's."
                )

    def heads(self, tensors: dict[str, Tensor], source: str) -> list[str]:
        """The modules that these trained tensors are, whole. PEFT trains and saves whole modules only.

        Args:
            tensors (`dict[str, torch.Tensor]`): Trained weights of the base model, by their names.
            source (`str`): The file they come from.

        Raises:
            ValueError: when a tensor is none of the model's, is shared, or when the rest of its module was not trained.
        """
        known = dict(self.model.named_parameters(remove_duplicate=False))
        for name in tensors:
            if name not in known:
                raise ValueError(
                    f"{source}: {name!r} is no weight of a {self.model_class}. If the base model was loaded for a task in training, "
                    "say which: task_type='SEQ_CLS' for a classifier. Weights of other methods, LoRA's for example, can't be converted."
                )
            if [known[name] is other for other in known.values()].count(True) > 1:
                raise ValueError(
                    f"{source}: {name!r} is shared with another module of the {self.model_class} (tied embeddings), so PEFT can't "
                    "save it with one of them. Leave it out, if it was not trained: with_head=False (--no-head)."
                )
        heads: list[str] = []
        for name in tensors:
            parent = name.rpartition(".")[0]
            if any(name.startswith(f"{head}.") for head in heads):
                continue
            while (above := parent.rpartition(".")[0]) and self._covers(above, tensors):
                parent = above
            if not parent or not self._covers(parent, tensors):
                raise ValueError(
                    f"{source}: {name!r} was trained, and other weights of {parent or self.model_class!r} were not. PEFT saves "
                    "modules whole, so that can't be converted. Leave it out with with_head=False (--no-head), and load it into the "
                    "base model yourself."
                )
            heads.append(parent)
        for head in heads:
            others = [name for name in self.modules if name.endswith(head) and name != head]
            buffers = list(self.model.get_submodule(head).state_dict().keys() - self._names_below(head, relative=True))
            if others or buffers:
                raise ValueError(
                    f"{source}: {head!r} can't be saved by PEFT's modules_to_save: "
                    + (f"the name fits {others[0]!r} too." if others else f"the file lacks its buffer {buffers[0]!r}.")
                    + " Leave it out with with_head=False (--no-head), and load it into the base model yourself."
                )
        return heads

    def _names_below(self, module: str, relative: bool = False) -> set[str]:
        below = {name for name, _ in self.model.get_submodule(module).named_parameters(remove_duplicate=False)}
        return below if relative else {f"{module}.{name}" for name in below}

    def _covers(self, module: str, tensors: dict[str, Tensor]) -> bool:
        return self._names_below(module) <= tensors.keys()


def load_skeleton(base_model: str, task_type: str | None = None, model_class: str | None = None) -> Skeleton:
    """The base model without its weights.

    Args:
        base_model (`str`): Its folder or hub name.
        task_type (`str`, *optional*): What it is loaded for, `"SEQ_CLS"` for example. None: what it was saved for.
        model_class (`str`, *optional*): Its class in transformers, where a checkpoint tells.

    Raises:
        ValueError: when transformers has no such class, naming the task and the model.
    """
    config = AutoConfig.from_pretrained(base_model)
    if task_type is not None:
        allowed = [task.value for task in _CLASSES_OF_TASK]
        if task_type not in allowed:
            raise ValueError(f"task_type={task_type!r} is not allowed. Allowed: {', '.join(allowed)}.")
        name: Any = _CLASSES_OF_TASK[TaskType(task_type)].get(config.model_type)
    else:
        name = model_class or next(iter(config.architectures or ()), None)
    if isinstance(name, (list, tuple)):
        name = name[0]
    kind = getattr(transformers, name, None) if name else None
    if kind is None:
        raise ValueError(
            f"transformers has no class for base_model={base_model!r} (model_type={config.model_type!r}) with "
            f"task_type={task_type!r}: it asks for {name!r}. Say what the model was loaded for in training, for example "
            "task_type='CAUSAL_LM' or 'SEQ_CLS'."
        )
    with torch.device("meta"):
        model = kind(config)
    return Skeleton(base_model, model, task_type or _task_of(kind.__name__))


def _task_of(class_name: str) -> str | None:
    for task, names in _CLASSES_OF_TASK.items():
        for value in names.values():
            if class_name == value or isinstance(value, (list, tuple)) and class_name in value:
                return task.value
    return None
