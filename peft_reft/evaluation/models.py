"""Loads the models that are compared: a base, and adapters of any PEFT method, one after the other on the same base.

This module loads a base, puts adapters on it and takes them off. It knows nothing of tasks, but for the number of
classes that a classifier needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import load_peft_weights
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from .generate import plain_generation
from .tasks import Glue


@dataclass(frozen=True)
class Adapter:
    """An adapter to evaluate.

    Args:
        name (`str`): Its name in the results.
        path (`str`): Its folder, or its name on the Hub.
        method (`str`): PEFT's name for its method, `"LORA"` for example.
        parameters (`int`): How many parameters it has, including those of a head that was trained with it.
        size (`int`): The bytes that the parameters take.
        keys (`frozenset[str]`): The names of its tensors.
    """

    name: str
    path: str
    method: str
    parameters: int
    size: int
    keys: frozenset[str]


def read_adapters(given: Sequence[str]) -> list[Adapter]:
    """Read the adapters that a user names.

    Args:
        given (`Sequence[str]`): Each `NAME=PATH`, or `PATH`: the name is then that of the last folder.

    Raises:
        ValueError: when there is no adapter at a path, or when two have the same name.
    """
    adapters: dict[str, Adapter] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = Path(text).name, text
        if not name or name == "base" or name in adapters:
            raise ValueError(
                f"--adapter {text}: the name {name!r} is taken or empty. Name each adapter by itself: --adapter "
                "NAME=PATH."
            )
        try:
            method = str(PeftConfig.from_pretrained(path).peft_type.value)
            weights = load_peft_weights(path, device="cpu")
        except Exception as error:  # PEFT raises many kinds: for no folder, no such name, another version's config
            raise ValueError(f"--adapter {text}: there is no adapter to read at {path}. {error}") from error
        parameters = sum(tensor.numel() for tensor in weights.values())
        size = sum(tensor.numel() * tensor.element_size() for tensor in weights.values())
        adapters[name] = Adapter(name, path, method, parameters, size, frozenset(weights))
    return list(adapters.values())


def load_tokenizer(base: str) -> Any:
    """The base's tokenizer. If it has no pad token, it pads with its end-of-text token.

    Raises:
        ValueError: when the tokenizer has neither.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"The tokenizer of {base} has no pad token and no end of text. Give it a pad token.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class Generators:
    """A base that generates, in memory once, and adapters that are put on it in turn.

    Args:
        base (`str`): The base's folder or hub name.
        tokenizer (`transformers.PreTrainedTokenizerBase`): Its tokenizer.
        dtype (`str`): `"auto"`, `"float32"`, `"bfloat16"`.
    """

    def __init__(self, base: str, tokenizer: Any, dtype: str) -> None:
        self._base, self._tokenizer, self._dtype = base, tokenizer, dtype
        self._model = self._load()
        self._fingerprint = fingerprint(self._model)

    @property
    def base(self) -> Any:
        """The base by itself."""
        return self._model

    @contextmanager
    def on_base(self, adapter: Adapter) -> Iterator[Any]:
        """The base with an adapter, which is taken off at the end.

        Some methods change the base's weights when they are loaded. The base is then loaded again.
        """
        model = PeftModel.from_pretrained(self._model, adapter.path)
        try:
            yield model
        finally:
            # Prompt tuning and its kin have no `unload`: they put tokens before the prompt and don't change the base.
            self._model = model.unload() if hasattr(model.base_model, "unload") else model.get_base_model()
            del model
            if fingerprint(self._model) != self._fingerprint:
                del self._model
                self._model = self._load()

    def _load(self) -> Any:
        model = AutoModelForCausalLM.from_pretrained(self._base, dtype=self._dtype, device_map=_device_map())
        model.generation_config = plain_generation(model, self._tokenizer)
        return model.eval()


def load_classifier(base: str, tokenizer: Any, task: Glue, dtype: str) -> tuple[Any, list[str]]:
    """A base with a classifier for a task.

    Returns:
        `tuple[torch.nn.Module, list[str]]`: The model, and the names of weights that its checkpoint does not
            have: those of a classifier that was never trained.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        base, dtype=dtype, num_labels=task.labels, device_map=_device_map(), output_loading_info=True
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval(), sorted(info["missing_keys"])


def with_head(model: Any, missing: list[str], adapter: Adapter, task: Glue) -> tuple[Any, list[str]]:
    """Put an adapter on a classifier that no other adapter uses: the adapter may bring a head of its own.

    Args:
        model (`torch.nn.Module`): The classifier.
        missing (`list[str]`): Names of the weights that the base's checkpoint does not have.
        adapter (`Adapter`): The adapter.
        task (`Glue`): The task, for its number of classes.

    Returns:
        `tuple[torch.nn.Module, list[str]]`: The adapted model, and the missing weights that the adapter does not
            bring.

    Raises:
        ValueError: when the adapter does not fit the base and the task's number of classes.
    """
    try:
        model = PeftModel.from_pretrained(model, adapter.path)
    except RuntimeError as error:
        raise ValueError(
            f"The adapter {adapter.name} does not fit the base with the {task.labels} classes of {task.name}: {error}"
        ) from error
    return model.eval(), [key for key in missing if f"base_model.model.{key}" not in adapter.keys]


def fingerprint(model: torch.nn.Module) -> dict[str, tuple[Any, ...]]:
    """Name to dtype, shape and sums of every weight: differs if a weight was changed, added or removed."""
    with torch.no_grad():
        return {
            name: (tensor.dtype, tensor.shape, float(tensor.double().sum()), float(tensor.double().abs().sum()))
            for name, tensor in model.state_dict().items()
            if isinstance(tensor, torch.Tensor)
        }


def _device_map() -> str | None:
    """transformers' `device_map`: over the accelerators, where there are any. None: the CPU."""
    return "auto" if torch.accelerator.is_available() else None
