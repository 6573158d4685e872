"""The YAML keys of the plugin, and how they and the LoRA keys become a ReftConfig.

This module translates and checks. It knows axolotl's keys and ReftConfig's fields, and nothing of models.
"""

from __future__ import annotations

from typing import Any, Optional, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator, model_validator
from typing_extensions import Self

from peft_reft import ReftConfig
from peft_reft.tuner.chat_template import AUTO
from peft_reft.tuner.config import own_fields
from peft_reft.tuner.interventions.formulas import INTERVENTIONS

from .template import WAYS_OUT, has_chats_alone


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
# Values of `rl:` whose trainers pass the model keys that a collator adds to a batch, `prompt_lengths` among them.
# Other trainers pass ids and masks only.
TOLD_BY_COLLATOR = ("dpo", "ipo", "kto")
LORA_PREFIXES = ("lora_", "peft_", "loraplus_", "qlora_")


# Fields that neither a LoRA key nor the `reft:` block sets.
SET_ELSEWHERE = {
    "intervention",  # by adapter:
    "tokenizer_name_or_path",  # by tokenizer_config:
    "width",  # by the model
    "subspaces",  # not yet: no row of axolotl's datasets can name one
}


class _Block(BaseModel):
    """The optional `reft:` block: what LoRA has no key for. Each field is ReftConfig's of the same name."""

    model_config = ConfigDict(extra="forbid")

    debug: bool | None = Field(default=None, description="Log the edited tokens of a training batch, as --debug does.")

    @field_validator("*")
    @classmethod
    def check_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Let ReftConfig judge each value, so that a mistake stops axolotl before it loads a model."""
        if value is not None and info.field_name != "debug":
            ReftConfig(**{str(info.field_name): value})
        return value


def _optional(name: str, help_text: str) -> tuple[Any, Any]:
    """A key that may be left out, of the type of ReftConfig's field."""
    return Optional[get_type_hints(ReftConfig)[name]], Field(default=None, description=help_text)


OWN_FIELDS = own_fields()
BLOCK_FIELDS = [name for name in OWN_FIELDS if name not in {*SHARED_KEYS.values(), *SET_ELSEWHERE}]
ReftBlock = create_model(
    "ReftBlock",
    __base__=_Block,
    __doc__=_Block.__doc__,
    **{name: _optional(name, OWN_FIELDS[name].metadata["help"]) for name in BLOCK_FIELDS},  # type: ignore[call-overload]
)


class _Args(BaseModel):
    """What the plugin adds to axolotl's config."""

    reft: Any
    # Set by `--debug`, which overrides a YAML's `debug:`. axolotl drops keys that nothing declares.
    debug: bool | None = Field(default=None, description="Log the edited tokens of a training batch.")

    @model_validator(mode="before")
    @classmethod
    def check_loading(cls, data: Any) -> Any:
        """Check loading in 4 bits before axolotl does: its messages advise on LoRA only."""
        if isinstance(data, dict) and is_reft(data.get("adapter")) and data.get("load_in_4bit"):
            _check_base_can_be_loaded(data)
        return data

    @model_validator(mode="after")
    def check_reft(self) -> Self:
        adapter = getattr(self, "adapter", None)
        if is_reft(adapter):
            config = reft_config(self)
            if getattr(self, "merge_lora", None):
                _check_merge(self, config)
            _check_optimizer(self)
            _check_prompts_are_known(self, config)
        elif self.reft is not None:
            raise ValueError(
                f"reft: is set, but adapter: {adapter} is not a ReFT adapter. Set adapter: to one of "
                f"{', '.join(INTERVENTIONS)}, or remove the reft: block."
            )
        return self


ReftArgs = create_model(
    "ReftArgs",
    __base__=_Args,
    __doc__=_Args.__doc__,
    reft=(
        Optional[ReftBlock],
        Field(default=None, description="Settings of a ReFT adapter that LoRA has no key for."),
    ),
)


def _check_merge(cfg: Any, config: ReftConfig) -> None:
    """`axolotl merge-lora`: stop before anything is written. Whether each layer can be merged, PEFT checks later."""
    if not config.spec.all_tokens:
        raise ValueError(
            f"adapter: {cfg.adapter} can't be merged into the base model: it edits hidden states at chosen positions, "
            "and no change of a weight does that. Nothing was written. Load the adapter beside its base model "
            "instead: `axolotl inference --lora-model-dir ...`, or PeftModel.from_pretrained(base, adapter_dir)."
        )
    method = getattr(cfg, "merge_method", None)
    if str(getattr(method, "value", method)) != "legacy":
        raise ValueError(
            f"merge_method: {method or 'memory_efficient'} adds up LoRA's matrices file by file, and knows no other "
            "adapter. Nothing was written. Set merge_method: legacy, which has PEFT merge the loaded model."
        )


def _check_optimizer(cfg: Any) -> None:
    """Refuse optimizers for matrices alone. axolotl would stop at the first step, with a bare number for a message."""
    optimizer = getattr(cfg, "optimizer", None)
    name = str(getattr(optimizer, "value", optimizer))
    if name.startswith("muon"):
        raise ValueError(
            f"optimizer: {name} steps matrices, and the weights of adapter: {cfg.adapter} have three dimensions. Set "
            "optimizer: adamw_torch_fused, or adamw_8bit."
        )


def _check_prompts_are_known(cfg: Any, config: ReftConfig) -> None:
    """Refuse settings of axolotl with which nothing says where prompts end, before anything is loaded. Where chat
    templates may say it, they are looked at when the datasets are loaded (template.py)."""
    if config.spec.all_tokens or config.response_template not in (None, AUTO):
        return
    if getattr(cfg, "train_on_inputs", None) and not has_chats_alone(cfg):
        raise ValueError(
            "train_on_inputs: true leaves no label masked, so labels do not say where prompts end, and ReFT edits "
            f"tokens of the prompt. Set train_on_inputs: false. {WAYS_OUT}"
        )


def _check_base_can_be_loaded(data: dict) -> None:
    """Refuse ways of loading a 4-bit base that axolotl has for `adapter: qlora` only, and name one for ReFT."""
    if data.get("nf4_backend") == "torchao":
        raise ValueError(
            f"nf4_backend: torchao is for adapter: qlora alone, not for adapter: {data['adapter']}. Remove "
            "nf4_backend: bitsandbytes, the default, quantizes the base to 4 bits of the same kind (NF4)."
        )
    fsdp = data.get("fsdp_config") or {}
    if fsdp.get("cpu_ram_efficient_loading") or fsdp.get("fsdp_cpu_ram_efficient_loading"):
        raise ValueError(
            "fsdp_config: cpu_ram_efficient_loading: true with load_in_4bit: true is for adapter: qlora alone (from "
            f"axolotl 0.21 on; before, for none), not for adapter: {data['adapter']}, and "
            "qlora_sharded_model_loading: true does not change that. Set fsdp_config: cpu_ram_efficient_loading: "
            "false: every process then loads and quantizes the base by itself. Or keep it, and remove load_in_4bit."
        )


def is_reft(adapter: str | None) -> bool:
    """Whether an `adapter:` of a YAML is a ReFT adapter."""
    return adapter in INTERVENTIONS


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


def meaningless_keys(cfg: Any) -> list[str]:
    """The LoRA keys of a YAML that have no meaning for ReFT."""
    known = {*SHARED_KEYS, *LOADING_KEYS}
    return sorted(key for key, value in cfg.items() if key.startswith(LORA_PREFIXES) and key not in known and value)
