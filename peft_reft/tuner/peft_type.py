"""Registers the method REFT with PEFT.

PEFT has no plugin interface: `register_peft_method` refuses a name that the enum `PeftType` lacks. So `add_peft_type`
first gives the enum the member, with the same attributes that the standard library's enum module would set. A PEFT
that has ReFT built in does not need this file.
"""

from __future__ import annotations

from typing import Any

from .peft_api import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, register_peft_method


NAME = "REFT"


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`. A member that the enum lacks is added first."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # Python 3.12 looks members up as class attributes, 3.10 in the member map. type's __setattr__, because that of
    # EnumType refuses to set a member.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register a config and a tuner with PEFT under the name REFT. A second call with the same classes does nothing.

    Args:
        config_cls (`type`): ReftConfig.
        model_cls (`type`): ReftModel.

    Raises:
        RuntimeError: when another implementation of REFT is registered.
    """
    peft_type = add_peft_type(NAME)
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type), PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type)
    if registered == (None, None):
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls)
    elif registered != (config_cls, model_cls):
        raise RuntimeError(
            f"PEFT already has a method {NAME}, by {registered[0].__module__}. Uninstall one of the two, or, if it is "
            "PEFT's own, drop `import peft_reft`."
        )
