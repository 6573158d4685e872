"""How the keys of an axolotl YAML become a ReftConfig.

This module translates. It knows axolotl's keys and ReftConfig's fields, and nothing of models. axolotl need not be
installed: `peft-reft positions config.yaml` reads a YAML without.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from peft_reft import ReftConfig
from peft_reft.tuner.config import own_fields

from .validation import is_reft, own_name


# LoRA keys that mean the same for ReFT -> the field of ReftConfig that each one sets.
SHARED_KEYS = {
    "lora_r": "r",
    "lora_dropout": "dropout",
    "lora_modules_to_save": "modules_to_save",
    "peft_layers_to_transform": "layers_to_transform",
    "peft_layers_pattern": "layers_pattern",
    "peft_trainable_token_indices": "trainable_token_indices",
}
# LoRA keys that are about loading, the same for every adapter.
LOADING_KEYS = {"lora_model_dir", "lora_on_cpu", "peft_autocast_adapter_dtype"}
# Keys of LoRA alone. `peft:` holds LoftQ's settings, and nvfp4_merge_aware is about LoRA's matrices.
LORA_PREFIXES = ("lora_", "peft_", "loraplus_", "qlora_", "nvfp4_merge_aware")
LORA_KEYS = {"peft"}


# Fields that neither a LoRA key nor the `reft:` block sets.
SET_ELSEWHERE = {
    "intervention",  # by adapter:
    "tokenizer_name_or_path",  # by tokenizer_config:
    "width",  # by the model
}

OWN_FIELDS = own_fields()
BLOCK_FIELDS = [name for name in OWN_FIELDS if name not in {*SHARED_KEYS.values(), *SET_ELSEWHERE}]
# Keys of the `reft:` block that say what a training logs, and are no fields.
LOGGING_KEYS = ("debug", "log_edits")


def reft_config(cfg: Any, task_type: str | None = None) -> ReftConfig:
    """The ReftConfig that a YAML asks for.

    Args:
        cfg: axolotl's config, or anything with its keys as attributes.
        task_type (`str`, *optional*): PEFT's task type.

    Raises:
        ValueError: for values that ReftConfig refuses, with the YAML key's name.
    """
    settings: dict[str, Any] = {field: getattr(cfg, key, None) for key, field in SHARED_KEYS.items()}
    block = getattr(cfg, "reft", None)
    if block is not None:
        settings.update({field: getattr(block, field, None) for field in BLOCK_FIELDS})
    settings = {field: value for field, value in settings.items() if value is not None}
    tokenizer = getattr(cfg, "tokenizer_config", None)
    if "response_template" in settings and tokenizer and tokenizer != getattr(cfg, "base_model", None):
        settings["tokenizer_name_or_path"] = tokenizer
    try:
        return ReftConfig(intervention=cfg.adapter, task_type=task_type, **settings)
    except ValueError as error:
        keys = ", ".join(f"{key} sets {field}" for key, field in SHARED_KEYS.items() if field in settings)
        raise ValueError(f"{error} (In this YAML, adapter sets intervention, {keys}.)") from error


def _of_lora_alone(key: str) -> bool:
    return key in LORA_KEYS or key.startswith(LORA_PREFIXES)


def meaningless_keys(cfg: Any) -> list[str]:
    """The LoRA keys of a YAML that have no meaning for ReFT."""
    known = {*SHARED_KEYS, *LOADING_KEYS}
    return sorted(key for key, value in cfg.items() if _of_lora_alone(key) and key not in known and value)


def read_keys(keys: Any, source: str) -> SimpleNamespace:
    """A YAML as `reft_config` reads one, checked as far as that needs.

    Args:
        keys: What the YAML holds.
        source (`str`): Its file, for messages.

    Raises:
        ValueError: when it holds no keys, when its adapter is no ReFT adapter, or when its `reft:` block holds a key
            that ReFT does not know.
    """
    if not isinstance(keys, Mapping):
        raise ValueError(f"{source} holds no keys of an axolotl config, but {type(keys).__name__}.")
    adapter = own_name(keys.get("adapter"))
    if not is_reft(adapter):
        raise ValueError(f"{source} has adapter: {adapter}, which is not a ReFT adapter.")
    block = keys.get("reft") or {}
    allowed = [*BLOCK_FIELDS, *LOGGING_KEYS]
    unknown = [key for key in block if key not in allowed] if isinstance(block, Mapping) else [block]
    if unknown:
        raise ValueError(
            f"{source} has reft: {', '.join(map(str, unknown))}, which ReFT does not know. Allowed: "
            f"{', '.join(allowed)}."
        )
    return SimpleNamespace(**{**keys, "adapter": adapter, "reft": SimpleNamespace(**block)})
