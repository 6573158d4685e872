#!/usr/bin/env python3
"""Compares the cost of two ways to keep R orthonormal: retraction (ours), and torch's parametrizations.

    OMP_NUM_THREADS=1 python scripts/compare_orthogonal.py

There are 30 matrices R [1, 8, 576], one for each layer of a model of SmolLM2-135M's sizes. A step reads every R
(forward), sends a gradient back to it, and lets AdamW step. Only R and keeping it orthonormal are measured, not the
edit. The ways take turns. Times are the processor's, the median of all steps. The error is the largest entry of |R Rᵀ
− I| after the last step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from peft_reft.tuner.interventions.orthogonal import retract, tangent


LAYERS, RANK, WIDTH = 30, 8, 576


class Retracted:
    """Ours: R is the parameter. Its gradient is projected onto the tangent space; a retraction ends a step."""

    def __init__(self, starts: list[Tensor]) -> None:
        self.parameters: list[Tensor] = [nn.Parameter(start.clone()) for start in starts]

    def read(self) -> list[Tensor]:
        """Every R, with a graph."""
        return list(tangent(torch.stack(self.parameters)).unbind())

    def settle(self) -> None:
        """Make every R orthonormal again, after an optimizer step."""
        retract(self.parameters)


class Parametrized:
    """torch's: R is a function of a free parameter, computed whenever it is read."""

    def __init__(self, starts: list[Tensor], way: str) -> None:
        self.modules = [nn.Linear(WIDTH, RANK, bias=False) for _ in starts]
        for module, start in zip(self.modules, starts):
            orthogonal(module, orthogonal_map=way)
            module.weight = start[0].clone()
        self.parameters = [one for module in self.modules for one in module.parameters()]

    def read(self) -> list[Tensor]:
        """Every R, with a graph."""
        return [module.weight[None] for module in self.modules]

    def settle(self) -> None:
        """Nothing to do: the next read computes R again."""


def stepper(way: Retracted | Parametrized, goals: list[Tensor]) -> Callable[[], None]:
    """A training step that moves every R towards a goal in another subspace, so that each step leaves the manifold."""
    optimizer = torch.optim.AdamW(way.parameters, lr=2e-3, weight_decay=0.0, fused=True)

    def step() -> None:
        loss = sum((R - goal).square().sum() for R, goal in zip(way.read(), goals))
        assert isinstance(loss, Tensor)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        way.settle()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--maps", nargs="*", default=["householder"], help="torch's: householder, cayley, matrix_exp")
    options = parser.parse_args()
    torch.manual_seed(0)
    starts, goals = ([nn.init.orthogonal_(torch.empty(1, RANK, WIDTH)) for _ in range(LAYERS)] for _ in range(2))
    ways: dict[str, Retracted | Parametrized] = {"parameter, retracted (ours)": Retracted(starts)}
    # cayley and matrix_exp compute a square matrix of size WIDTH for each R and take rows of it: seconds a step.
    ways |= {f"torch, {name}": Parametrized(starts, name) for name in options.maps}
    steps = {name: stepper(way, goals) for name, way in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.steps):
        for name, step in steps.items():
            started = time.process_time()
            step()
            times[name].append(time.process_time() - started)
    print(f"{LAYERS} matrices R [1, {RANK}, {WIDTH}], {options.steps} steps, torch {torch.__version__}\n")
    print("| way | a step | off by | trained numbers |\n| --- | ---: | ---: | ---: |")
    for name, way in ways.items():
        with torch.no_grad():
            off = max((R @ R.mT - torch.eye(RANK)).abs().max().item() for R in way.read())
        numbers = sum(one.numel() for one in way.parameters)
        print(f"| {name} | {1e3 * statistics.median(times[name]):.2f} ms | {off:.1e} | {numbers:,} |")


if __name__ == "__main__":
    main()
