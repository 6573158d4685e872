"""Makes PEFT know the method REFT, as if it were one of its own.

PEFT has no plugin interface: `register_peft_method` refuses a name that the closed enum `PeftType` lacks. So the member
is added first, in the way of the standard library's own enum module. A PEFT that has ReFT built in does not need this file.
"""

from __future__ import annotations

from typing import Any

from .peft_api import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftType, register_peft_method


NAME = "REFT"


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType[name]`, added to the enum if it is not there yet."""
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    # Python 3.12 looks members up as class attributes, 3.10 in the member map. EnumType.__setattr__ would refuse.
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def register(config_cls: type[Any], model_cls: type[Any]) -> None:
    """Register a config and a tuner with PEFT under the name REFT. Does nothing when they are registered already.

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
