"""The YAML keys that the plugin adds to axolotl's config, and their validation within axolotl's own.

What the keys mean stands in keys.py, which needs neither axolotl nor pydantic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Optional, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    create_model,
    field_validator,
)
from pydantic_core import core_schema

from peft_reft import ReftConfig
from peft_reft.tuner.interventions.formulas import INTERVENTIONS

from .keys import BLOCK_FIELDS, LOGGING_KEYS, OWN_FIELDS, reft_config
from .validation import is_reft, own_name, refuse_rows_without_subspaces, refuse_unknown_prompts, validated_as_lora


def _validate(data: Any, validate: Callable[[Any], Any]) -> Any:
    """Validate axolotl's whole config: by LoRA's rules, and then by ReFT's own, if `adapter:` is a ReFT adapter."""
    adapter = own_name(data.get("adapter")) if isinstance(data, dict) else None
    if not is_reft(adapter):
        model = validate(data)
        if model.reft is not None:
            raise ValueError(
                f"reft: is set, but adapter: {adapter} is not a ReFT adapter. Set adapter: to one of "
                f"{', '.join(INTERVENTIONS)}, or remove the reft: block."
            )
        return model
    model = validated_as_lora(data | {"adapter": adapter}, validate)
    config = reft_config(model)
    if getattr(model, "merge_lora", None):
        _check_merge(model, config)
    refuse_unknown_prompts(model, config)
    if config.subspaces is not None:
        refuse_rows_without_subspaces(model)
    return model


class _Block(BaseModel):
    """The optional `reft:` block: what LoRA has no key for. Each field is ReftConfig's of the same name, but for those
    that say what is logged."""

    model_config = ConfigDict(extra="forbid")

    debug: bool | None = Field(default=None, description="Log the edited tokens of a training batch, as --debug does.")
    log_edits: int | None = Field(
        default=None,
        ge=1,
        strict=True,
        description="Log the sizes of edits and the share of edited tokens every so many steps.",
    )

    @field_validator("*")
    @classmethod
    def check_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Let ReftConfig judge each value, so that a mistake stops axolotl before it loads a model."""
        # The sizes of subspaces add up to lora_r, which is not in this block.
        if value is not None and info.field_name not in (*LOGGING_KEYS, "subspaces"):
            ReftConfig(**{str(info.field_name): value})
        return value


def _optional(name: str, help_text: str) -> tuple[Any, Any]:
    """A key that may be left out, of the type of ReftConfig's field."""
    return Optional[get_type_hints(ReftConfig)[name]], Field(default=None, description=help_text)


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

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """Stand outside all of axolotl's validators: they see another `adapter:`, and ours is judged before and after.

        A validator of this class can't do it: pydantic runs those of axolotl's classes before and after them.
        """
        return core_schema.no_info_wrap_validator_function(_validate, handler(source))


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
