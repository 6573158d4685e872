"""Trains and scores base, LoRA and LoReFT on the paper's kinds of tasks, at a size that a laptop trains: the smol
recipes of examples/, by their own commands.

Each run is a sequence of commands that a user would type: `peft-reft prepare`, `axolotl train` or
`examples/glue/train.py`, `peft-reft evaluate`, each in a process of its own. Results are kept in the run's folder, so
an interrupted benchmark continues where it stopped, and several processes may share the tasks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml


EXAMPLES = Path(__file__).parents[1] / "examples"
TEST_SEED = 0  # draws the test examples: the same for every method and training seed


@dataclass(frozen=True)
class Experiment:
    """A task for a language model.

    Args:
        training (`str`): The task, or set, to train on.
        recipe (`str`): The folder of examples/ with the smol.yaml to train by.
        train, test (`int`): How many examples to train and to test on.
        max_new_tokens (`int`): How many tokens an answer may have.
    """

    training: str
    recipe: str
    train: int
    test: int
    max_new_tokens: int


EXPERIMENTS = {
    "openbookqa": Experiment("openbookqa", "commonsense", train=400, test=300, max_new_tokens=12),
    "ARC-Easy": Experiment("ARC-Easy", "commonsense", train=400, test=300, max_new_tokens=12),
    "boolq": Experiment("boolq", "commonsense", train=640, test=500, max_new_tokens=12),
    "mawps": Experiment("math_data", "arithmetic", train=400, test=200, max_new_tokens=96),
}
CLASSIFIERS = {"sst2": 1000, "cola": 2000}  # task -> number of training examples
ADAPTERS: dict[str, dict[str, Any]] = {
    "loreft": {},  # the recipe's own settings
    "lora": {"adapter": "lora", "lora_alpha": 16, "lora_target_linear": True, "learning_rate": 5e-4},
}
CLASSIFIER_METHODS = ("head", "lora", "loreft")
TASKS = (*EXPERIMENTS, *CLASSIFIERS)


@dataclass(frozen=True)
class Runs:
    """The runs of all tasks.

    Args:
        data (`Path`): The folder with the tasks' files.
        base, encoder (`str`): Folders or hub names of the language model and of the encoder.
        out (`Path`): The folder that runs write to.
        threads (`int`): Threads of torch.
    """

    data: Path
    base: str
    encoder: str
    out: Path
    threads: int

    def run(self, task: str, seed: int) -> None:
        """Run all commands for a task with a seed, but for those whose results are there already."""
        folder = self.out / task / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if task in CLASSIFIERS:
            for method in CLASSIFIER_METHODS:
                self._classifier(task, method, seed, folder)
            return
        experiment = EXPERIMENTS[task]
        rows = folder / "train.jsonl"
        if not rows.exists():
            self._command(
                [*_peft_reft(), "prepare", experiment.training, "--data-dir", str(self.data), "--out", str(rows)]
                + ["--limit", str(experiment.train), "--seed", str(seed)],
                folder / "prepare.log",
            )
        for method in ADAPTERS:
            self._adapter(experiment, method, seed, folder)
        # The base by itself does not depend on the seed.
        self._evaluate(task, experiment, folder.parent / "base", {}, base=True)
        self._evaluate(task, experiment, folder, {method: folder / method for method in ADAPTERS}, base=False)

    def _adapter(self, experiment: Experiment, method: str, seed: int, folder: Path) -> None:
        done = folder / f"{method}.json"
        if done.exists():
            return
        keys = yaml.safe_load((EXAMPLES / experiment.recipe / "smol.yaml").read_text(encoding="utf-8"))
        keys |= ADAPTERS[method]
        keys |= {"base_model": self.base, "seed": seed, "output_dir": str(folder / method)}
        keys["dataset_prepared_path"] = str(folder / "prepared")
        keys["datasets"][0]["path"] = str(folder / "train.jsonl")
        config = folder / f"{method}.yaml"
        config.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
        axolotl = str(Path(sys.executable).with_name("axolotl"))
        done.write_text(json.dumps(self._command([axolotl, "train", str(config)], folder / f"{method}.log")))

    def _classifier(self, task: str, method: str, seed: int, folder: Path) -> None:
        done = folder / f"{method}.json"
        if done.exists():
            return
        command = [sys.executable, str(EXAMPLES / "glue" / "train.py"), "--task", task, "--model", self.encoder]
        command += ["--settings", str(EXAMPLES / "glue" / "smol.yaml"), "--method", method, "--seed", str(seed)]
        command += [
            "--data-dir",
            str(self.data),
            "--limit",
            str(CLASSIFIERS[task]),
            "--output-dir",
            str(folder / method),
        ]
        done.write_text(json.dumps(self._command(command, folder / f"{method}.log")))

    def _evaluate(
        self, task: str, experiment: Experiment, folder: Path, adapters: dict[str, Path], base: bool
    ) -> None:
        done = folder / "results.json"
        if done.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        command = [*_peft_reft(), "evaluate", task, "--base", self.base, "--data-dir", str(self.data)]
        command += ["--limit", str(experiment.test), "--seed", str(TEST_SEED), "--batch-size", "16"]
        command += [
            "--max-new-tokens",
            str(experiment.max_new_tokens),
            "--out",
            str(done),
            "--outputs",
            str(folder / "outputs"),
        ]
        command += [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
        self._command(command if base else [*command, "--no-base"], folder / "evaluate.log")

    def _command(self, command: list[str], log: Path) -> dict[str, Any]:
        """Run a command. Returns its time in seconds, by the clock and of the processors, and its peak memory in
        bytes, both with the loading of libraries and model.

        Raises:
            RuntimeError: when it fails, naming its log.
        """
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # where axolotl finds accelerate
            "OMP_NUM_THREADS": str(self.threads),
            "HF_HUB_OFFLINE": "1",
            "AXOLOTL_DO_NOT_TRACK": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        started = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed. Its output is in {log}.")
        kilobyte = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss
        return {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "peak_bytes": usage.ru_maxrss * kilobyte,
        }


def _peft_reft() -> list[str]:
    return [sys.executable, "-m", "peft_reft"]


def collect(out: Path) -> list[dict[str, Any]]:
    """One row for each task and method that has results: score, time and memory of each seed's run."""
    rows = []
    for task in TASKS:
        folders = sorted((out / task).glob("seed-*"))
        if task in CLASSIFIERS:
            runs = [
                (folder.name, method, _classified(folder, method))
                for folder in folders
                for method in CLASSIFIER_METHODS
                if (folder / f"{method}.json").exists()
            ]
        else:
            runs = []
            for folder in (out / task / "base", *folders):
                file = folder / "results.json"
                if file.exists():
                    report = json.loads(file.read_text())
                    runs += [(folder.name, one["model"], _generated(report, one, folder)) for one in report["results"]]
        for method in dict.fromkeys(method for _, method, _ in runs):
            own = [run for _, name, run in runs if name == method]
            rows.append(
                {"task": task, "method": method, "seeds": [s for s, name, _ in runs if name == method], "runs": own}
            )
    return rows


def _classified(folder: Path, method: str) -> dict[str, Any]:
    result = json.loads((folder / method / "results.json").read_text())
    metric, value = next(iter(result["test"].items()))
    found = {"metric": metric, "score": value, "trained": result["trained_parameters"]}
    return found | {"examples": result["examples"]["test"]} | json.loads((folder / f"{method}.json").read_text())


def _generated(report: dict[str, Any], result: dict[str, Any], folder: Path) -> dict[str, Any]:
    metric, score = next(iter(result["scores"].items()))
    name = result["model"]
    cost = json.loads((folder / f"{name}.json").read_text()) if name in ADAPTERS else {}
    found = {"metric": metric, "score": score["value"], "low": score["low"], "high": score["high"]}
    found |= {"trained": report["models"][name]["parameters"] if name in ADAPTERS else 0}
    return found | {"unanswered": result["unanswered"], "examples": result["examples"]} | cost


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and lines of a table: mean score over the seeds, each seed's score, mean time and memory."""
    lines = []
    for row in rows:
        runs = row["runs"]
        scores = [100 * run["score"] for run in runs]
        spread = f" ± {stdev(scores):.1f}" if len(scores) > 1 else ""
        seconds = [run["cpu_seconds"] for run in runs if "cpu_seconds" in run]
        peaks = [run["peak_bytes"] for run in runs if "peak_bytes" in run]
        lines.append(
            [
                row["task"],
                row["method"],
                f"{runs[0]['metric']} {mean(scores):.1f}{spread}",
                ", ".join(f"{score:.1f}" for score in scores),
                "/".join(str(run["unanswered"]) for run in runs) if "unanswered" in runs[0] else "",
                f"{runs[0]['trained']:,}" if runs[0]["trained"] else "",
                f"{mean(seconds):.0f}" if seconds else "",
                f"{mean(peaks) / 1e9:.2f}" if peaks else "",
            ]
        )
    return ["task", "method", "mean of the seeds", "each", "unanswered", "trained", "CPU s", "peak, GB"], lines
