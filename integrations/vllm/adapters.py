"""A ReFT adapter's folder: is it one, may it be served, what are its rules and weights.

Each process of vLLM that needs an adapter reads the folder by itself. The fingerprint of the folder's content tells
whether two processes read the same, and names the adapter in the keys of the prefix cache. This module checks with the
tuner's own loader and knows nothing of vLLM's model.

Dimensions: G groups of weights, R rank, D width of the hidden state.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from peft_reft import ReftConfig
from peft_reft.tuner.interventions.apply import Edit, EditWeights
from peft_reft.tuner.interventions.formulas import INTERVENTIONS, activation
from peft_reft.tuner.parameters.loading import NAME_OF_TENSOR, read
from peft_reft.tuner.peft_api import SAFETENSORS_WEIGHTS_NAME
from peft_reft.tuner.positions.spec import Rules


CONFIG_NAME = "adapter_config.json"
PEFT_PREFIX = "base_model.model."


def is_reft(folder: str) -> bool:
    """Whether a folder holds a ReFT adapter. False where it holds no config of an adapter.

    Raises:
        ValueError: when the config can't be read.
    """
    return _fields(folder).get("peft_type") == "REFT"


def base_of(folder: str) -> str | None:
    """The base model that an adapter's config names."""
    return _fields(folder).get("base_model_name_or_path")


def _fields(folder: str) -> dict[str, Any]:
    if not has_config(folder):
        return {}
    path = os.path.join(folder, CONFIG_NAME)
    try:
        with open(path) as file:
            return dict(json.load(file))
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG_NAME} can't be read: {error} ({path})") from error


def has_config(folder: str) -> bool:
    """Whether a folder holds an adapter of any kind."""
    return os.path.isfile(os.path.join(folder, CONFIG_NAME))


def stamp(folder: str) -> tuple[tuple[int, int], ...]:
    """What a change of the folder's files changes: the time and the size of each."""
    stats = (os.stat(os.path.join(folder, name)) for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME))
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


def fingerprint(folder: str) -> str:
    """A hash of what the folder's config and weights hold."""
    digest = hashlib.sha256()
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()[:32]


def refuse_change(folder: str, content: str) -> None:
    """Refuse a folder that does not hold any more what it held when its loading began.

    Args:
        folder (`str`): The folder.
        content (`str`): Its `fingerprint` then.

    Raises:
        ValueError: when it holds something else.
    """
    if fingerprint(folder) != content:
        raise ValueError(f"The ReFT adapter {folder!r} was written to while it was loaded. Load it again.")


@dataclass
class Adapter:
    """A ReFT adapter, as read from its folder.

    Args:
        folder (`str`): The folder.
        config (`ReftConfig`): Its config.
        fingerprint (`str`): `fingerprint(folder)`, of what was read.
        stamp (`tuple`): `stamp(folder)` when it was read.
        weights (`dict`): Name of a module -> letter R, W or b -> tensor.
        rules (`Rules`, *optional*): How it finds its tokens. None in a process that does not look for them.
    """

    folder: str
    config: ReftConfig
    fingerprint: str
    stamp: tuple[tuple[int, int], ...]
    weights: dict[str, dict[str, Tensor]] = field(repr=False)
    rules: Rules | None = None

    @property
    def edit(self) -> Edit:
        """What the adapter does to a hidden state. dropout is for training only."""
        return Edit(INTERVENTIONS[self.config.intervention], activation(self.config.act_fn))

    def weights_for(self, dtype: torch.dtype, device: torch.device) -> dict[str, EditWeights]:
        """The weights of each module, in the dtype in which the tuner edits hidden states of a dtype: bfloat16 for
        bfloat16, else float32 at least."""
        ready = {}
        for module, tensors in self.weights.items():
            wide = {
                letter: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
                for letter, tensor in tensors.items()
            }
            weights = EditWeights.of(self.edit, wide["R"], wide.get("W"), wide.get("b"))
            weights = weights.to(torch.bfloat16) if dtype == torch.bfloat16 else weights
            ready[module] = EditWeights(*(None if t is None else t.to(device) for t in weights))  # type: ignore[arg-type]
        return ready


def load(folder: str, max_rank: int) -> Adapter:
    """Read a ReFT adapter from its folder.

    Args:
        folder (`str`): The folder.
        max_rank (`int`): vLLM's `--max-lora-rank`.

    Raises:
        ValueError: when the folder can't be read, its config and weights do not fit each other or hold NaN, or the
            adapter needs something that is not served; naming the folder, the field and the way out.
    """
    try:
        read_at, content = stamp(folder), fingerprint(folder)
    except OSError as error:
        raise ValueError(f"The ReFT adapter {folder!r} can't be read: {error}") from error
    config: Any = ReftConfig.from_pretrained(folder)  # checks the weights too
    _refuse_fields(folder, config, max_rank)
    path = os.path.join(folder, SAFETENSORS_WEIGHTS_NAME)
    weights: dict[str, dict[str, Tensor]] = {}
    for name, tensor in read(path).items():
        match = NAME_OF_TENSOR.fullmatch(name)
        if match is None:
            raise ValueError(f"{path}: {name!r} is no tensor of an edit, and vLLM serves edits alone.")
        weights.setdefault((match["module"] or "").removeprefix(PEFT_PREFIX), {})[match["letter"]] = tensor
    refuse_change(folder, content)
    return Adapter(folder, config, content, read_at, weights)


def _refuse_fields(folder: str, config: ReftConfig, max_rank: int) -> None:
    for name in ("modules_to_save", "trainable_token_indices"):
        if getattr(config, name):
            raise ValueError(
                f"The ReFT adapter {folder!r} has {name}={getattr(config, name)!r}. vLLM serves the edits of hidden "
                "states alone, so it would not answer as it was trained to. Serve it by transformers."
            )
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ValueError(f"The ReFT adapter {folder!r} has task_type={str(config.task_type)!r}. Served is CAUSAL_LM.")
    largest = max([config.r, *config.rank_pattern.values()])
    if largest > max_rank:
        raise ValueError(
            f"The ReFT adapter {folder!r} has rank {largest}, above --max-lora-rank {max_rank}. Start the engine with "
            f"a --max-lora-rank of at least {largest}."
        )


def rules_of(adapter: Adapter, model_config: Any) -> Rules:
    """The rules by which an adapter finds its tokens in the prompts of a served model.

    Args:
        adapter (`Adapter`): The adapter.
        model_config (`vllm.config.ModelConfig`): The served model.

    Raises:
        ValueError: when its response template is text and no tokenizer can be loaded to find it.
    """

    def tokenizer() -> Any:
        name = adapter.config.tokenizer_name_or_path or model_config.tokenizer
        try:
            return AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"response_template={adapter.config.response_template!r} of {adapter.folder!r} is text, which needs a "
                f"tokenizer, and none could be loaded from {name!r}: {error}"
            ) from error

    generation = model_config.try_get_generation_config() or {}
    eos = generation.get("eos_token_id")
    if eos is None:
        eos = getattr(model_config.hf_config, "eos_token_id", None)
    return adapter.config.rules(tokenizer, eos, can_generate=True)
