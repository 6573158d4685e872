"""A saved adapter introduces itself: adapter_config.json names the package, and the model card says how to load it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conversions import PYREFT, from_pyreft
from huggingface_hub import ModelCard
from models import ENCODERS, SEQ2SEQ, chat_model, randomize, tokenizer
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from peft_reft import ReftConfig
from peft_reft.tuner import card as cards
from peft_reft.tuner.versions import installed


@pytest.fixture
def base(tmp_path) -> str:
    chat_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def adapted(base: str, **settings) -> PeftModel:
    config = ReftConfig(**{"r": 2, "positions": "f2+l2", "task_type": "CAUSAL_LM", **settings})
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    randomize(model)
    return model


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def section_of(folder: Path) -> str:
    """The text of the one section about ReFT."""
    found = cards.SECTION.findall(card_of(folder).text)
    assert len(found) == 1
    return found[0][1]


def blocks_of(folder: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", section_of(folder), re.DOTALL)


# -- adapter_config.json ----------------------------------------------------------------------------------------------


def test_the_config_names_the_package(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["library"] == {
        "name": "peft-reft",
        "version": installed("peft-reft"),
        "install": "pip install peft-reft",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert isinstance(config, ReftConfig) and not hasattr(config, "library")


# -- cards ------------------------------------------------------------------------------------------------------------


def test_the_card_that_peft_writes(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "out")
    data, section = card_of(tmp_path / "out").data, section_of(tmp_path / "out")
    assert {"reft", "loreft"} <= set(data.tags) and data.library_name == "peft"
    assert blocks_of(tmp_path / "out", "bash") == ["pip install peft-reft"]
    assert "`f2+l2`: the first 2 and the last 2 tokens of the prompt" in section
    assert "| edit | `loreft` |" in section and "| rank | 2 |" in section
    # 3 layers, 2 groups, R and W [2, 32] and b [2]
    assert f"| parameters | {3 * 2 * (2 * 2 * 32 + 2):,} |" in section
    assert "arXiv:2404.03592" in section
    text = card_of(tmp_path / "out").text
    assert text.index("# Model Card") < text.index("How to use this ReFT adapter") < text.index("## Model Details")


@pytest.mark.parametrize(
    "positions, words",
    [
        ("f3", "the first 3 tokens of the prompt"),
        ("l1", "the last 1 token of the prompt"),
        ("f1+l4", "the first 1 and the last 4 tokens of the prompt"),
        ("all", "every token"),
    ],
)
def test_positions_in_words(base, tmp_path, positions, words):
    adapted(base, positions=positions).save_pretrained(tmp_path / "out")
    assert f"| positions | `{positions}`: {words} |" in section_of(tmp_path / "out")


def test_a_second_save_renews_the_section_and_adds_none(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "out")
    first = (tmp_path / "out" / "README.md").read_text()
    adapted(base).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_text() == first
    adapted(base, r=3, intervention="direft").save_pretrained(tmp_path / "out")
    assert "| rank | 3 |" in section_of(tmp_path / "out") and "`direft`" in section_of(tmp_path / "out")
    tags = card_of(tmp_path / "out").data.tags
    assert len(tags) == len(set(tags)) and {"reft", "direft"} <= set(tags)


def test_what_a_user_wrote_stays(base, tmp_path):
    adapted(base).save_pretrained(tmp_path / "out")
    file = tmp_path / "out" / "README.md"
    around = (
        file.read_text().replace("# Model Card for Model ID", "# Mine").replace("## Model Details", "## Words of mine")
    )
    file.write_text(around)
    adapted(base, r=3).save_pretrained(tmp_path / "out")
    assert "# Mine" in file.read_text() and "## Words of mine" in file.read_text()
    assert "| rank | 3 |" in section_of(tmp_path / "out")
    file.write_text(file.read_text().replace("In PEFT's format", "").replace("| rank | 3 |", "| rank | three |"))
    adapted(base, r=4).save_pretrained(tmp_path / "out")
    assert "| rank | three |" in section_of(tmp_path / "out")  # an edited section is the user's


def test_a_heading_inside_a_code_block_is_none(tmp_path):
    text = "# Title\n\n```yaml\n## a comment\nr: 8\n```\n\n## Training\n\nwords\n"
    with_section = cards._with_section(text, "section")
    assert with_section.index("r: 8") < with_section.index("section") < with_section.index("## Training")
    assert with_section.replace(cards.SECTION.search(with_section)[0] + "\n\n", "") + "\n" == text


def test_an_adapter_in_a_folder_of_its_own_has_a_card_of_its_own(base, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), ReftConfig(r=2, task_type="CAUSAL_LM"), adapter_name="style"
    )
    model.save_pretrained(tmp_path / "out")
    card = card_of(tmp_path / "out" / "style")
    assert card.data.library_name == "peft" and card.data.base_model == base and "reft" in card.data.tags
    assert blocks_of(tmp_path / "out" / "style", "python")


def test_a_config_alone_makes_no_card(tmp_path):
    ReftConfig(r=2, task_type="CAUSAL_LM").save_pretrained(str(tmp_path / "out"))
    assert not (tmp_path / "out" / "README.md").exists()


def test_a_card_that_cant_be_written_is_a_warning(base, tmp_path):
    model = adapted(base)
    model.save_pretrained(tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("---\ntags: [\n---\n")
    with pytest.warns(UserWarning, match="The model card in .* says nothing of ReFT"):
        model.peft_config["default"].save_pretrained(str(tmp_path / "out"))


def test_convert_writes_a_card(tmp_path):
    name = next(name for name in PYREFT if PYREFT[name]["base"] == "llama")
    from_pyreft(PYREFT[name], tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.data.library_name == "peft" and "reft" in card.data.tags and card.data.base_model
    assert "AutoPeftModelForCausalLM" in section_of(tmp_path / "adapter")


# -- the Trainers' cards ----------------------------------------------------------------------------------------------

ROWS = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 2


def arguments(kind: type, tmp_path: Path, **settings):
    return kind(
        output_dir=str(tmp_path / "out"), max_steps=1, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        per_device_train_batch_size=1, **settings,
    )  # fmt: skip


def test_trainers_card(base, tmp_path):
    """transformers' own, which axolotl writes: over PEFT's."""
    trainer = Trainer(adapted(base), arguments(TrainingArguments, tmp_path), train_dataset=ROWS)
    trainer.save_model()
    trainer.create_model_card(model_name="mine")
    assert "## Training procedure" in card_of(tmp_path / "out").text
    assert 'adapter = "."' in section_of(tmp_path / "out")
    assert {"reft", "loreft", "generated_from_trainer"} <= set(card_of(tmp_path / "out").data.tags) | {
        "generated_from_trainer"
    }


def test_a_trainer_without_reft_writes_its_card_as_ever(base, tmp_path):
    trainer = Trainer(
        AutoModelForCausalLM.from_pretrained(base), arguments(TrainingArguments, tmp_path), train_dataset=ROWS
    )
    assert "create_model_card" not in vars(trainer)


def test_trls_card(base, tmp_path, monkeypatch):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = [{"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No."}]}] * 2
    trainer = trl.SFTTrainer(
        base,
        args=arguments(trl.SFTConfig, tmp_path),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=ReftConfig(r=2, positions="f2+l2", task_type="CAUSAL_LM"),
    )
    trainer.train()
    # TRL's card lies above the checkpoint, which has one of its own.
    assert 'adapter = "checkpoint-1"' in section_of(tmp_path / "out")
    assert 'adapter = "."' in section_of(tmp_path / "out" / "checkpoint-1")
    assert "reft" in card_of(tmp_path / "out").data.tags and "sft" in card_of(tmp_path / "out").data.tags
    trainer.save_model()
    assert 'adapter = "."' in section_of(tmp_path / "out")
    assert "It has been trained using [TRL]" in card_of(tmp_path / "out").text


# -- a stranger's steps -----------------------------------------------------------------------------------------------


def run_snippet(folder: Path) -> str:
    """What the Python block of a card prints, run in its folder by a process that knows nothing else."""
    (code,) = blocks_of(folder, "python")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("template", ["auto", None, "### Response:", [3, 310]])
def test_from_the_card_to_an_answer(base, tmp_path, template):
    model = adapted(base, response_template=template).eval()
    model.save_pretrained(tmp_path / "out")
    tokens = tokenizer()
    question = "Name a colour of the sky."
    if template == "auto":
        prompt = tokens.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    else:
        prompt = {None: question, "### Response:": f"{question}\n### Response:"}.get(
            None if template is None else str(template), question + tokens.decode([3, 310])
        )
    inputs = tokens(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=64)
    expected = tokens.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert run_snippet(tmp_path / "out").rstrip("\n") == expected.rstrip("\n")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
def test_other_tasks(tmp_path, task):
    model = ENCODERS["roberta"]() if task == "SEQ_CLS" else SEQ2SEQ["t5"]()
    model.resize_token_embeddings(len(tokenizer()))
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    get_peft_model(base, ReftConfig(r=2, task_type=task)).save_pretrained(tmp_path / "out")
    printed = run_snippet(tmp_path / "out")
    assert "SequenceClassifierOutput" in printed if task == "SEQ_CLS" else isinstance(printed, str)
    if task == "SEQ_CLS":  # three labels, as the head that was trained
        assert "num_labels=3" in blocks_of(tmp_path / "out", "python")[0]
