"""`rescale_adapter_scale`: PEFT's context manager of that name, for ReFT too.

PEFT's own looks for LoRA's layers alone, and raises an error for a model that has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from peft.helpers import rescale_adapter_scale as rescale_lora
from peft.tuners.lora import LoraLayer
from torch import nn

from ..tuner.layer import ReftLayer
from ..tuner.strength import check_scale


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Inside this context all adapters of the model, ReFT's and LoRA's, have another strength.

    Args:
        model (`torch.nn.Module`): The model.
        multiplier (`float`): The factor of the strengths. 0 computes what the base model does and 1 what the adapters
            were trained to, to the bit. Values between and beyond steer.

    Raises:
        TypeError: when `multiplier` is no number.
        ValueError: when it is not finite, when the model has no ReFT adapter, or when one is merged.

    Example:

        ```py
        >>> with rescale_adapter_scale(model, 0.5):
        ...     model.generate(**inputs)
        ```
    """
    check_scale(multiplier)
    layers = [module for module in model.modules() if isinstance(module, ReftLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no ReFT adapter. For LoRA alone, peft.helpers has this function."
        )
    lora = [module for module in model.modules() if isinstance(module, LoraLayer)]
    merged = sorted({name for layer in lora for name in layer.merged_adapters})
    if merged and multiplier != 1:
        raise ValueError(
            f"{', '.join(merged)}: LoRA adapters that are merged have their strength in the weights, where it can't "
            "change. Call unmerge_adapter() first."
        )
    before = [(layer, dict(layer.scaling)) for layer in layers]
    with ExitStack() as stack:
        if lora:
            stack.enter_context(rescale_lora(model, multiplier))
        try:
            for layer in layers:
                for name, strength in layer.scaling.items():
                    layer.set_scaling(name, strength * multiplier)
            yield
        finally:
            for layer, scaling in before:
                # An adapter that was added inside the context keeps its strength, and one that was deleted stays so.
                layer.scaling.update({name: scaling[name] for name in layer.scaling if name in scaling})
