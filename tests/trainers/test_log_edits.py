"""LogEdits: the sizes of edits in the Trainer's log every N steps, and nothing on the model between these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from models import build, labelled, randomize
from peft import PeftModel, get_peft_model
from torch.utils.data import Dataset

from peft_reft import ReftConfig, ReftLayer, explain_edits
from peft_reft.tools.log_edits import LogEdits


LAYERS = ["model.layers.0", "model.layers.1", "model.layers.2"]


class Rows(Dataset):
    """The same row of 9 tokens, 4 of them prompt and all 4 edited, 16 times."""

    row = {key: value[0] for key, value in labelled(9, prompt=4, seed=0).items()}

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict:
        return self.row


def adapted(**settings) -> PeftModel:
    model = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l3", task_type="CAUSAL_LM", **settings))
    randomize(model, scale=0.3)
    return model


def trainer(folder: Path, callbacks: list[Any], model: Any = None, **settings) -> t.Trainer:
    defaults = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "save_strategy": "no"}
    arguments = t.TrainingArguments(
        str(folder), **{**defaults, "use_cpu": True, "disable_tqdm": True, "learning_rate": 0.0, **settings}
    )
    return t.Trainer(model or adapted(), args=arguments, train_dataset=Rows(), callbacks=callbacks)


def logged(run: t.Trainer) -> list[dict[str, float]]:
    return [row for row in run.state.log_history if "reft/edit_size" in row]


def compiled() -> dict:
    return {"torch_compile": True, "torch_compile_backend": "aot_eager"}


def checkpointed(reentrant: bool) -> dict:
    return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}


@pytest.mark.parametrize(
    "settings",
    [{}, {"gradient_accumulation_steps": 2}, checkpointed(True), checkpointed(False), compiled()],
    ids=["plain", "accumulated", "reentrant", "not reentrant", "compiled"],
)
def test_what_is_logged(tmp_path, settings):
    """At a learning rate of 0 the numbers of each step are those that explain_edits gives."""
    torch.compiler.reset()
    run = trainer(tmp_path, [LogEdits(every=2)], **settings)
    run.train()
    expected = explain_edits(adapted(), {key: value[None] for key, value in Rows.row.items()}, quiet=True)
    rows = logged(run)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        for name, layer in zip(LAYERS, expected.layers, strict=True):
            assert row[f"reft/edit_size/{name}"] == pytest.approx(layer.mean, rel=1e-4)
        assert row["reft/edit_size"] == pytest.approx(sum(layer.mean for layer in expected.layers) / 3, rel=1e-4)
        assert row["reft/edited_tokens"] == pytest.approx(4 / 9)
        assert set(row) == {
            "reft/edit_size",
            *(f"reft/edit_size/{n}" for n in LAYERS),
            "reft/edited_tokens",
            "epoch",
            "step",
        }
    torch.compiler.reset()


class Watcher(t.TrainerCallback):
    """Notes at the end of each step whether a hook was on a layer while it ran, and what reporters are told."""

    def __init__(self) -> None:
        self.hooked: list[bool] = []
        self.told: list[dict] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, ReftLayer)]

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        hooks = [(*layer._forward_hooks, *layer.base_layer._forward_hooks) for layer in self.layers]
        assert len(set(map(bool, hooks))) == 1
        self.hooked.append(bool(hooks[0]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.told.append(dict(logs))


def test_nothing_is_hooked_between(tmp_path):
    watcher = Watcher()
    run = trainer(tmp_path, [watcher, LogEdits(every=3)], max_steps=7)
    run.train()
    assert watcher.hooked == [False, False, True, False, False, True, False]
    assert not any(layer._forward_hooks or layer.base_layer._forward_hooks for layer in watcher.layers)
    # Reporters (wandb, TensorBoard) are callbacks that come before those of the user, and are told all the same.
    assert sum("reft/edit_size" in logs for logs in watcher.told) == 2


def test_training_is_what_it_was(tmp_path):
    weights = []
    for callbacks in ([], [LogEdits(every=1)]):
        run = trainer(tmp_path, callbacks, adapted(dropout=0.1), learning_rate=0.01, seed=3)
        run.train()
        weights.append([one.detach().clone() for one in run.model.parameters() if one.requires_grad])
    assert all(map(torch.equal, *weights))


def test_added_later(tmp_path):
    run = trainer(tmp_path, [])
    run.add_callback(LogEdits(4))
    run.train()
    assert len(logged(run)) == 1


def test_a_second_trainer_gets_its_own_rows(tmp_path):
    callback = LogEdits(2)
    first, second = (trainer(tmp_path / kind, [callback]) for kind in ("a", "b"))
    for run in (first, second, first):
        run.train()
        assert [row["step"] for row in logged(run)] == [2, 4]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_in_a_logged_step_leaves_nothing_behind(tmp_path, where):
    class Failing(t.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            if where == "forward":
                raise KeyboardInterrupt
            loss.register_hook(lambda gradient: 1 / 0)
            return loss

    run = trainer(tmp_path, [LogEdits(1)])
    run.__class__ = Failing
    with pytest.raises((KeyboardInterrupt, ZeroDivisionError)):
        run.train()
    layers = [module for module in run.model.modules() if isinstance(module, ReftLayer)]
    assert not any(layer._forward_hooks or layer.base_layer._forward_hooks for layer in layers)
    compiled_graphs: list[Any] = []
    torch.compile(torch.sin, backend=lambda graph, _: compiled_graphs.append(graph) or graph)(torch.ones(3))
    assert compiled_graphs  # torch compiles again


@pytest.mark.parametrize("reentrant", [True, False])
def test_edits_inside_checkpointed_blocks_count_once(tmp_path, reentrant):
    """Backward runs them again, up to the last tensor that it needs: the last edit of a block would count less."""
    kinds = [{}, checkpointed(reentrant)]
    runs = [
        trainer(tmp_path / str(i), [LogEdits(2)], adapted(target_modules=["o_proj", "down_proj"]), **kind)
        for i, kind in enumerate(kinds)
    ]
    for run in runs:
        run.train()
    plain, other = ([row["reft/edit_size"] for row in logged(run)] for run in runs)
    assert len(plain) == 2 and other == pytest.approx(plain, rel=1e-4)


def test_evaluation_and_forwards_without_gradients_do_not_count(tmp_path):
    """Preference trainers run a reference model in the middle of a step."""

    class WithReference(t.Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                layer = next(module for module in model.modules() if isinstance(module, ReftLayer))
                layer.set_scale("default", 100.0)
                model(**inputs)
                layer.set_scale("default", 1.0)
            return super().compute_loss(model, inputs, *args, **kwargs)

    plain, other = (trainer(tmp_path / kind, [LogEdits(2)]) for kind in ("a", "b"))
    other.__class__ = WithReference
    plain.train()
    other.train()
    assert [row["reft/edit_size"] for row in logged(other)] == pytest.approx(
        [row["reft/edit_size"] for row in logged(plain)]
    )


def test_what_is_not_possible_is_refused(tmp_path):
    for every in (0, -1, 1.5, True):
        with pytest.raises(
            ValueError, match=r"LogEdits\(every=.*\) is not possible. Allowed: a number of steps from 1"
        ):
            LogEdits(every)
    with pytest.raises(ValueError, match="LogEdits has no Trainer to log to"):
        LogEdits(2).on_train_begin(None, None, None, adapted())
    run = trainer(tmp_path, [LogEdits(2)], build("llama"))
    with pytest.raises(ValueError, match="LlamaForCausalLM has no ReFT adapter, so there are no edits to measure"):
        run.train()


def test_it_can_be_imported_first():
    """The import of transformers' Trainer imports peft_reft.tools.trainers, which knows LogEdits."""
    code = (
        "import warnings; warnings.simplefilter('error', RuntimeWarning); "
        "from peft_reft.tools.log_edits import LogEdits; "
        "from transformers import Trainer; print(LogEdits(3).every)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "3\n", done.stderr
