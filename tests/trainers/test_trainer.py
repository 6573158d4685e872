"""transformers' Trainer: resuming to the bit, the best checkpoint, its options, and adapters on their way to a hub."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import peft_of_transformers  # noqa: F401 - add_adapter takes the installed PEFT
import pytest
import torch
import transformers as t
from models import build, labelled, prompts, randomize, weight
from paths import HELPERS
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load, load_file
from torch.utils.data import Dataset

from peft_reft import ReftConfig, ReftLayer


class Rows(Dataset):
    """A few sequences, the same at every call."""

    def __init__(self, count: int = 16) -> None:
        self.batch = labelled(*[9] * count, prompt=4, seed=0)

    def __len__(self) -> int:
        return len(self.batch["labels"])

    def __getitem__(self, index: int) -> dict:
        return {key: value[index] for key, value in self.batch.items()}


def config(**settings) -> ReftConfig:
    return ReftConfig(**{"r": 4, "positions": "f2+l2", "dropout": 0.1, "task_type": "CAUSAL_LM", **settings})


def wrapped(**settings) -> PeftModel:
    model = get_peft_model(build("llama"), config(**settings))
    randomize(model)
    return model


def native(**settings) -> t.PreTrainedModel:
    model = build("llama")
    model.add_adapter(config(**settings))
    randomize(model)
    return model


def trainer(model: torch.nn.Module, folder: Path, **settings) -> t.Trainer:
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "save_steps": 4,
        "learning_rate": 0.05,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    arguments = t.TrainingArguments(output_dir=str(folder), **{**defaults, **settings})
    return t.Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows(8))


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("base_model.model."): parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "reft_" in name
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**prompts(9, 4)).logits


# The folders that a script in another process needs on its path to import this module.
FOLDERS = os.pathsep.join([str(Path(__file__).parent), str(HELPERS)])

RESUME = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
import torch
torch.set_num_threads(1)
from test_trainer import trainer, wrapped
model = wrapped()
trainer(model, Path(sys.argv[2])).train(resume_from_checkpoint=sys.argv[3])
model.save_pretrained(sys.argv[2])
"""


def test_a_resumed_run_ends_as_one_that_went_through(tmp_path):
    model = wrapped()
    run = trainer(model, tmp_path / "through")
    assert run.args.optim == "adamw_torch_fused"  # writes without counting up the version of the weights
    run.train()
    files = {path.name for path in (tmp_path / "through" / "checkpoint-4").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt", "rng_state.pth"} <= files
    again = wrapped()
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-4"))
    assert same(weights(model), weights(again))
    assert not same(weights(model), weights(wrapped()))


@pytest.mark.slow
def test_a_run_resumed_in_another_process_ends_as_one_that_went_through(tmp_path):
    model = wrapped()
    trainer(model, tmp_path / "through").train()
    model.save_pretrained(tmp_path / "through")
    folders = [FOLDERS, str(tmp_path / "again"), str(tmp_path / "through" / "checkpoint-4")]
    script = subprocess.run([sys.executable, "-c", RESUME, *folders], capture_output=True, text=True)
    assert script.returncode == 0, script.stderr[-3000:]
    file = "adapter_model.safetensors"
    assert same(load_file(tmp_path / "through" / file), load_file(tmp_path / "again" / file))


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model = wrapped()
    run = trainer(
        model,
        tmp_path,
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        learning_rate=5.0,
    )
    run.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert best != 8 and run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert run.evaluate()["eval_loss"] == losses[best]
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / f"checkpoint-{best}")
    assert same(weights(model), weights(loaded))


def test_an_added_adapter_trains_as_a_peft_model_does(tmp_path):
    ours, theirs = native(), wrapped()
    for model in (ours, theirs):
        run = trainer(model, tmp_path)  # the Trainer sets the seed
        run.train()
        if model is ours:
            run.save_model(str(tmp_path / "saved"))
    assert same(weights(ours), weights(theirs))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / "saved")
    assert torch.equal(logits(loaded), logits(ours))


@pytest.mark.parametrize("make", ["ReFT", "LoRA"])
def test_resuming_an_added_adapter_is_beyond_trainer(make, tmp_path):
    """True of every adapter: Trainer looks for a whole model in the checkpoint. Resume with get_peft_model."""
    model = build("llama")
    model.add_adapter(config() if make == "ReFT" else LoraConfig(task_type="CAUSAL_LM"))
    trainer(model, tmp_path).train()
    with pytest.raises(ValueError, match="checkpoint index"):
        trainer(model, tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"auto_find_batch_size": True},
        {"save_only_model": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [wrapped, native])
def test_options_that_change_nothing(make, settings, tmp_path):
    models = [make(dropout=0.0) for _ in range(2)]
    for model, given in zip(models, ({}, settings)):
        trainer(model, tmp_path, **given).train()
    for name, value in weights(models[0]).items():
        torch.testing.assert_close(weights(models[1])[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"bf16": True}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
def test_mixed_precision(settings, tmp_path):
    model = wrapped(dropout=0.0)
    run = trainer(model, tmp_path, max_steps=40, learning_rate=0.02, **settings)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.8 * before
    for layer in model.modules():
        if isinstance(layer, ReftLayer):
            R = weight(layer, "R")
            assert R.dtype == torch.float32
            torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)


def test_evaluation_knows_the_labels(tmp_path):
    run = trainer(wrapped(), tmp_path)
    assert run.label_names == ["labels"]
    predicted = run.predict(Rows(8))
    assert predicted.predictions.shape[:2] == (8, 9) and predicted.label_ids.shape == (8, 9)
    silent = trainer(wrapped(), tmp_path, prediction_loss_only=True)
    alone = silent.predict(Rows(8))
    assert alone.predictions is None and alone.metrics["test_loss"] == predicted.metrics["test_loss"]


# -- a hub ------------------------------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """The part of a hub's API that an upload needs. Every file is sent inside its commit."""

    def log_message(self, *args) -> None:
        pass

    def _reply(self, status: int, answer: dict) -> None:
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_GET(self) -> None:
        self._reply(404, {"error": "not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self._read()
        address = f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self._reply(200, {"url": f"{address}/{asked.get('organization', 'me')}/{asked['name']}"})
        elif self.path == "/api/validate-yaml":
            self._reply(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            self._reply(200, {"files": [{**file, "shouldIgnore": False, "oid": None} for file in files]})
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.server.files.setdefault(repository, {})[line["value"]["path"]] = content
            self._reply(200, {"commitUrl": f"{address}/{repository}/commit/0", "commitOid": "0" * 40})
        else:
            self._reply(404, {"error": "not found"})


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files = {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import os, sys
from pathlib import Path
sys.path[:0] = sys.argv[1].split(os.pathsep)
from test_trainer import native, trainer, wrapped
wrapped().push_to_hub("me/wrapped")
native().push_to_hub("me/native")
model = wrapped()
run = trainer(model, Path(sys.argv[2]), push_to_hub=True, hub_model_id="me/trained", max_steps=2)
run.train()
run.push_to_hub()
model.save_pretrained(sys.argv[2])
"""


@pytest.mark.slow
def test_adapters_arrive_at_a_hub(hub, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_none",
    }
    command = [sys.executable, "-c", PUSH, FOLDERS, str(tmp_path)]
    script = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert script.returncode == 0, script.stderr[-3000:]
    assert hub.files.keys() == {"me/wrapped", "me/native", "me/trained"}
    expected = weights(wrapped())
    for repository, files in hub.files.items():
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
        assert not any(name.startswith(("model", "pytorch_model")) for name in files)
        assert json.loads(files["adapter_config.json"])["peft_type"] == "REFT"
        arrived = load(files["adapter_model.safetensors"])
        if repository == "me/trained":
            assert same(arrived, load_file(tmp_path / "adapter_model.safetensors"))
        else:
            assert same({f"{k.removeprefix('base_model.model.')}.default": v for k, v in arrived.items()}, expected)
