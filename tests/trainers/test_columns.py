"""transformers' Trainer and TRL's with a ReFT model: odd rows, which no epoch ends with, and columns that only ReFT
reads."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers as t
from models import build, chat_model, prompts, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model

from peft_reft import ColumnsCollator, PromptLengthsCollator, ReftConfig
from peft_reft.tuner.forward.context import ForwardContext


LENGTH = 10


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CI", "1")


def row(prompt: int, seed: int, **columns) -> dict[str, Any]:
    ids = prompts(LENGTH, seed=seed)["input_ids"][0].tolist()
    return {"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": [-100] * prompt + ids[prompt:], **columns}


def adapted(base: t.PreTrainedModel | None = None, **settings) -> PeftModel:
    return get_peft_model(base or build("llama"), ReftConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))


def trainer(model: Any, rows: Any, folder: Path, collator: Any = None, cls: type = t.Trainer, **settings) -> t.Trainer:
    arguments = t.TrainingArguments(
        str(folder),
        **{"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "learning_rate": 0.01}
        | settings,
    )
    return cls(model=model, args=arguments, train_dataset=rows, data_collator=collator or t.default_data_collator)


def moved(run: t.Trainer) -> bool:
    """Train, and tell whether the adapter learnt anything."""
    before = {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}
    run.train()
    return all(not torch.equal(p, before[name]) for name, p in run.model.named_parameters() if name in before)


# -- odd rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, steps", [(1, 1), (1, 4), (2, 1), (4, 2)])
def test_odd_rows_end_no_epoch_and_are_in_its_log(size, steps, tmp_path, caplog):
    """Two of 16 rows, whatever the size of batches and of accumulated steps."""
    rows = datasets.Dataset.from_list([row({5: 0, 6: 1}.get(n, 4), seed=n) for n in range(16)])
    run = trainer(
        adapted(),
        rows,
        tmp_path,
        num_train_epochs=2,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=steps,
    )
    with caplog.at_level(logging.WARNING, "peft_reft"), pytest.warns(UserWarning, match="had no token") as caught:
        assert moved(run)
    assert len([one for one in caught if "had no token to edit" in str(one.message)]) == 1
    logged = [entry for entry in run.state.log_history if "reft_rows" in entry]
    assert [(entry["reft_rows"], entry["reft_rows_unedited"], entry["epoch"]) for entry in logged] == [
        (16, 2, 1.0),
        (16, 2, 2.0),
    ]
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == 2
    assert all(
        "2 of 16 rows had no token to edit" in text and "(1 of them with a prompt of one" in text for text in texts
    )


def test_every_training_is_looked_at_anew(tmp_path):
    model = adapted()
    good = datasets.Dataset.from_list([row(4, seed=n) for n in range(4)])
    bad = datasets.Dataset.from_list([row(0, seed=n) for n in range(4)])
    trainer(model, good, tmp_path, max_steps=2, per_device_train_batch_size=2).train()
    with pytest.raises(ValueError, match="the batch has no prompt tokens to edit"):
        trainer(model, bad, tmp_path, max_steps=2, per_device_train_batch_size=2).train()


def test_packed_rows_of_trl(tmp_path, caplog):
    trl = pytest.importorskip("trl")
    warnings.filterwarnings("ignore")
    ids = tokenizer()("Name a colour.")["input_ids"]
    masks = [[0] * (0 if n == 3 else 2) + [1] * (len(ids) - (0 if n == 3 else 2)) for n in range(8)]
    data = datasets.Dataset.from_dict({"input_ids": [ids] * 8, "completion_mask": masks})
    arguments = trl.SFTConfig(
        str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        num_train_epochs=1,
        per_device_train_batch_size=2,
        packing=True,
        max_length=2 * len(ids) + 1,
        completion_only_loss=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    config = ReftConfig(r=4, positions="f1+l1", task_type="CAUSAL_LM")
    run = trl.SFTTrainer(chat_model(), arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config)
    with caplog.at_level(logging.WARNING, "peft_reft"):
        assert moved(run)
    assert any("1 of 8 rows had no token to edit" in record.getMessage() for record in caplog.records)


# -- columns ----------------------------------------------------------------------------------------------------------


class Seen:
    """The tokens of each batch that a model's first adapter edits."""

    def __init__(self, model: PeftModel, monkeypatch) -> None:
        self.selections: list = []
        selector = ForwardContext.of(model)._selector
        select = selector.select

        def noting(*arguments):
            self.selections.append(select(*arguments))
            return self.selections[-1]

        monkeypatch.setattr(selector, "select", noting)

    @property
    def edited(self) -> list[list[int]]:
        return [row.nonzero().flatten().tolist() for one in self.selections for row in one.edited_BS]


@pytest.mark.parametrize("dropping", [True, False])
@pytest.mark.parametrize("kind", ["datasets", "list"])
def test_prompt_lengths_as_a_column(kind, dropping, tmp_path, monkeypatch):
    """Labels tell other prompts than the column, which goes first."""
    rows: Any = [row(2, seed=n, prompt_lengths=6) for n in range(2)]
    rows = datasets.Dataset.from_list(rows) if kind == "datasets" else rows
    model = adapted(positions="l1")
    seen = Seen(model, monkeypatch)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "remove_unused_columns": dropping}
    trainer(model, rows, tmp_path, **settings).train()
    assert seen.edited == [[5], [5]]


def test_intervention_masks_as_a_column(tmp_path, monkeypatch):
    """The collator pads the rows on the left, and knows nothing of this column."""
    tokens = tokenizer()
    tokens.padding_side = "left"
    long, short = row(4, seed=1), {key: value[:6] for key, value in row(4, seed=2).items()}
    long["intervention_mask"], short["intervention_mask"] = [0] * 9 + [1], [1, 0, 0, 0, 0, 0]
    rows = datasets.Dataset.from_list([long, short])
    model = adapted(positions="f1")
    seen = Seen(model, monkeypatch)
    collator = t.DataCollatorForSeq2Seq(tokens)
    trainer(model, rows, tmp_path, collator, max_steps=1, per_device_train_batch_size=2).train()
    assert sorted(seen.edited) == [[4], [9]]
    short["intervention_mask"] = [1, 0]
    with pytest.raises(ValueError, match=r"intervention_mask of \[\d+, \d+\] entries"):
        rows = datasets.Dataset.from_list([long, short])
        trainer(model, rows, tmp_path, collator, max_steps=1, per_device_train_batch_size=2).train()


@pytest.mark.parametrize("dropping", [True, False])
@pytest.mark.parametrize("named", [["style", "style+facts"], [0, 1], [[1, 0], [1, 1]]], ids=str)
def test_subspaces_as_a_column(named, dropping, tmp_path, monkeypatch):
    rows = datasets.Dataset.from_list([row(4, seed=n, subspaces=name) for n, name in enumerate(named)])
    model = adapted(positions="l1", subspaces={"style": 3, "facts": 1})
    seen = Seen(model, monkeypatch)
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "remove_unused_columns": dropping}
    assert moved(trainer(model, rows, tmp_path, t.DataCollatorForSeq2Seq(tokenizer()), **settings))
    unused = sorted(seen.selections[0].unused_TGR[:, 0].tolist())
    second = [True] * 3 + [False] if named == [0, 1] else [False] * 4
    assert unused == sorted([[False] * 3 + [True], second])


def test_subspaces_in_trl(tmp_path):
    trl = pytest.importorskip("trl")
    warnings.filterwarnings("ignore")
    data = datasets.Dataset.from_dict(
        {"prompt": ["Name a colour."] * 4, "completion": ["Blue."] * 4, "subspaces": ["style", "facts"] * 2}
    )
    config = ReftConfig(r=4, positions="l1", subspaces={"style": 2, "facts": 2}, task_type="CAUSAL_LM")
    arguments = trl.SFTConfig(
        str(tmp_path), use_cpu=True, bf16=False, report_to="none", max_steps=1, save_strategy="no", disable_tqdm=True
    )
    assert moved(
        trl.SFTTrainer(chat_model(), arguments, train_dataset=data, processing_class=tokenizer(), peft_config=config)
    )


def test_other_models_are_left_alone(tmp_path):
    rows = [row(4, seed=1, prompt_lengths=6)]
    model = get_peft_model(build("llama"), LoraConfig(task_type="CAUSAL_LM"))
    run = trainer(model, rows, tmp_path, max_steps=1)
    assert run.data_collator is t.default_data_collator
    assert "UneditedRows" not in run.callback_handler.callback_list
    run.train()
    assert "prompt_lengths" not in run._signature_columns


def test_a_collator_of_ones_own():
    collate = ColumnsCollator(t.DataCollatorForSeq2Seq(tokenizer()))
    batch = collate(
        [row(4, seed=1, prompt_lengths=6, subspaces="a+b"), row(4, seed=2, prompt_lengths=2, subspaces="a")]
    )
    assert batch["prompt_lengths"].tolist() == [6, 2] and batch["subspaces"] == ["a+b", "a"]
    packed = ColumnsCollator(t.DataCollatorWithFlattening())([row(4, seed=n, prompt_lengths=3 + n) for n in range(2)])
    assert packed["prompt_lengths"].tolist() == [3, 4] and packed["input_ids"].shape == (1, 2 * LENGTH)
    assert collate.label_pad_token_id == -100
    model = adapted(positions="l1", subspaces={"a": 2, "b": 2})
    with pytest.raises(ValueError, match=r"does not say which.*ColumnsCollator\(collator\)"):
        model.train()(**t.DataCollatorForSeq2Seq(tokenizer())([row(4, seed=1)]))


# -- losses of one's own ----------------------------------------------------------------------------------------------


class OwnLoss(t.Trainer):
    """Keeps the labels to itself."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        output = model(**inputs)
        loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, output) if return_outputs else loss


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    """The error's ways out, tried."""
    rows = datasets.Dataset.from_list([row(4, seed=n) for n in range(4)])
    settings = {"max_steps": 1, "per_device_train_batch_size": 2, "cls": OwnLoss}
    with pytest.raises(ValueError, match="without labels.*prompt_lengths.*PromptLengthsCollator"):
        trainer(adapted(), rows, tmp_path, **settings).train()
    model = adapted(positions="l1")
    seen = Seen(model, monkeypatch)
    run = trainer(model, rows, tmp_path, PromptLengthsCollator(t.default_data_collator), **settings)
    assert moved(run) and seen.edited == [[3], [3]]
    by_column = rows.add_column("prompt_lengths", [4] * 4)
    model = adapted(positions="l1")
    seen = Seen(model, monkeypatch)
    assert moved(trainer(model, by_column, tmp_path, **settings)) and seen.edited == [[3], [3]]


# -- optimizers -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon from 2.9 on")
def test_muon_is_for_other_weights():
    """Muon steps matrices, and refuses ReFT's weights of three dimensions. The way out: it steps the matrices of other
    modules that are trained, and AdamW those of ReFT."""
    model = adapted(modules_to_save=["lm_head"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon(trained)
    matrices = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    others = [parameter for parameter in trained if all(parameter is not matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices), torch.optim.AdamW(others)]
    before = [parameter.detach().clone() for parameter in trained]
    batch = {key: torch.tensor([value]) for key, value in row(4, seed=1).items()}
    for _ in range(2):  # where W = R, as at the start, R has no gradient
        model.train()(**batch).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert all(not torch.equal(parameter, old) for parameter, old in zip(trained, before))
    R = model.base_model._layers[0].reft_R["default"]
    model.state_dict()  # makes R orthonormal
    torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)
