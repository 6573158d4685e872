"""The worker's part on layers of two lines in float64, without an engine: which rows are edited, by what, and that
`EditedModel.finish` ends the step where an edit was not made."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn


pytest.importorskip("vllm")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from test_vllm_refusals import Norm
from vllm.config import CompilationMode

from peft_reft import ReftConfig
from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.plans import Plan
from peft_reft.integrations.vllm.worker import EditedModel


WIDTH, ROWS = 64, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 8)

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Any:
        residual = hidden_states + residual
        hidden_states = residual @ self.weight
        return hidden_states, residual


class Model(nn.Module):
    start_layer, end_layer = 0, 3

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.norm = Norm("sum")

    def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        hidden_states, _ = self.norm(hidden_states, residual)
        return hidden_states


def adapter_of(layers: list[int]) -> Adapter:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    weights = {
        f"layers.{n}": {"R": torch.linalg.qr(random(WIDTH, 2)).Q.T[None], "W": random(1, 2, WIDTH), "b": random(1, 2)}
        for n in layers
    }
    return Adapter("folder", ReftConfig(r=2, share_weights=True), "content", (), weights)


def settings_of(dtype: torch.dtype, mode: CompilationMode) -> Any:
    """The part of vLLM's settings that an EditedModel reads."""
    model_config = SimpleNamespace(
        hf_text_config=SimpleNamespace(num_hidden_layers=3), get_hidden_size=lambda: WIDTH, dtype=dtype
    )
    return SimpleNamespace(model_config=model_config, compilation_config=SimpleNamespace(mode=mode))


@pytest.fixture(params=[CompilationMode.NONE, CompilationMode.VLLM_COMPILE], ids=["eager", "traced"])
def edited(request: pytest.FixtureRequest) -> EditedModel:
    torch.manual_seed(0)
    edited = EditedModel(Model().double(), settings_of(torch.float64, request.param))
    edited.add(1, adapter_of([0, 2]))
    return edited


# A base request of two tokens; then four tokens of one with the adapter, from its second on, two of them to edit.
STEP = [(0, None, 0, 2), (1, Plan("content", [[0, 0], [2, 0], [4, 0], [9, 0]]), 1, 4)]
EDITED_ROWS = [3, 5]


def states() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden, residual = torch.randn(2, ROWS, WIDTH, generator=generator, dtype=torch.float64).unbind()
    return hidden, residual


@torch.inference_mode()
def run(edited: EditedModel, layers: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    hidden, residual = states()
    for n in layers:
        hidden, residual = edited.model.layers[n](hidden, residual)  # type: ignore[index]
    return hidden + residual


@torch.inference_mode()
def expected(edited: EditedModel, rows: list[int], scales: tuple[float, ...] = (1, 1)) -> Tensor:
    """By the paper's formula, h + Rᵀ(Wh + b − Rh), whose second part is multiplied by the row's scale."""
    state = sum(states())
    assert isinstance(state, Tensor)
    for n, block in enumerate(edited.model.layers):  # type: ignore[arg-type]
        state = state @ block.weight + state
        if n != 1:
            R, W, b = (edited.adapters[1].weights[f"layers.{n}"][letter][0] for letter in "RWb")
            for row, scale in zip(rows, scales):
                h = state[row].clone()
                state[row] = h + scale * R.T @ (W @ h + b - R @ h)
    return state


def test_a_step_edits_what_was_planned_and_the_next_nothing(edited: EditedModel) -> None:
    without = run(edited)
    torch.testing.assert_close(without, expected(edited, []))
    edited.plan(STEP)
    assert edited.edits
    edited.start()
    found = run(edited)
    edited.finish()
    torch.testing.assert_close(found, expected(edited, EDITED_ROWS))
    assert (found - without)[EDITED_ROWS].abs().min(dim=0).values.max() > 0.1
    edited.start()  # a dummy step has no plan
    assert not edited.edits
    assert torch.equal(run(edited), without)
    edited.finish()


def test_requests_of_one_step_have_their_own_strength(edited: EditedModel) -> None:
    requests = [(1, Plan("content", [[1, 0]], None, scale), 0, 3) for scale in (0.5, -2.0)]
    edited.plan(requests)
    edited.start()
    torch.testing.assert_close(run(edited), expected(edited, [1, 4], (0.5, -2.0)))
    edited.finish()


def test_a_strength_leaves_states_finite(edited: EditedModel) -> None:
    """An infinite state would reach other requests through a block of the cache that they get next."""
    for module in edited.weights[1]:
        edited.weights[1][module].R_QD.mul_(1e200)
    edited.plan([(1, Plan("content", [[1, 0]], None, 100.0), 0, 3), (0, None, 0, 3)])
    edited.start()
    found = run(edited)
    edited.finish()
    assert found.isfinite().all()
    torch.testing.assert_close(found[3:], expected(edited, [])[3:])


@pytest.mark.parametrize("kind", ["float16", "two layouts"])
def test_a_model_whose_states_are_not_known_is_refused(kind: str) -> None:
    dtype = torch.float16 if kind == "float16" else torch.float32
    settings, model = settings_of(dtype, CompilationMode.NONE), Model().to(dtype)
    EditedModel(model, settings)
    if kind == "float16":
        model.layers[1].routed_scaling_factor = 2.5  # type: ignore[index,assignment]
        words = "in float16, in which vLLM divides its hidden states"
    else:

        class Other(Block):
            def forward(self, hidden_states: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
                hidden_states = hidden_states + residual
                return hidden_states

        model.layers[2].__class__ = Other  # type: ignore[index]
        words = "its decoder layers return different things"
    with pytest.raises(ValueError, match=words):
        EditedModel(model, settings)


@pytest.mark.parametrize("ran", [(0, 1), (1, 2), (1,), ()])
def test_a_layer_that_did_not_run_ends_the_step(edited: EditedModel, ran: tuple[int, ...]) -> None:
    edited.plan(STEP)
    edited.start()
    run(edited, ran)
    missing = ", ".join(f"layers.{n}" for n in (0, 2) if n not in ran)
    with pytest.raises(RuntimeError, match="without the edits of a ReFT adapter in ") as error:
        edited.finish()
    assert set(str(error.value).split(" adapter in ")[1].split(". ")[0].split(", ")) == set(missing.split(", "))


def test_a_layer_that_returns_something_else_ends_the_step(
    edited: EditedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Block, "forward", lambda self, hidden_states, residual: [hidden_states, residual])
    edited.plan(STEP)
    edited.start()
    run(edited)
    with pytest.raises(RuntimeError, match=r"layers\.[02], layers\.[02]\. "):
        edited.finish()


def test_what_was_not_made_in_one_step_is_not_made_in_the_next(edited: EditedModel) -> None:
    edited.plan(STEP)
    edited.start()
    edited.start()
    torch.testing.assert_close(run(edited), expected(edited, []))
    edited.finish()


def test_a_request_needs_the_plan_of_the_loaded_content(edited: EditedModel) -> None:
    with pytest.raises(RuntimeError, match="does not say which tokens"):
        edited.plan([(1, None, 0, 4)])
    with pytest.raises(RuntimeError, match="another content"):
        edited.plan([(1, Plan("older", [[0, 0]]), 0, 4)])
