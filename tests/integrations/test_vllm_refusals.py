"""What the plugin refuses before an engine is asked: other versions of vLLM, unknown decoder layers. And what vLLM's
resolvers find."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn


pytest.importorskip("vllm")

from paths import REPOSITORY
from served import Reference, prompts_of, save_adapter, save_lora, save_model

from peft_reft.integrations.vllm import vllm_api
from peft_reft.integrations.vllm.layers import find_blocks, find_layout


# -- other versions --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_another_version_refuses_reft_and_serves_the_rest(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    lora, reft = save_lora(base, tmp_path / "lora"), save_adapter(base, tmp_path / "reft")
    helpers = str(REPOSITORY / "tests" / "helpers")
    done = subprocess.run(
        [sys.executable, f"{helpers}/other_vllm.py", base, lora, reft],
        env={**os.environ, "PYTHONPATH": helpers},
        capture_output=True,
        text=True,
    )
    lines = [line[5:] for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, done.stderr[-3000:]
    found = json.loads(lines[0])
    for error in found["reft"]:
        assert error is not None and "0.30.0, 0.31.0" in error and "==0.31.0" in error
    reference = Reference(base, {"lora": lora})
    (prompt,) = prompts_of([40])
    for name, adapter in (("base", None), ("lora", "lora")):
        ids, logp = reference.answer(prompt, adapter, 5)
        assert found[name][0] == ids and torch.allclose(torch.tensor(found[name][1]), torch.tensor(logp), atol=2e-4)


def test_the_tested_version_is_accepted() -> None:
    assert vllm_api.refusal_of_version() is None


@pytest.mark.parametrize("what", ["a parameter before", "gone"])
def test_a_hook_that_differs_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    from vllm.v1.engine.core import EngineCore

    if what == "gone":
        monkeypatch.delattr(EngineCore, "remove_lora")
    else:
        monkeypatch.setattr(EngineCore, "remove_lora", lambda self, tag, lora_id: True)
    refusal = vllm_api.refusal_of_version()
    assert refusal is not None and "EngineCore.remove_lora" in refusal and "0.32.0" in refusal


# -- decoder layers --------------------------------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.weight, self.kind = nn.Parameter(torch.ones(64)), kind

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        x, residual, dtype = x.float(), residual.float(), x.dtype  # as kernels do, which round at the end
        state = {"sum": x + residual, "first": x, "difference": x - residual}[self.kind]
        return (state / state.norm(dim=-1, keepdim=True) * 8 * self.weight).to(dtype), state.to(dtype)


class Pair(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Any:
        return hidden_states, residual


class Alone(nn.Module):
    def forward(self, hidden_states: Tensor) -> Any:
        return hidden_states


class Three(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Any:
        return hidden_states, residual, None


class PairOrAlone(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Any:
        if residual is None:
            return hidden_states
        return hidden_states, residual


class Computed(nn.Module):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Any:
        return torch.add(hidden_states, residual)


class Owner(nn.Module):
    start_layer, end_layer = 0, 2

    def __init__(self, block: type[nn.Module], norm: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([block(), block()])
        self.norm = Norm(norm)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


class Other(Owner):
    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return self.norm(residual, hidden_states)[0]


@pytest.mark.parametrize(
    ("block", "norm", "layout"), [(Pair, "sum", "sum"), (Pair, "first", "first"), (Alone, "sum", "alone")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_a_known_layer_returns(block: type[nn.Module], norm: str, layout: str, dtype: torch.dtype) -> None:
    owner = Owner(block, norm).to(dtype)
    owner.norm.weight.data = torch.linspace(0.1, 20, 64, dtype=dtype)  # large weights make rounding large, too
    assert find_layout(owner, owner.layers[0]) == layout


@pytest.mark.parametrize(
    ("owner", "words"),
    [
        (Owner(Three, "sum"), "Three.* returns"),
        (Owner(PairOrAlone, "sum"), "PairOrAlone.* returns"),
        (Owner(Computed, "sum"), "Computed.* returns"),
        (Owner(Pair, "difference"), "neither adds up"),
        (Other(Pair, "sum"), "does not pass the pair"),
    ],
)
def test_an_unknown_layer_is_refused(owner: Owner, words: str) -> None:
    with pytest.raises(ValueError, match=f"not supported on .*{words}"):
        find_layout(owner, owner.layers[0])


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    for model, count in ((nn.ModuleList([Owner(Pair, "sum"), Owner(Pair, "sum")]), 2), (Owner(Pair, "sum"), 3)):
        with pytest.raises(ValueError, match="lists of . decoder layers"):
            find_blocks(model, count)


# -- resolvers -------------------------------------------------------------------------------------------------------


def test_vllms_resolver_finds_reft_adapters_of_its_base(tmp_path: Path) -> None:
    from vllm.plugins.lora_resolvers.filesystem_resolver import FilesystemResolver

    from peft_reft.integrations.vllm import register

    register()
    base = save_model(tmp_path / "base")
    folders = {"reft": save_adapter(base, tmp_path / "reft"), "lora": save_lora(base, tmp_path / "lora")}
    resolver = FilesystemResolver(str(tmp_path))
    for name, folder in folders.items():
        found = asyncio.run(resolver.resolve_lora(base, name))
        assert found is not None and found.lora_path == folder and found.lora_name == name
        assert asyncio.run(resolver.resolve_lora("another base", name)) is None
    assert asyncio.run(resolver.resolve_lora(base, "base")) is None
