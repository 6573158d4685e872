"""explain_positions and `peft-reft positions` show the tokens that the model really edits."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import build, chat_model, prompts, tokenizer
from peft import get_peft_model

from peft_reft import ReftConfig, explain_positions


TURNS = [
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "The answer"},
]
OPENING = "<|im_start|>assistant\n"


def conversation(side: str = "right") -> dict:
    tokens = tokenizer()
    tokens.padding_side = side
    texts = [tokens.apply_chat_template(turns, tokenize=False) for turns in (TURNS, TURNS[:2])]
    return dict(tokens(texts, padding=True, return_tensors="pt"))


def shown(*args, **options) -> str:
    file = io.StringIO()
    explain_positions(*args, file=file, **options)
    return file.getvalue()


def chat_config(**settings) -> ReftConfig:
    return ReftConfig(positions="f1+l2", response_template=OPENING, **settings)


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_is_printed(side):
    lines = shown(chat_config(prompt_boundary="every"), tokenizer(), conversation(side)).splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("positions='f1+l2'. F[ ] first token  L[ ] last token")
    width = conversation()["input_ids"].shape[1]
    short = int(conversation()["attention_mask"][1].sum())
    begin = 0 if side == "right" else width - short
    assert lines[1] == f"row 0, tokens 0 to {width - 1}; the prompt is told by response_template"
    assert lines[2] == (
        "  F[<|im_start|>]user\\nName a colour.<|im_end|>\\n<|im_start|>assistanL[t]L[\\n]»Blue.<|im_end|>"
        "«\\n<|im_start|>user\\nWhy?<|im_end|>\\n<|im_start|>assistanL[t]L[\\n]»The answer<|im_end|>\\n"
    )
    assert lines[3] == f"row 1, tokens {begin} to {begin + short - 1}; the prompt is told by response_template"
    assert lines[4].endswith("assistanL[t]L[\\n]»Blue.<|im_end|>\\n")


def test_colour_where_the_terminal_has_it(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[" in shown(chat_config(), tokenizer(), conversation())
    monkeypatch.delenv("FORCE_COLOR")
    assert "\x1b[" not in shown(chat_config(), tokenizer(), conversation())


def test_the_same_as_data():
    batch = conversation("left")
    explained = explain_positions(chat_config(), tokenizer(), batch, quiet=True)
    assert [sequence.row for sequence in explained] == [0, 1]
    one = explained[1]
    real = batch["attention_mask"][1].bool()
    assert one.ids == batch["input_ids"][1][real].tolist()
    assert "".join(one.tokens) == tokenizer().decode(one.ids)
    end = len(one.prompt)
    assert "".join(one.tokens[:end]).endswith(OPENING) and one.prompt == list(range(end))
    assert (one.first, one.last, one.source) == ([0], [end - 2, end - 1], "response_template")


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "all"])
def test_what_a_model_edits_is_what_is_shown(positions):
    """The tokens whose hidden states the adapter changes, against the explanation."""
    model = get_peft_model(chat_model(), ReftConfig(r=4, positions=positions, init_weights="pyreft")).eval()
    batch = conversation("left")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -9:] = batch["input_ids"][:, -9:]
    batch["labels"] = labels
    with torch.no_grad():
        after = model(**batch, output_hidden_states=True).hidden_states[1]
        with model.disable_adapter():
            before = model(**batch, output_hidden_states=True).hidden_states[1]
    changed = (after - before).abs().amax(dim=-1) > 1e-4
    for one in explain_positions(model, tokenizer(), batch, quiet=True):
        seen = changed[one.row, one.begin : one.begin + len(one.ids)].nonzero().flatten().tolist()
        assert seen == sorted({*one.first, *one.last})
        assert one.source == ("all tokens" if positions == "all" else "labels")


def test_a_models_own_rules():
    """Labels of a model that can't generate are classes. The model's end token ends an answer."""
    batch = {**prompts(9, 4), "labels": torch.full((2, 9), -100).index_fill_(1, torch.tensor([5]), 1)}
    classes = get_peft_model(build(("bert", "TOKEN_CLS")), ReftConfig(r=2, positions="l1"))
    assert [one.source for one in explain_positions(classes, tokenizer(), batch, quiet=True)] == ["all tokens"] * 2
    base = build("llama")
    base.generation_config.eos_token_id = [2, 60]
    config = ReftConfig(r=2, positions="l4", response_template=[5, 6], prompt_boundary="every")
    talk = {"input_ids": [[9, 5, 6, 8, 60, 5, 6, 7]]}
    (one,) = explain_positions(get_peft_model(base, config), tokenizer(), talk, quiet=True)
    assert one.last == [0, 1, 2, 5, 6]


def test_packed_rows_and_what_was_told():
    ids = prompts(9)["input_ids"]
    packed = {"input_ids": ids, "position_ids": [[0, 1, 2, 3, 0, 1, 2, 3, 4]], "prompt_lengths": [2, 3]}
    one, two = explain_positions(ReftConfig(positions="l1"), tokenizer(), packed, quiet=True)
    assert (one.begin, one.last, two.begin, two.last, two.source) == (0, [1], 4, [2], "prompt_lengths")
    marked = {"input_ids": ids, "intervention_mask": [[0, 1, 0, 0, 2, 0, 0, 0, 0]]}
    (one,) = explain_positions(ReftConfig(positions="f1+l1"), tokenizer(), marked, quiet=True)
    assert (one.first, one.last, one.source) == ([1], [4], "intervention_mask")


def test_warnings():
    ids = prompts(6)["input_ids"]
    # without an end token between them, an answer counts to the turn after it
    batch = {"input_ids": [[9, 5, 6, 8, 8, 5, 6, 7]], "labels": [[-100, -100, -100, 8, 8, -100, -100, 7]]}
    reaching = ReftConfig(positions="l4", response_template=[5, 6], prompt_boundary="every")
    text = shown(reaching, tokenizer(), batch)
    assert "Warning: edited tokens are part of an answer, which generation would not edit: [3, 4]" in text
    text = shown(ReftConfig(positions="f1+l1"), tokenizer(), {"input_ids": ids[:, :1]})
    assert "Warning: no token is edited, for a prompt of one token has none for both first and last tokens" in text
    assert "1 of 1 sequences have no token that is edited" in text
    text = shown(ReftConfig(), tokenizer(), {"input_ids": [[5, 6], [5, 6]], "labels": [[5, 6], [-100, 6]]})
    assert text.count("Warning: no token is edited") == 2 and text.count("for a prompt of one token") == 1


def test_what_can_not_be_explained():
    with pytest.raises(ValueError, match="no active ReFT adapter"):
        explain_positions(build("llama"), tokenizer(), prompts(4))
    with pytest.raises(ValueError, match="no input_ids"):
        explain_positions(ReftConfig(), tokenizer(), {"labels": [[1]]})
    with pytest.raises(ValueError, match="labels has shape"):
        explain_positions(ReftConfig(), tokenizer(), {"input_ids": [[5, 6]], "labels": [[5]]})


# -- the console command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tokenizer, an adapter, a config and datasets."""
    folder = tmp_path_factory.mktemp("cli")
    tokenizer().save_pretrained(folder / "base")
    chat_model().save_pretrained(folder / "base")
    base = chat_model()
    base.name_or_path = str(folder / "base")
    model = get_peft_model(base, ReftConfig(r=2, positions="f1+l2", response_template=OPENING))
    model.save_pretrained(folder / "adapter")
    (folder / "config.json").write_text(json.dumps({"positions": "f1+l2"}))
    rows = {
        "chat": [
            {"messages": TURNS},
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "No"}]},
        ],
        "alpaca": [
            {"instruction": "Name a colour.", "output": "Blue"},
            {"instruction": "Add.", "input": "1", "output": "2"},
        ],
        "completion": [{"prompt": "Why? ", "completion": "No."}],
        "text": [{"text": "Why? No."}],
    }
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)) + "\n")
    (folder / "list.json").write_text(json.dumps(rows["completion"]))
    return folder


def run(folder: Path, *arguments: str, module: bool = False) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "peft_reft"] if module else [str(Path(sys.executable).parent / "peft-reft")]
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True)


def test_positions_of_an_adapter(folder):
    """The command shows the same before and after training, with the base's tokenizer and the adapter's template."""
    done = run(folder, "positions", "adapter", "--dataset", "chat.jsonl", "--text", "Why?")
    assert done.returncode == 0, done.stderr
    assert "row 0, tokens 0 to " in done.stdout
    assert "assistanL[t]L[\\n]»Blue.<|im_end|>\\n<|im_start|>user" in done.stdout
    assert done.stdout.count("told by response_template") == 3
    again = run(folder, "positions", "adapter", "--dataset", "chat.jsonl", "--text", "Why?", module=True)
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    "template, file, expected",
    [
        ("chat", "chat.jsonl", ["assistant\\n»Blue.<|im_end|>\\n<|im_start|>user", "assistant\\n»No<|im_end|>"]),
        (
            "alpaca",
            "alpaca.jsonl",
            ["### Response:\\n»Blue<|im_end|>", "### Input:\\n1\\n\\n### Response:\\n»2<|im_end|>"],
        ),
        ("completion", "completion.jsonl", ["Why? »No.<|im_end|>"]),
        ("completion", "list.json", ["Why? »No.<|im_end|>"]),
        ("text", "text.jsonl", ["Why? No."]),
        ("Q: {prompt}|>A: {completion}", "completion.jsonl", ["Q: Why? »A: No.<|im_end|>"]),
    ],
)
def test_positions_of_a_dataset(folder, template, file, expected, capsys, monkeypatch):
    from peft_reft_cli import main

    monkeypatch.chdir(folder)
    arguments = ["positions", "config.json", "--tokenizer", "base", "--dataset", file, "--template", template]
    monkeypatch.setattr(sys, "argv", ["peft-reft", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert len(rows) == len(expected)
    for row, text in zip(rows, expected):
        assert text in re.sub(r"[FL]\[(.*?)\]", r"\1", row)
        assert row.count("F[") == 1 and row.partition("»")[0].count("L[") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["config.json"], "Give --text 'a prompt', or --dataset file.jsonl"),
        (["config.json", "--text", "x"], "does not name a base model. Give its tokenizer with --tokenizer"),
        (
            ["config.json", "--tokenizer", "base", "--dataset", "chat.jsonl", "--template", "alpaca"],
            "reads the field 'instruction'",
        ),
        (
            ["config.json", "--tokenizer", "base", "--dataset", "chat.jsonl", "--template", "vicuna"],
            "--template vicuna is unknown",
        ),
        (["config.json", "--tokenizer", "base", "--dataset", "none.jsonl"], "none.jsonl"),
        (["nowhere", "--text", "x"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, message, capsys, monkeypatch):
    from peft_reft_cli import main

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["peft-reft", "positions", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
