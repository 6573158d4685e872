"""The settings of one run. This module knows what makes two runs the same, and nothing of models or tasks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from peft_reft.tuner.interventions.formulas import INTERVENTIONS


COMMON = ("task", "method", "seed", "examples", "epochs", "rate", "weight_decay")
ADAPTER = ("rank", "layers", "dropout")
EDIT = ("positions", "first_token", "share_weights", "init")
METHODS = ("base", "head", "full", "lora", *INTERVENTIONS)


@dataclass(frozen=True)
class Run:
    """The settings of a run.

    Args:
        task (`str`): A key of `tasks.TASKS`.
        method (`str`): An intervention of ReFT, `"lora"`, `"full"`, `"head"` (the classifier alone) or `"base"` (no
            training).
        seed (`int`): Draws the training examples, their order and the initial weights. The test examples are the same
            for all.
        examples (`int`): The number of training examples.
        epochs (`int`): How often each is seen.
        rate (`float`): The learning rate at its peak.
        weight_decay (`float`): AdamW's.
        rank (`int`): The rank of the edit, or of LoRA, whose alpha is twice the rank.
        layers (`str`): The layers with an adapter, as `methods.layer_indices` names them.
        dropout (`float`): ReFT's on the edited state, LoRA's on the input of A.
        positions (`str`): ReFT's positions.
        first_token (`bool`): Whether the first tokens that are edited include the first token of the sequence.
        share_weights (`bool`): Whether the first and the last tokens share weights.
        init (`str`): `"base"`: the adapted model starts as the base. `"pyreft"`: pyreft's random start.
    """

    task: str
    method: str
    seed: int = 1
    examples: int = 0
    epochs: int = 1
    rate: float = 1e-3
    weight_decay: float = 0.0
    rank: int = 8
    layers: str = "all"
    dropout: float = 0.0
    positions: str = "f7+l7"
    first_token: bool = True
    share_weights: bool = False
    init: str = "base"

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r}: there are {', '.join(METHODS)}.")

    @property
    def is_reft(self) -> bool:
        """Whether the method is an intervention of ReFT."""
        return self.method in INTERVENTIONS

    def described(self) -> dict[str, Any]:
        """The settings that the method reads. Runs that differ in others are the same run."""
        if self.method == "base":
            return {"task": self.task, "method": "base"}
        names: tuple[str, ...] = COMMON
        if self.is_reft or self.method == "lora":
            names += ADAPTER
        if self.is_reft:
            names += EDIT
        return {name: value for name, value in asdict(self).items() if name in names}

    @property
    def key(self) -> str:
        """A text that two runs share exactly where they are the same run."""
        return key_of(self.described())


def key_of(settings: dict[str, Any]) -> str:
    """The key of a run by its settings, as a record has them. Numbers that are equal are written alike."""
    return json.dumps({name: as_number(value) for name, value in settings.items()}, sort_keys=True)


def as_number(value: Any) -> Any:
    """A number as a float, and any other value as it is: 1 and 1.0 are the same setting."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value
