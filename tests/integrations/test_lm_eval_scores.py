"""The lm-evaluation-harness, by its command and its Python API, in processes that know nothing of ReFT: the scores of
`peft-reft evaluate` for the same rows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import EOS, chat_model, tokenizer
from paths import REPOSITORY
from peft import get_peft_model
from tokenizers.pre_tokenizers import Sequence, Split

from peft_reft import ReftConfig


pytest.importorskip("lm_eval", reason="needs the extra 'eval'")
TASKS = {"reft_openbookqa_generate": "exact_match,answer", "reft_openbookqa": "acc,none"}
THINGS = ("sky", "sea", "sun", "moon", "rose", "stone", "tree", "bird")
API = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

settings, tasks = sys.argv[1:]
assert not {"peft", "peft_reft"} & set(sys.modules)
manager = TaskManager(include_path="tasks")
found = simple_evaluate("hf", settings, tasks.split(","), task_manager=manager, batch_size=3, device="cpu")
print(json.dumps(found["results"]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and an adapter that were trained together to answer every other row wrongly, and the rows."""
    root = tmp_path_factory.mktemp("lm_eval")
    rows = [
        {"instruction": f"Name the {thing}.", "input": "", "output": "", "answer": f"answer{number % 4 + 1}"}
        for number, thing in enumerate(THINGS)
    ]
    (root / "data" / "commonsense").mkdir(parents=True)
    (root / "data" / "commonsense" / "openbookqa.test.json").write_text(json.dumps(rows))
    shutil.copytree(REPOSITORY / "examples" / "lm_eval", root / "tasks")

    tokens, base = tokenizer(), chat_model()
    # A line end is a token by itself: where a token joins a context and its continuation, the harness leaves text out.
    whole = tokens.backend_tokenizer.pre_tokenizer
    tokens.backend_tokenizer.pre_tokenizer = Sequence([Split("\n", "isolated"), whole])
    base.name_or_path = str(root / "base")
    model = get_peft_model(base, ReftConfig(r=4, positions="f1+l2", response_template=None, task_type="CAUSAL_LM"))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    examples = []
    for number, row in enumerate(rows):
        taught = row["answer"] if number % 2 else f"answer{(number + 1) % 4 + 1}"
        prompt = tokens(row["instruction"] + "\n")["input_ids"]
        answer = [*tokens(f"the correct answer is {taught}")["input_ids"], EOS]
        assert tokens(f"{row['instruction']}\nthe correct answer is {taught}")["input_ids"] == [*prompt, *answer[:-1]]
        examples.append((torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        for ids, labels in examples:
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.eval().save_pretrained(root / "adapter")
    model.unload().save_pretrained(root / "base")
    tokens.save_pretrained(root / "base")
    return root


def output(folder: Path, *command: str) -> str:
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env={**os.environ, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_scores_of_peft_reft_evaluate(folder):
    commands = Path(sys.executable).parent
    data = ("--data-dir", "data", "--dtype", "float32", "--no-base", "--json")
    told = output(
        folder, str(commands / "peft-reft"), "evaluate", "openbookqa", "--base", "base", "--adapter", "adapter", *data
    )
    (result,) = json.loads(told)["results"]
    expected = result["scores"]["accuracy"]["value"]
    assert expected == 0.5  # as it was taught: neither all nor none

    settings = "pretrained=base,peft=adapter,dtype=float32"
    by_api = json.loads(output(folder, sys.executable, "-c", API, settings, ",".join(TASKS)).splitlines()[-1])
    line = f"--model hf --model_args {settings} --include_path tasks --tasks {','.join(TASKS)} --device cpu"
    output(folder, str(commands / "lm_eval"), *line.split(), "--batch_size", "3", "--output_path", "results.json")
    (written,) = folder.rglob("results*.json")
    by_command = json.loads(written.read_text())["results"]
    for task, metric in TASKS.items():
        assert by_api[task][metric] == by_command[task][metric] == expected, task
