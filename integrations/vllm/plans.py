"""Which tokens of a request are edited: found once, when the request is made, and carried with it.

A plan is made in the process that takes a request. It travels in `SamplingParams.extra_args` to the engine core, which
makes prefix cache keys of it, and to the workers, which edit by it. So all processes agree by construction.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peft_reft.tuner.positions.batch import Batch, select_tokens
from peft_reft.tuner.positions.spec import Rules
from peft_reft.tuner.positions.subspaces import used_directions
from peft_reft.tuner.strength import is_strength


PLAN = "peft_reft"  # in extra_args, of the plugin alone
# In extra_args, or vllm_xargs over HTTP: what a caller may set.
SUBSPACES, SCALE = "subspaces", "scale"
MAX_STRENGTH = 100.0  # states beyond what a dtype holds are a danger to other requests (operation.py)


@dataclass(frozen=True)
class Plan:
    """The tokens of one request that its adapter edits.

    Args:
        fingerprint (`str`): That of the adapter.
        tokens (`list[list[int]]`, *optional*): [position, group of weights] of each, by position. None: every token,
            generated ones too.
        directions (`list[bool]`, *optional*): The directions to edit in. None: all.
        scale (`float`): The strength of the edit.
    """

    fingerprint: str
    tokens: list[list[int]] | None
    directions: list[bool] | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, sampling_params: Any) -> Plan | None:
        """The plan that a request carries, if any."""
        extra = getattr(sampling_params, "extra_args", None)
        return None if not extra or PLAN not in extra else cls(*extra[PLAN])

    def carried_by(self, extra_args: dict[str, Any] | None) -> dict[str, Any]:
        """The `extra_args` of a request with the plan in them."""
        return {**(extra_args or {}), PLAN: [self.fingerprint, self.tokens, self.directions, self.scale]}

    def within(self, start: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The positions and the groups of weights of the tokens to edit from one position up to, not including,
        another."""
        if self.tokens is None:
            return np.arange(start, end), np.zeros(end - start, dtype=np.int64)
        chosen = [token for token in self.tokens if start <= token[0] < end]
        pairs = np.array(chosen, dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @property
    def end(self) -> int | None:
        """The position after the last token to edit. None: there is no last."""
        return None if self.tokens is None else (self.tokens[-1][0] + 1 if self.tokens else 0)

    def key(self, start: int, end: int) -> str | None:
        """What distinguishes the block of tokens from `start` up to `end` in the prefix cache from the base model's.
        None: nothing in it is edited, so whatever differs was edited before it, and is in the key of its prefix."""
        positions, groups = self.within(start, end)
        if len(positions) == 0:
            return None
        where = "all" if self.tokens is None else ",".join(f"{p - start}.{g}" for p, g in zip(positions, groups))
        used = "" if self.directions is None else ":" + "".join("01"[used] for used in self.directions)
        strength = "" if self.scale == 1 else f"*{self.scale!r}"
        return f"{self.fingerprint}:{where}{used}{strength}"


def make_plan(
    fingerprint: str, rules: Rules, prompt: list[int], subspaces: Any = None, scale: Any = None, own_scale: float = 1.0
) -> Plan:
    """Find the tokens of a prompt, by the tuner's own rules.

    Args:
        fingerprint (`str`): That of the adapter.
        rules (`Rules`): Its rules.
        prompt (`list[int]`): The prompt's token ids.
        subspaces (`str`, *optional*): The names of the subspaces to use.
        scale (`float`, *optional*): A factor of the strength. None: 1.
        own_scale (`float`): The strength in the adapter's config.

    Raises:
        ValueError: when a subspace is unknown, when subspaces are named for an adapter that has none, or when the
            scale is no number or too large.
    """
    factor = 1.0 if scale is None else scale
    strength = own_scale * factor if is_strength(factor) else math.nan
    if not abs(strength) <= MAX_STRENGTH:
        own = "" if own_scale == 1 else f" beside the adapter's own {own_scale!r}"
        raise ValueError(
            f"scale={scale!r}{own} is no strength of an edit. Pass a number, 1 for the adapter as it is. The strength "
            f"may be {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}."
        )
    directions = None
    if subspaces is not None:
        if not rules.subspaces or not isinstance(subspaces, str):
            has = f"has {', '.join(dict(rules.subspaces))}" if rules.subspaces else "has no subspaces"
            raise ValueError(f"subspaces={subspaces!r}: the adapter {has}. Pass names joined by '+', or leave it out.")
        directions = used_directions(subspaces, dict(rules.subspaces), 1, torch.device("cpu"))[0].tolist()
    if strength == 0:  # the base model, whose blocks in the prefix cache are shared
        return Plan(fingerprint, [])
    if rules.spec.all_tokens:
        return Plan(fingerprint, None, directions, strength)
    if rules.template is None:
        return Plan(fingerprint, _tokens_of_length(rules, len(prompt)), directions, strength)
    return Plan(fingerprint, _tokens(rules, prompt), directions, strength)


def _tokens(rules: Rules, prompt: list[int]) -> list[list[int]]:
    ids = torch.tensor([prompt], dtype=torch.long)
    batch = Batch((1, len(prompt)), ids.device, input_ids=ids)
    selected = select_tokens(rules, batch, training=False)
    edited = selected.first_BS[0] | selected.last_BS[0]
    positions = edited.nonzero().flatten()
    groups = selected.last_BS[0][positions].long() if rules.groups == 2 else torch.zeros_like(positions)
    return torch.stack([positions, groups], dim=1).tolist()


@functools.lru_cache(maxsize=4096)
def _tokens_of_length(rules: Rules, length: int) -> list[list[int]]:
    """The tokens to edit where no template says where answers begin: then all of a request is prompt, whatever its
    tokens are. Callers do not change the list."""
    return _tokens(rules, [0] * length)
