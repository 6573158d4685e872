"""`python -m benchmarks sweep`: what makes runs the same, how records are kept, and the arithmetic of its tables.
A tiny model shows that a run trains and scores, that a run that is there is not made again, and which tokens are
edited where the first token is left out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from paths import REPOSITORY
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.report import markdown_table
from benchmarks.sweep import command
from benchmarks.sweep.grids import GRIDS, Grid, planned, runs
from benchmarks.sweep.methods import layer_indices
from benchmarks.sweep.plots import curves
from benchmarks.sweep.records import Records
from benchmarks.sweep.runs import mask_without_first, train_batches
from benchmarks.sweep.settings import Run
from benchmarks.sweep.tables import half_width, table


def result(score: float, **more: object) -> dict:
    return {"metric": "accuracy", "score": score, "loss": 0.5, "trained": 7, "cpu_seconds": 10.0, **more}


def test_runs_are_the_same_where_the_method_reads_the_same_settings():
    lora = Run("sst2", "lora", positions="f3", share_weights=True)
    assert lora.key == replace(lora, positions="all", share_weights=False, init="pyreft").key
    assert lora.key != replace(lora, rank=4).key
    loreft = replace(lora, method="loreft")
    assert len({one.key for one in (lora, loreft, replace(loreft, positions="all"), replace(loreft, seed=2))}) == 4
    assert replace(loreft, weight_decay=0).key == replace(loreft, weight_decay=0.0).key
    assert replace(loreft, share_weights=False).key != loreft.key
    assert Run("mawps", "base", seed=1).key == Run("mawps", "base", seed=2, rate=0.5).key


def test_an_unknown_method_is_named():
    with pytest.raises(ValueError, match="method='lroa'"):
        Run("sst2", "lroa")


def test_records_are_found_by_another_process(tmp_path):
    run = Run("sst2", "loreft", rate=3e-3)
    Records(tmp_path / "new" / "records.jsonl").add(run, result(0.75))
    kept = Records(tmp_path / "new" / "records.jsonl")
    assert kept.find(run)["score"] == 0.75
    assert kept.find(replace(run, seed=2)) is None


def test_half_a_line_is_a_run_that_was_not_made(tmp_path):
    path = tmp_path / "records.jsonl"
    first, second = Run("sst2", "loreft"), Run("sst2", "lora")
    kept = Records(path)
    kept.add(first, result(0.5))
    kept.add(second, result(0.6))
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # the process ended while it wrote the second line
    kept = Records(path)
    assert len(kept) == 1 and kept.find(second) is None
    kept.add(second, result(0.6))
    assert path.read_bytes() == whole


def test_a_line_that_is_no_record_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('{"settings": {"task": "sst2", "method": "lora"}, "score": 1}\n{"score": 1}\n')
    with pytest.raises(ValueError, match="line 2"):
        Records(path)


def test_the_interval_is_students():
    # Mean 2, deviation 1: 4.302653 (t of 2 degrees of freedom at 97.5 %, from a printed table) * 1 / sqrt(3).
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.484138, abs=1e-5)
    # 12.7062 * sqrt(2) / sqrt(2) for 1 and 3, whose deviation is sqrt(2).
    assert half_width([1.0, 3.0]) == pytest.approx(12.7062, abs=1e-4)
    assert half_width([1.0]) is None


def three_seeds(tmp_path) -> tuple[Grid, Records]:
    grid = Grid("?", [*runs("sst2", "loreft", rank=[16, 4]), *runs("sst2", "lora", rank=8)], plot="rank")
    kept = Records(tmp_path / "records.jsonl")
    for seed, score in enumerate((0.81, 0.82, 0.83), 1):
        kept.add(replace(grid.runs[1], seed=seed), result(score, cpu_seconds=10.0 * seed))
    kept.add(replace(grid.runs[2], seed=2), result(0.85))
    kept.add(Run("cola", "lora", seed=1), result(0.1))
    return grid, kept


def test_table(tmp_path):
    columns, lines = table(*three_seeds(tmp_path))
    assert columns == ["method", "rank", "accuracy, % (mean, 95 %)", "each seed", "trained", "CPU s"]
    found = [dict(zip(columns, line)) for line in lines]
    assert [(one["method"], one["rank"], one["accuracy, % (mean, 95 %)"], one["each seed"]) for one in found] == [
        ("loreft", "4", "82.0 ± 2.5", "81.0, 82.0, 83.0"),
        ("lora", "8", "85.0", "85.0"),
    ]
    assert [(one["trained"], one["CPU s"]) for one in found] == [("7", "20"), ("7", "10")]


def test_curves_are_in_the_order_of_the_axis(tmp_path):
    grid, kept = three_seeds(tmp_path)
    kept.add(replace(grid.runs[0], seed=1), result(0.9))
    found = curves(grid, kept)
    assert set(found) == {"loreft", "lora"}
    assert found["loreft"] == [(4, pytest.approx([81.0, 82.0, 83.0])), (16, pytest.approx([90.0]))]


def test_planned_runs_are_each_there_once(monkeypatch):
    shared = runs("sst2", "loreft", rank=[1, 4])
    monkeypatch.setitem(GRIDS, "one", Grid("?", shared))
    monkeypatch.setitem(GRIDS, "two", Grid("?", shared[1:] + runs("sst2", "head"), seeds=(1, 2)))
    made = [(run.method, run.rank, run.seed) for run in planned(["one", "two"], None)]
    assert made[:2] == [("loreft", 1, 1), ("loreft", 4, 1)] and len(made) == len(set(made)) == 6 + 2
    assert len(planned(["one", "two"], [5])) == 3


def test_every_grid_has_runs_whose_axis_they_have():
    for grid in GRIDS.values():
        assert len({run.key for run in grid.runs}) == len(grid.runs)
        assert grid.plot is None or any(grid.plot in run.described() for run in grid.runs)


@pytest.mark.parametrize(
    "text, indices",
    [
        ("all", None),
        ("every 2nd", [1, 3, 5]),
        ("every 3rd", [2, 5]),
        ("lower half", [0, 1, 2]),
        ("upper half", [3, 4, 5]),
        ("first", [0]),
        ("middle", [3]),
        ("last", [5]),
    ],
)
def test_layers(text, indices):
    assert layer_indices(text, 6) == indices


def test_unknown_layers():
    with pytest.raises(ValueError, match="layers='second'"):
        layer_indices("second", 6)


def test_the_first_token_is_left_out():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1, 1]])
    lengths = torch.tensor([6, 3])
    run = Run("sst2-token", "loreft", positions="f2+l3", first_token=False)
    # The prompt of three tokens is too short for f2+l3: of its first token, which f has, nothing is left.
    assert mask_without_first(attention_mask, lengths, run).tolist() == [
        [0, 0, 0, 1, 0, 2, 2, 2],
        [0, 0, 0, 0, 0, 0, 0, 2],
    ]
    shared = mask_without_first(attention_mask, lengths, replace(run, share_weights=True))
    assert shared[0].tolist() == [0, 0, 0, 1, 0, 1, 1, 1]


def test_an_epoch_has_each_example_once():
    import random

    examples = [{"input_ids": [0] * (1 + index % 7), "index": index} for index in range(37)]
    batches = train_batches(examples, 4, random.Random(1))
    assert sorted(one["index"] for batch in batches for one in batch) == list(range(37))
    assert max(map(len, batches)) == 4 and len(batches) == 10


@pytest.fixture
def grid_of_two(monkeypatch):
    monkeypatch.setitem(GRIDS, "tiny", Grid("?", runs("sst2", "loreft", rank=[1, 2]), seeds=(1, 2)))


def test_the_command_goes_on_where_it_stopped(tmp_path, monkeypatch, grid_of_two):
    made = []

    class Runner:
        def __init__(self, places):
            pass

        def make(self, run):
            if len(made) == 3:
                raise KeyboardInterrupt
            made.append((run.rank, run.seed))
            return result(0.5)

    monkeypatch.setattr("benchmarks.sweep.runs.Runner", Runner)
    arguments = ["sweep", "tiny", "--records", str(tmp_path / "records.jsonl"), "--out", str(tmp_path)]
    plan = CliRunner().invoke(app, [*arguments, "--plan"]).output
    assert plan.startswith("4 runs, of which 0 are there. The other 4 take about")
    assert CliRunner().invoke(app, arguments).exit_code != 0  # interrupted in the fourth run
    assert made == [(1, 1), (2, 1), (1, 2)]
    # Three runs of 10 s are there: the fourth is estimated by them.
    plan = CliRunner().invoke(app, [*arguments, "--plan"]).output
    assert plan.startswith("4 runs, of which 3 are there. The other 1 take about 0 minutes")
    made.clear()
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0 and made == [(2, 2)]
    assert "50.0 ± 0.0" in (tmp_path / "tiny.md").read_text()
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 4 and all(json.loads(line)["settings"]["task"] == "sst2" for line in lines)


def test_where_takes_some_of_the_runs(tmp_path, monkeypatch):
    monkeypatch.setitem(GRIDS, "tiny", Grid("?", runs("sst2", "loreft", rank=[1, 2, 4]), seeds=(1, 2)))
    arguments = ["sweep", "tiny", "--records", str(tmp_path / "records.jsonl"), "--plan"]
    assert CliRunner().invoke(app, [*arguments, "--where", "rank=2"]).output.startswith("2 runs")
    assert CliRunner().invoke(app, [*arguments, "--where", "rank=2", "--where", "seed=1"]).output.startswith("1 runs")
    wrong = CliRunner().invoke(app, [*arguments, "--where", "ranks=2"])
    assert wrong.exit_code != 0 and "ranks" in wrong.output


def test_an_unknown_grid_is_named(tmp_path):
    done = CliRunner().invoke(app, ["sweep", "ranks", "--records", str(tmp_path / "records.jsonl")])
    assert done.exit_code != 0 and "no grid ranks" in done.output


@pytest.mark.parametrize("name", ["methods", "positions", "rank", "sink", "table"])
def test_the_page_has_the_table_of_the_records(name):
    columns, lines = table(GRIDS[name], Records(REPOSITORY / "benchmarks" / "sweep" / "records.jsonl"))
    assert lines
    assert markdown_table(columns, lines) in (REPOSITORY / "docs" / "choosing.md").read_text(encoding="utf-8")


def test_an_estimate_is_the_mean_of_runs_like_it(tmp_path):
    _, kept = three_seeds(tmp_path)
    assert command.estimated_seconds(runs("sst2", "loreft", rank=2)[0], kept) == 20.0
