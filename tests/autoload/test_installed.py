"""The autoload with the libraries themselves: six ways of loading an adapter, and what is installed and removed."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from models import chat_model, randomize, tokenizer
from paths import REPOSITORY
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import ReftConfig
from peft_reft_autoload.run import command_line, environment


# What somebody does who was given a folder, in a process that has not imported peft_reft.
SIX_WAYS = """
import json, sys, warnings
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

adapter, base = sys.argv[1:3]
def base_model():
    return AutoModelForCausalLM.from_pretrained(base)
def load_adapter():
    model = base_model()
    model.load_adapter(adapter)
    return model
ways = {
    "PeftConfig.from_pretrained": lambda: PeftConfig.from_pretrained(adapter),
    "PeftModel.from_pretrained": lambda: PeftModel.from_pretrained(base_model(), adapter),
    "AutoPeftModelForCausalLM": lambda: AutoPeftModelForCausalLM.from_pretrained(adapter),
    "AutoModelForCausalLM": lambda: AutoModelForCausalLM.from_pretrained(adapter),
    "pipeline": lambda: pipeline("text-generation", model=adapter, tokenizer=base).model,
    "load_adapter": load_adapter,
}
ids = torch.tensor([AutoTokenizer.from_pretrained(base)("Name a colour.")["input_ids"]])
results = {}
for name, way in ways.items():
    try:
        loaded = way()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = loaded(input_ids=ids).logits.sum().item() if hasattr(loaded, "forward") else loaded.r
            told = [str(one.message) for one in caught if "does not say where its prompts end" in str(one.message)]
            assert not hasattr(loaded, "forward") or len(told) == 1, (name, told)
    except KeyError as error:
        results[name] = repr(error)
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> tuple[str, str, float]:
    """The folders of an adapter and its base, and the sum of its logits for one prompt."""
    folder = tmp_path_factory.mktemp("adapter")
    chat_model().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder / "base"),
        ReftConfig(r=2, positions="f2+l2", task_type="CAUSAL_LM"),
    )
    randomize(model)
    model.eval().save_pretrained(folder / "reft")
    logits = model(**tokenizer()("Name a colour.", return_tensors="pt")).logits
    return str(folder / "reft"), str(folder / "base"), logits.sum().item()


def loaded(adapter: tuple, tmp_path: Path, run: bool = False, **variables: str) -> dict:
    script = tmp_path / "six_ways.py"
    script.write_text(SIX_WAYS)
    words = command_line([str(script)]) if run else [sys.executable, str(script)]
    env = {**(environment() if run else os.environ), **variables, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*words, *adapter[:2]], capture_output=True, text=True, timeout=500, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_six_ways_without_an_import(adapter, tmp_path):
    results = loaded(adapter, tmp_path)
    assert results.pop("PeftConfig.from_pretrained") == 2
    assert len(results) == 5
    assert list(results.values()) == pytest.approx([adapter[2]] * 5, abs=1e-3)


@pytest.mark.parametrize("first", ["set_seed", "Trainer", "TrainingArguments", "pipeline"])
def test_peft_may_be_imported_in_the_middle_of_an_import_of_transformers(first):
    """transformers.trainer_utils, which has set_seed, imports PEFT before it has all its own names."""
    code = f"from transformers import {first}; import peft, sys; print('peft_reft' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr
    assert "which peft needs for ReFT adapters, failed" not in done.stderr


@pytest.mark.slow
def test_switched_off_it_is_pefts_own_error_and_run_switches_it_on(adapter, tmp_path, monkeypatch):
    off = loaded(adapter, tmp_path, PEFT_REFT_AUTOLOAD="0")
    assert set(off.values()) == {"KeyError('REFT')"} and len(off) == 6
    monkeypatch.setenv("PEFT_REFT_AUTOLOAD", "0")
    on = loaded(adapter, tmp_path, run=True)
    assert on["pipeline"] == pytest.approx(adapter[2], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_wheels_hold_the_pth_file_and_uninstalling_removes_it(tmp_path, hook):
    project = tmp_path / "project"
    left_out = shutil.ignore_patterns(".*", "build", "tests", "docs", "outputs")
    shutil.copytree(REPOSITORY, project, ignore=left_out)
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(tmp_path / done.stdout.splitlines()[-1]) as wheel:
        assert (
            wheel.read("peft_reft_autoload.pth")
            == (REPOSITORY / "peft_reft_autoload" / "peft_reft_autoload.pth").read_bytes()
        )
        record = next(name for name in wheel.namelist() if name.endswith(".dist-info/RECORD"))
        recorded = [row[0] for row in csv.reader(io.StringIO(wheel.read(record).decode()))]
    assert "peft_reft_autoload.pth" in recorded  # installers remove what RECORD lists
    if hook == "build_wheel":
        assert "peft_reft_autoload/startup/sitecustomize.py" in recorded
