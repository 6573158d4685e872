"""The base model without its weights: which modules and parameters it has, and which modules are a trained head.

Only the base model's config is read, and the model is made on the meta device, so that a large one costs no memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
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
class BaseModel:
    """A base model on the meta device.

    Args:
        name (`str`): Its folder or hub name.
        model (`torch.nn.Module`): The model.
        task_type (`str`, *optional*): PEFT's name of the task that the model's class is for.
    """

    name: str
    model: nn.Module
    task_type: str | None

    @property
    def model_class(self) -> str:
        """The name of the model's class in transformers."""
        return type(self.model).__name__

    @cached_property
    def modules(self) -> list[str]:
        """Names of its modules, in order."""
        return [name for name, _ in self.model.named_modules()]

    @cached_property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names, tied ones under each of their names."""
        return dict(self.model.named_parameters(remove_duplicate=False))

    def find_module(self, source: str, *names: str) -> str:
        """The first of these names that a module of the model has.

        Args:
            source (`str`): The folder of the checkpoint that edits the module.
            names (`str`): Names that the module may have, the checkpoint's own first.

        Raises:
            ValueError: when there is no such module, naming the checkpoint's own name and the base model.
        """
        for name in names:
            if name in self.modules:
                return name
        raise ValueError(
            f"{source} edits {names[0]!r}, and base_model={self.name!r}, a {self.model_class}, has no such module. "
            "Give the base model that the checkpoint was trained on."
        )

    def refuse_unknown_weights(self, names: Iterable[str], source: str, reason: str) -> None:
        """Refuse trained weights that the base model does not have.

        Args:
            names (`Iterable[str]`): Names of the trained weights.
            source (`str`): The folder or file they come from.
            reason (`str`): Why such a weight can't be converted, and the way out: the end of the message.

        Raises:
            ValueError: naming the weight.
        """
        for name in names:
            if name not in self._parameters:
                raise ValueError(f"{source}: {name!r} is no weight of a {self.model_class}. {reason}")

    def refuse_decoder(self, modules: list[str]) -> None:
        """Refuse edits outside the encoder of an encoder-decoder model.

        Raises:
            ValueError: naming the module.
        """
        encoder = encoder_of(self.model)
        if encoder is None:
            return
        inside = set(encoder.modules())
        for name in modules:
            if self.model.get_submodule(name) not in inside:
                raise ValueError(
                    f"The checkpoint edits {name!r}, which lies outside the encoder of a {self.model_class}. Edits of "
                    "decoders of encoder-decoder models can't be converted: their prompt is not the encoder's."
                )

    def heads(self, tensors: dict[str, Tensor], source: str) -> list[str]:
        """The modules that these trained tensors make up, for `modules_to_save`: PEFT trains and saves whole modules.

        Args:
            tensors (`dict[str, torch.Tensor]`): Trained weights of the base model, by their names.
            source (`str`): The folder they come from.

        Returns:
            `list[str]`: Names of modules, each the largest whose weights are all among the tensors.

        Raises:
            ValueError: when a tensor is none of the model's, is shared, or when the rest of its module was not
                trained.
        """
        self.refuse_unknown_weights(
            tensors,
            source,
            "If the base model was loaded for a task in training, say which: task_type='SEQ_CLS' for a classifier. "
            "Weights of other methods, LoRA's for example, can't be converted.",
        )
        for name in tensors:
            if [self._parameters[name] is other for other in self._parameters.values()].count(True) > 1:
                raise ValueError(
                    f"{source}: {name!r} is shared with another module of the {self.model_class} (tied embeddings), "
                    "so PEFT can't save it with one of them. Leave it out, if it was not trained: with_head=False "
                    "(--no-head)."
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
                    f"{source}: {name!r} was trained, and other weights of {parent or self.model_class!r} were not. "
                    "PEFT saves modules whole, so that can't be converted. Leave it out with with_head=False "
                    "(--no-head), and load it into the base model yourself."
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
        """Names of the parameters below a module: seen from the module, or from the model."""
        below = {name for name, _ in self.model.get_submodule(module).named_parameters(remove_duplicate=False)}
        return below if relative else {f"{module}.{name}" for name in below}

    def _covers(self, module: str, tensors: dict[str, Tensor]) -> bool:
        """Whether the tensors are all parameters of a module."""
        return self._names_below(module) <= tensors.keys()


def load_base_model(base_model: str, task_type: str | None = None, model_class: str | None = None) -> BaseModel:
    """The base model without its weights.

    Args:
        base_model (`str`): Its folder or hub name.
        task_type (`str`, *optional*): The task that it is loaded for, `"SEQ_CLS"` for example. None: the class
            decides.
        model_class (`str`, *optional*): Its class in transformers, where a checkpoint names one. None: the class that
            the base model's own config names.

    Raises:
        ValueError: when there is no such model, or when transformers has no such class, naming the task and the model.
    """
    try:
        config = AutoConfig.from_pretrained(base_model)
    except OSError as error:
        raise ValueError(
            f"base_model={base_model!r}: neither a folder with a config.json here nor a model that the Hub gives. "
            "Give the base model's folder or hub name (--base-model)."
        ) from error
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
            f"task_type={task_type!r}: it asks for {name!r}. Say what the model was loaded for in training, for "
            "example task_type='CAUSAL_LM' or 'SEQ_CLS'."
        )
    with torch.device("meta"):
        model = kind(config)
    return BaseModel(base_model, model, task_type or _task_of(kind.__name__))


def name_of_base(given: str | None, recorded: Any, folder: Path) -> str:
    """The base model that the user gives, else the one that a checkpoint names.

    Raises:
        ValueError: when neither does.
    """
    name = given or recorded
    if not name:
        raise ValueError(
            f"base_model=None, and {folder} names no base model: give its folder or hub name (--base-model)."
        )
    return name


def _task_of(class_name: str) -> str | None:
    for task, names in _CLASSES_OF_TASK.items():
        for value in names.values():
            if class_name == value or isinstance(value, (list, tuple)) and class_name in value:
                return task.value
    return None
