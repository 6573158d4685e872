"""Adapters of other methods inside the modules that ReFT wraps, LoRA's for example.

A wrapper around a block is a level more in the names of all that lies inside. What an adapter inside is saved as would then
depend on the wrapper, and could not be loaded without it. So the layers of other methods keep the names that they have without
the wrapper: in `named_modules`, and with it in `named_parameters`, and in the state dict. Where there are none, nothing is renamed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .peft_api import BaseTunerLayer


WRAPPED = "base_layer."


def other_tuner_layers(wrapper: nn.Module) -> list[str]:
    """Names of the layers of other methods below a wrapper, from its `base_layer` on."""
    names: list[str] = []
    for name, module in wrapper.base_layer.named_modules():  # type: ignore[union-attr]
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and isinstance(module, BaseTunerLayer) and not isinstance(module, type(wrapper)) and not inside:
            names.append(name)
    return names


def without_wrapper(
    names: Iterator[tuple[str, nn.Module]], wrapper: nn.Module, prefix: str
) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of a wrapper, with the layers of other methods under the names that they have without it."""
    start = f"{prefix}.{WRAPPED}" if prefix else WRAPPED
    others = other_tuner_layers(wrapper)
    for name, module in names:
        inner = name.removeprefix(start)
        if inner != name and _is_under(inner, others):
            name = f"{prefix}.{inner}" if prefix else inner
        yield name, module


def rename_saved(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State dict hook: take the wrapper out of the names of other methods' layers."""
    others = other_tuner_layers(wrapper)
    start = f"{prefix}{WRAPPED}"
    for key in [key for key in state_dict if others and key.startswith(prefix)]:
        inner = key.removeprefix(start)
        renamed = inner != key and _is_under(inner, others)
        state_dict[prefix + inner if renamed else key] = state_dict.pop(key)  # all of them, for their order to stay


def rename_loaded(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: put the wrapper into the names of other methods' layers."""
    others = other_tuner_layers(wrapper)
    for key in [key for key in state_dict if others and key.startswith(prefix)]:
        if _is_under(key.removeprefix(prefix), others):
            state_dict[f"{prefix}{WRAPPED}{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _is_under(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
