"""The names of other methods' layers, LoRA's for example, inside the modules that ReFT wraps.

A ReftLayer around a block adds `base_layer.` to the names of all modules in the block. A LoRA adapter in the block
would then be saved under names that a model without ReFT does not have. So the layers of other methods keep the names
that they have without the ReftLayer: in `named_modules` (and therefore in `named_parameters`) and in the state dict.
All other names stay as torch makes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from .peft_api import BaseTunerLayer


WRAPPED = "base_layer."


def other_tuner_layers(wrapper: nn.Module) -> list[str]:
    """Names, within the `base_layer` of a ReftLayer, of the outermost layers of other methods."""
    names: list[str] = []
    for name, module in wrapper.base_layer.named_modules():  # type: ignore[union-attr]
        inside = any(name.startswith(f"{outer}.") for outer in names)
        if name and isinstance(module, BaseTunerLayer) and not isinstance(module, type(wrapper)) and not inside:
            names.append(name)
    return names


def without_wrapper(
    names: Iterator[tuple[str, nn.Module]], wrapper: nn.Module, prefix: str
) -> Iterator[tuple[str, nn.Module]]:
    """The `named_modules` of a ReftLayer, with the layers of other methods under the names that they have without it.

    Args:
        names (`Iterator`): Pairs of a name and a module, as torch's `named_modules` yields them.
        wrapper (`torch.nn.Module`): The ReftLayer.
        prefix (`str`): Its own name, with which torch's names begin.
    """
    wrapped_prefix = f"{prefix}.{WRAPPED}" if prefix else WRAPPED
    others = other_tuner_layers(wrapper)
    for name, module in names:
        inner = name.removeprefix(wrapped_prefix)
        if inner != name and _is_under(inner, others):
            name = f"{prefix}.{inner}" if prefix else inner
        yield name, module


def rename_saved(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """State dict hook of a ReftLayer: remove `base_layer.` from the names of other methods' layers."""
    others = other_tuner_layers(wrapper)
    wrapped_prefix = f"{prefix}{WRAPPED}"
    for key in [key for key in state_dict if others and key.startswith(prefix)]:
        inner = key.removeprefix(wrapped_prefix)
        renamed = inner != key and _is_under(inner, others)
        # Keys that keep their names are set again too: otherwise the renamed ones would move behind them.
        state_dict[prefix + inner if renamed else key] = state_dict.pop(key)


def rename_loaded(wrapper: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of a ReftLayer: add `base_layer.` to the names of other methods' layers."""
    others = other_tuner_layers(wrapper)
    for key in [key for key in state_dict if others and key.startswith(prefix)]:
        if _is_under(key.removeprefix(prefix), others):
            state_dict[f"{prefix}{WRAPPED}{key.removeprefix(prefix)}"] = state_dict.pop(key)


def _is_under(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)
