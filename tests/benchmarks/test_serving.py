"""`python -m benchmarks serve` on an engine that is written here, whose every call takes a known processor time."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.serving import KINDS, Served, measure


COST = {"base": 1.0, "reft": 1.5, "lora": 4.0}  # of a prefill; a decode step takes a tenth


class Engine:
    """Counts the seconds that each call would take. Answers as many steps as tokens were asked for."""

    def __init__(self, further_steps: int = 0) -> None:
        self.now, self.left, self.asked, self.further_steps = 0.0, 0, [], further_steps
        self.turns: list[str] = []
        self.llm_engine = self

    def add_request(self, name: str, prompt: dict, params: Any, lora_request: str | None) -> None:
        self.now += 0.25
        self.asked.append((name, len(prompt["prompt_token_ids"]), lora_request))
        self.kind, self.left, self.is_new = lora_request or "base", params.max_tokens + self.further_steps, True

    def step(self) -> None:
        if self.is_new:
            self.turns.append(self.kind)
        self.now += COST[self.kind] * (1.0 if self.is_new else 0.1)
        self.is_new, self.left = False, self.left - 1

    def has_unfinished_requests(self) -> bool:
        return self.left > 0


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Served:
    engine = Engine()
    monkeypatch.setattr(serving.time, "process_time", lambda: engine.now)
    params = SimpleNamespace(SamplingParams=lambda **given: SimpleNamespace(**given))
    monkeypatch.setitem(sys.modules, "vllm", params)  # type: ignore[arg-type]
    return Served(engine, {"base": None, "reft": "reft", "lora": "lora"}, length=12)


def test_a_round_tells_prefill_from_decode_steps(served: Served) -> None:
    prefill, decode = served.round("reft", requests=3, tokens=5)
    assert prefill == pytest.approx(3 * 0.25 + 1.5) and decode == pytest.approx(0.15)
    assert served.engine.asked == [(str(n), 12, "reft") for n in (1, 2, 3)]
    served.round("base", requests=1, tokens=2)
    assert served.engine.asked[-1] == ("4", 12, None)


@pytest.mark.parametrize("further", [1, -1])
def test_a_prefill_of_several_steps_is_no_prefill(served: Served, further: int) -> None:
    served.engine.further_steps = further
    with pytest.raises(RuntimeError, match="took .*1 further steps"):
        served.round("base", requests=1, tokens=4)


def test_each_kind_is_compared_with_the_base_of_its_turn(served: Served) -> None:
    slow = iter([1.0] * 3 + [1.0, 2.0, 8.0, 4.0])  # of each turn, the machine's; three turns of warm-up
    own, factor, asked = served.round, [1.0], []

    def round(kind: str, requests: int, tokens: int) -> tuple[float, float]:
        if len(asked) % len(KINDS) == 0:
            factor[0] = next(slow)
        asked.append(kind)
        prefill, decode = own(kind, requests, tokens)
        return prefill * factor[0], decode * factor[0]

    served.round = round  # type: ignore[method-assign]
    found = measure(served, requests=2, pairs=4, tokens=3)
    for kind in KINDS:
        for what, ratio, seconds in (
            ("prefill", (0.5 + COST[kind]) / 1.5, (0.5 + COST[kind]) * 3.0),
            ("decode", COST[kind], COST[kind] * 0.3),
        ):
            measured = found[kind][what]
            assert measured["pairs"] == 4 and measured["seconds"] == pytest.approx(seconds)
            assert [measured[name] for name in ("ratio", "low", "high")] == pytest.approx([ratio] * 3)
    turns = [asked[start : start + len(KINDS)] for start in range(0, len(asked), len(KINDS))]
    assert len(turns) == 7 and all(sorted(turn) == sorted(KINDS) for turn in turns)
    assert len(set(map(tuple, turns[3:]))) > 1  # the neighbours of a run change
