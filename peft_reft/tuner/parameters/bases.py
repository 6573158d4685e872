"""Which R of a model need a retraction, and when they get it.

orthogonal.py knows matrices; this module knows the parameters that hold them. An R is clean while nothing has changed
its orthonormal rows, and stale once something may have. Three things make it stale: a write, which its version counter
shows; a cast or a move, which goes through the module's `_apply`; and a step of an optimizer, which a hook reports,
since fused optimizers (Trainer's default) and those of bitsandbytes and DeepSpeed write past the version counter. A
stale R is retracted before it is next read or saved; an R that an engine owns, at the end of the step (distributed.py
has the reason). Retraction leaves orthonormal rows as they are to the bit, so a needless one costs time, and no
precision.

Callbacks that average weights write through `param.data`, which no version counter shows. So where the model is saved,
or goes from training to evaluation and back, each R is doubted: its values are checked, and it is written only where
its rows are not orthonormal. A write, even of the same values, would invalidate a graph whose backward is still to
come.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..interventions import orthogonal
from ..interventions.formulas import INTERVENTIONS
from . import distributed


class Bases:
    """The R of one layer's adapters, and which of them need a retraction.

    Args:
        parameters (`torch.nn.ParameterDict`): Adapter name -> its R, [G, R, D].
        configs (`dict[str, ReftConfig]`): Adapter name -> its configuration.
    """

    def __init__(self, parameters: nn.ParameterDict, configs: dict[str, Any]) -> None:
        self._parameters = parameters
        self._configs = configs
        self._clean: dict[str, tuple] = {}  # adapter name -> `_state` of its R when its rows were last orthonormal
        self._doubted: set[str] = set()  # adapters whose R may have changed since, with the same `_state`

    def __getstate__(self) -> dict[str, Any]:
        """A copied or unpickled layer has parameters of its own, none of which is known to be clean."""
        return {**self.__dict__, "_clean": {}, "_doubted": set()}

    def orthonormal(self) -> dict[str, nn.Parameter]:
        """Adapter name -> R, for the edits that keep the rows of R orthonormal."""
        return {name: R for name, R in self._parameters.items() if self._is_to_be_orthonormal(name, R)}

    def _is_to_be_orthonormal(self, name: str, R: nn.Parameter) -> bool:
        return INTERVENTIONS[self._configs[name].intervention].orthonormal and not R.is_meta

    def stale(self, distributed_run: bool) -> dict[str, nn.Parameter]:
        """Adapter name -> R, for those that are to be orthonormal and are stale or doubted.

        Args:
            distributed_run (`bool`): Whether an engine may own some R. Those are left out.
        """
        # Called for every layer in every forward, so the parameters are read without ParameterDict's slower methods,
        # and the condition that rules out most comes first.
        clean, doubted = self._clean, self._doubted
        changed = {
            name: R
            for name, R in self._parameters._parameters.items()
            if R is not None
            and (name in doubted or clean.get(name) != _state(R))
            and self._is_to_be_orthonormal(name, R)
        }
        if changed and distributed_run:
            return {name: R for name, R in changed.items() if not distributed.is_owned_by_engine(R)}
        return changed

    def only_doubted(self, adapter_name: str) -> bool:
        """Whether an R that `stale` returned is doubted alone: nothing is known to have written to it. So is one that
        has taken the place of a clean R: the first version of FSDP puts a view there, which must not be written to."""
        R, known = self._parameters._parameters[adapter_name], self._clean.get(adapter_name)
        assert R is not None
        return known is not None and (known == _state(R) or known[0] != id(R))

    def mark_stepped(self, stepped: set[int]) -> None:
        """Note that an optimizer has stepped the parameters with these ids."""
        for name, R in self._parameters._parameters.items():
            if id(R) in stepped:
                self.mark_stale(name)

    def mark_clean(self, adapter_name: str) -> None:
        """Note that the rows of an adapter's R are orthonormal."""
        R = self._parameters._parameters[adapter_name]
        assert R is not None
        self._clean[adapter_name] = _state(R)
        self._doubted.discard(adapter_name)

    def mark_stale(self, adapter_name: str) -> None:
        """Note a change of an adapter's R that its version counter may not show."""
        self._clean.pop(adapter_name, None)

    def mark_all_stale(self) -> None:
        """Note a change of all R that their version counters may not show."""
        self._clean.clear()

    def doubt_all(self) -> None:
        """Note that any R may have been written to through its `data`, so that its values have to be checked."""
        self._doubted.update(self._parameters._parameters)

    def trust_replaced(self) -> None:
        """Mark each R clean that is a new parameter: a copy that FSDP2 gathered from orthonormal shards."""
        for name, R in self._parameters.items():
            if name in self._clean and self._clean[name][0] != id(R):
                self.mark_clean(name)


def _state(R: nn.Parameter) -> tuple[int, int, torch.dtype]:
    """A key that changes when the parameter is replaced, written to, or cast through its `data`."""
    return id(R), 0 if R.is_inference() else R._version, R.dtype


# Of two threads that find the same R stale, one retracts it, and the other waits for that.
_RETRACTING = threading.Lock()


def retract_stale(layers: Iterable[Bases]) -> None:
    """Retract every stale R of some layers, in one batch. An R that an engine owns is left out.

    Args:
        layers (`Iterable[Bases]`): The R of each layer.
    """
    with _RETRACTING:
        distributed_run = distributed.is_distributed()
        stale = [(bases, name, R) for bases in layers for name, R in bases.stale(distributed_run).items()]
        if stale:
            doubted = [R for bases, name, R in stale if bases.only_doubted(name)]
            changed = [R for bases, name, R in stale if not bases.only_doubted(name)]
            orthogonal.retract(changed + [doubted[index] for index in orthogonal.not_orthonormal(doubted)])
            for bases, name, _ in stale:
                bases.mark_clean(name)


def retract_before_forward(model: nn.Module, layers: Sequence[Bases]) -> None:
    """`retract_stale` for a model that FSDP2 may have sharded: its gathered parameters are not taken for stale.

    Args:
        model (`torch.nn.Module`): The model that is about to run.
        layers (`Sequence[Bases]`): The R of each of its layers.

    Raises:
        NotImplementedError: when the model is sharded by the first version of FSDP.
    """
    if distributed.is_distributed() and any(bases.stale(True) for bases in layers):
        gathered = distributed.has_gathered_parameters(model)
        for bases in layers if gathered else ():
            bases.trust_replaced()
    retract_stale(layers)


# -- steps ------------------------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """A model that is notified of the steps of optimizers."""

    def all_bases(self) -> Sequence[Bases]:
        """The R of each of its layers."""

    def forget_weights(self) -> None:
        """Discard what was computed from the parameters before the step."""


# A list, for its order: all processes have to retract in the same order, which a set would not give.
_watching: list[weakref.ref[Watcher]] = []


def watch_steps(watcher: Watcher) -> None:
    """Notify a watcher of the steps of all optimizers of the process, for as long as it lives."""
    if not any(known() is watcher for known in _watching):
        _watching.append(weakref.ref(watcher))


@torch.compiler.disable
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Hook of all optimizers of the process: marks each stepped R stale, and retracts those that an engine owns."""
    if not _watching:
        return
    _watching[:] = [known for known in _watching if known() is not None]
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    distributed_run = distributed.is_distributed()
    owned = []
    for watcher in [watcher for known in _watching if (watcher := known()) is not None]:
        watcher.forget_weights()
        for bases in watcher.all_bases():
            if distributed_run:
                owned += _owned_and_stepped(bases, stepped)
            bases.mark_stepped(stepped)
    if owned:
        distributed.retract_owned(owned)


def _owned_and_stepped(bases: Bases, stepped: set[int]) -> list[nn.Parameter]:
    """The R of a layer that an engine owns and that were stepped. The optimizers of ZeRO step copies, which have other
    ids: there, each R that is trained counts as stepped."""
    return [
        R
        for R in bases.orthonormal().values()
        if distributed.is_owned_by_engine(R) and (id(R) in stepped or (R.requires_grad and distributed.is_in_zero(R)))
    ]


register_optimizer_step_post_hook(_after_step)
