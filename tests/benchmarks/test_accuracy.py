"""The table of `python -m benchmarks accuracy`, from runs written here by hand. The runs themselves are the commands
of examples/, tested as such."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from paths import REPOSITORY

from benchmarks.accuracy import EXPERIMENTS, Runs, collect, table


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def report(scores: dict[str, float]) -> dict:
    return {
        "models": {name: {"parameters": 10} for name in scores},
        "results": [
            {
                "model": name,
                "scores": {"accuracy": {"value": value, "low": 0, "high": 1}},
                "unanswered": 1,
                "examples": 4,
            }
            for name, value in scores.items()
        ],
    }


def test_a_row_for_each_method(tmp_path):
    write(tmp_path / "boolq/base/results.json", report({"base": 0.0}))
    for seed, (loreft, lora) in {1: (0.5, 0.25), 2: (0.75, 0.25)}.items():
        folder = tmp_path / f"boolq/seed-{seed}"
        write(folder / "results.json", report({"loreft": loreft, "lora": lora}))
        for method in ("loreft", "lora"):
            write(folder / f"{method}.json", {"seconds": 9, "cpu_seconds": 10 * seed, "peak_bytes": 2e9})
    write(tmp_path / "cola/seed-1/head.json", {"seconds": 1, "cpu_seconds": 3, "peak_bytes": 1e9})
    write(
        tmp_path / "cola/seed-1/head/results.json",
        {"test": {"matthews": 0.125}, "trained_parameters": 0, "examples": {"test": 7}},
    )
    columns, lines = table(collect(tmp_path))
    found = [dict(zip(columns, line)) for line in lines]
    assert [(one["task"], one["method"], one["mean of the seeds"], one["each"]) for one in found] == [
        ("boolq", "base", "accuracy 0.0", "0.0"),
        ("boolq", "loreft", "accuracy 62.5 ± 17.7", "50.0, 75.0"),
        ("boolq", "lora", "accuracy 25.0 ± 0.0", "25.0, 25.0"),
        ("cola", "head", "matthews 12.5", "12.5"),
    ]
    assert [(one["CPU s"], one["peak, GB"], one["trained"]) for one in found] == [
        ("", "", ""), ("15", "2.00", "10"), ("15", "2.00", "10"), ("3", "1.00", ""),
    ]  # fmt: skip


@pytest.fixture
def commands(monkeypatch):
    """Record the commands that are run, and write the files that each would write."""
    ran = []

    def pretend(self, command, log):
        ran.append(command)
        if "--out" in command:
            write(Path(command[command.index("--out") + 1]), report({"base": 0.0}))
        return {"seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1}

    monkeypatch.setattr(Runs, "_command", pretend)
    return ran


def test_what_is_there_is_not_run_again(tmp_path, commands):
    runs = Runs(tmp_path / "data", "base", "encoder", tmp_path, threads=1)
    for _ in range(2):
        runs.run("mawps", 5)
    assert [(Path(one[0]).name, *one[1:2]) for one in commands if one[0] != sys.executable] == [
        ("axolotl", "train")
    ] * 2
    prepare, base, adapters = (one[3:] for one in commands if one[0] == sys.executable)
    assert prepare[:2] == ["prepare", "math_data"] and prepare[-1] == "5"
    assert base[:2] == adapters[:2] == ["evaluate", "mawps"]
    assert "--no-base" not in base and "--no-base" in adapters
    seeds = [one[one.index("--seed") + 1] for one in (base, adapters)]
    assert seeds == ["0", "0"]  # the same examples, whatever was trained
    both = [
        yaml.safe_load((tmp_path / "mawps/seed-5" / f"{method}.yaml").read_text()) for method in ("loreft", "lora")
    ]
    assert [keys["adapter"] for keys in both] == ["loreft", "lora"]
    differing = {key for key in both[0] | both[1] if both[0].get(key) != both[1].get(key)}
    assert differing == {"adapter", "lora_alpha", "lora_target_linear", "learning_rate", "output_dir"}
    assert both[0]["seed"] == 5 and both[0]["datasets"][0]["path"].endswith("seed-5/train.jsonl")


def test_recipes_are_there():
    for experiment in EXPERIMENTS.values():
        assert (REPOSITORY / "examples" / experiment.recipe / "smol.yaml").is_file()
