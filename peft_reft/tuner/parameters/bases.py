"""The bases of a model's edits: which of them are known to have orthonormal rows, and who changes them.

orthogonal.py knows matrices; this module knows parameters. A write to one is seen in its version counter, a cast or a move in the
module's `_apply`, and an optimizer's step by a hook that torch calls after it: fused optimizers (Trainer's default), bitsandbytes'
and DeepSpeed's write past the counter. A basis that has changed is retracted where it is next read or saved; one whose values an
engine keeps, in the step itself (distributed.py has the reason). What is orthonormal already stays as it is to the bit, so a basis of
which nothing is known costs time, and no precision.

Callbacks that average weights write through `param.data`, which leaves no trace. So where the model is saved or goes from training
to evaluation and back, its bases are doubted: their values are looked at, and only those that are off are written. A write, even of
the same values, would invalidate a graph whose backward is still to come.
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
    """The bases of one layer, by adapter.

    Args:
        parameters (`torch.nn.ParameterDict`): R of each adapter.
        configs (`dict[str, ReftConfig]`): Its configuration.
    """

    def __init__(self, parameters: nn.ParameterDict, configs: dict[str, Any]) -> None:
        self._parameters = parameters
        self._configs = configs
        self._clean: dict[str, tuple] = {}  # in which state the rows of each were last orthonormal
        self._doubted: set[str] = set()  # whose values may have changed since without a change of that state

    def __getstate__(self) -> dict[str, Any]:
        """A copy or an unpickled layer has parameters of its own, of which nothing is known yet."""
        return {**self.__dict__, "_clean": {}, "_doubted": set()}

    def orthonormal(self) -> dict[str, nn.Parameter]:
        """Those whose rows are to be orthonormal."""
        return {name: basis for name, basis in self._parameters.items() if self._is_orthonormal(name, basis)}

    def _is_orthonormal(self, name: str, basis: nn.Parameter) -> bool:
        return INTERVENTIONS[self._configs[name].intervention].orthonormal and not basis.is_meta

    def stale(self, distributed_run: bool) -> dict[str, nn.Parameter]:
        """Those of them that something has changed since, or may have.

        Args:
            distributed_run (`bool`): Whether an engine may own some, which are left out.
        """
        # Asked for every layer in every forward: past ParameterDict's own ways, and what is likeliest to rule one out first.
        clean, doubted = self._clean, self._doubted
        changed = {
            name: basis
            for name, basis in self._parameters._parameters.items()
            if basis is not None
            and (name in doubted or clean.get(name) != _state(basis))
            and self._is_orthonormal(name, basis)
        }
        if changed and distributed_run:
            return {name: basis for name, basis in changed.items() if not distributed.is_kept(basis)}
        return changed

    def only_doubted(self, adapter_name: str) -> bool:
        """Whether a stale one may be as it was: nothing is known to have written to it."""
        basis = self._parameters._parameters[adapter_name]
        assert basis is not None
        return self._clean.get(adapter_name) == _state(basis)

    def mark_stepped(self, stepped: set[int]) -> None:
        """Note a step of parameters with these ids."""
        for name, basis in self._parameters._parameters.items():
            if id(basis) in stepped:
                self.mark_stale(name)

    def mark_clean(self, adapter_name: str) -> None:
        """Note that the rows are orthonormal."""
        basis = self._parameters._parameters[adapter_name]
        assert basis is not None
        self._clean[adapter_name] = _state(basis)
        self._doubted.discard(adapter_name)

    def mark_stale(self, adapter_name: str) -> None:
        """Note a change that the version counter may not show."""
        self._clean.pop(adapter_name, None)

    def mark_all_stale(self) -> None:
        """Note that all have changed."""
        self._clean.clear()

    def doubt_all(self) -> None:
        """Note that all may have changed without a trace."""
        self._doubted.update(self._parameters._parameters)

    def trust_replaced(self) -> None:
        """Take those that are other parameters than before for copies of orthonormal ones."""
        for name, basis in self._parameters.items():
            if name in self._clean and self._clean[name][0] != id(basis):
                self.mark_clean(name)


def _state(basis: nn.Parameter) -> tuple[int, int, torch.dtype]:
    """Changes whenever the parameter is replaced, written to or, by way of its `data`, cast."""
    return id(basis), 0 if basis.is_inference() else basis._version, basis.dtype


# Of two threads that find a basis changed, one writes to it, and the other waits until it is written.
_RETRACTING = threading.Lock()


def retract_stale(layers: Iterable[Bases]) -> None:
    """Make every R that has changed orthonormal again, those of several layers at once."""
    with _RETRACTING:
        distributed_run = distributed.is_distributed()
        stale = [(bases, name, basis) for bases in layers for name, basis in bases.stale(distributed_run).items()]
        if stale:
            doubted = [basis for bases, name, basis in stale if bases.only_doubted(name)]
            changed = [basis for bases, name, basis in stale if not bases.only_doubted(name)]
            orthogonal.retract(changed + [doubted[index] for index in orthogonal.not_orthonormal(doubted)])
            for bases, name, _ in stale:
                bases.mark_clean(name)


def retract_before_forward(model: nn.Module, layers: Sequence[Bases]) -> None:
    """The same for a model that may be one process's part of a larger one."""
    if distributed.is_distributed() and any(bases.stale(True) for bases in layers):
        gathered = distributed.has_gathered_parameters(model)
        for bases in layers if gathered else ():
            bases.trust_replaced()
    retract_stale(layers)


# -- steps ---------------------------------------------------------------------------------------------------------------


class Watcher(Protocol):
    """Who is told of the steps of optimizers."""

    def all_bases(self) -> Sequence[Bases]:
        """The R of its layers."""

    def forget_weights(self) -> None:
        """What it has made of the parameters is no longer what they are."""


# In the order in which they were made, which is that of all processes: a set would give each its own.
_watching: list[weakref.ref[Watcher]] = []


def watch_steps(watcher: Watcher) -> None:
    """Tell a watcher what optimizers change, for as long as it lives."""
    if not any(known() is watcher for known in _watching):
        _watching.append(weakref.ref(watcher))


@torch.compiler.disable
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    """Hook of all optimizers of the process."""
    if not _watching:
        return
    _watching[:] = [known for known in _watching if known() is not None]
    stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    distributed_run = distributed.is_distributed()
    kept = []
    for watcher in [watcher for known in _watching if (watcher := known()) is not None]:
        watcher.forget_weights()
        for bases in watcher.all_bases():
            if distributed_run:
                kept += _kept_and_stepped(bases, stepped)
            bases.mark_stepped(stepped)
    if kept:
        distributed.retract(kept)


def _kept_and_stepped(bases: Bases, stepped: set[int]) -> list[nn.Parameter]:
    """The R of a layer that an engine owns, and has stepped. DeepSpeed's optimizers step parameters of its own."""
    return [
        basis
        for basis in bases.orthonormal().values()
        if distributed.is_kept(basis)
        and (id(basis) in stepped or (basis.requires_grad and distributed.is_in_zero(basis)))
    ]


register_optimizer_step_post_hook(_after_step)
