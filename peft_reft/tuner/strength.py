"""The strength of an adapter: a factor of what its edits add to hidden states, as LoRA's scaling is of what LoRA adds.

This module knows LoraLayer's three methods that set it, and what a strength may be. layer.py hands it to the edit, and
interventions/apply.py multiplies.
"""

from __future__ import annotations

import math
from typing import Any


def is_strength(value: Any) -> bool:
    """Whether a value is a finite number."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def check_scale(scale: Any) -> float:
    """Check a factor of the strength, as `set_scale` takes it.

    Raises:
        TypeError: when it is no number.
        ValueError: when it is not finite.
    """
    if not is_strength(scale):
        kind = ValueError if isinstance(scale, float) else TypeError
        raise kind(
            f"scale={scale!r} is no strength of an edit. Allowed: a finite number. 0 is the base, 1 the adapter."
        )
    return scale


class Scalable:
    """The part of ReftLayer that sets the strengths of its adapters. The names are LoraLayer's, for code that calls
    them on the layers of any method, as diffusers does."""

    name: str
    scaling: dict[str, float]
    reft_config: dict[str, Any]
    merged_adapters: list[str]
    active_adapters: Any

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter to `scale` times that in its config, which is 1 unless it was set.

        Args:
            adapter (`str`): The adapter. As in LoraLayer, nothing happens if this layer does not have it.
            scale (`float`): 0 leaves the hidden states as they are, 1 edits as the adapter was trained to. Values
                between and beyond steer.

        Raises:
            TypeError: when `scale` is no number.
            ValueError: when `scale` is not finite, or when the adapter is merged.
        """
        check_scale(scale)
        if adapter in self.scaling:
            self.set_scaling(adapter, scale * self.reft_config[adapter].scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strengths of all active adapters.

        Raises:
            TypeError, ValueError: as in `set_scale`.
        """
        check_scale(scale)
        for name in self._own_active():
            self.set_scaling(name, self.scaling[name] * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the strengths of all active adapters, or, with None, take them back to those in their configs.

        Raises:
            TypeError, ValueError: as in `set_scale`, and for a division by 0.
        """
        if scale is not None and check_scale(scale) == 0:
            raise ValueError("scale=0 can't be divided by. unscale_layer() goes back to the strength in the config.")
        for name in self._own_active():
            self.set_scaling(name, self.reft_config[name].scale if scale is None else self.scaling[name] / scale)

    def _own_active(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.scaling]

    def set_scaling(self, adapter: str, strength: float) -> None:
        """Set the strength of an adapter of this layer, whatever is in its config.

        Raises:
            ValueError: when the adapter is merged.
        """
        if adapter in self.merged_adapters and strength != self.scaling[adapter]:
            raise ValueError(
                f"The adapter {adapter!r} is merged into {self.name!r} with the strength {self.scaling[adapter]}, "
                "which can't change there. Call unmerge_adapter() first."
            )
        self.scaling[adapter] = strength
