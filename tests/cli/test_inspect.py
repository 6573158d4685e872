"""`peft-reft inspect`: its numbers are those of plain hooks on the base, also for the quickstart's adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml
from models import blocks, chat_model, randomize, tokenizer
from oracle import Edit, edited
from paths import REPOSITORY
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_reft import ReftConfig
from peft_reft.integrations.axolotl.keys import read_keys, reft_config
from peft_reft.tools.formats import encode_row, pad_rows, read_rows
from peft_reft_cli import main


OPENING = "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with a tokenizer, an adapter that has learnt something, and rows of data."""
    root = tmp_path_factory.mktemp("inspect")
    base = chat_model()
    base.save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    base.name_or_path = str(root / "base")
    model = get_peft_model(base, ReftConfig(r=2, positions="f1+l2", response_template=OPENING))
    randomize(model, scale=0.3)
    model.save_pretrained(root / "adapter")
    (root / "rows.jsonl").write_text(json.dumps({"prompt": f"Why? {OPENING}", "completion": "No."}) + "\n")
    return root


def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[str, str]:
    """Standard output and standard error of `peft-reft inspect`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["peft-reft", "inspect", *map(str, arguments)])
    with pytest.raises(SystemExit):
        main()
    shown = capfd.readouterr()
    return shown.out, shown.err


def by_hooks(base: str, adapter: Path, first: int, last: int, prompt: list[int], answer: list[int]) -> tuple:
    """For each edited layer the sizes of the edits of the prompt's first and last tokens, and the loss of the answer
    with all edits, and without any, by hooks on the blocks of the plain base."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    weights = load_file(adapter / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    numbers = settings["layers_to_transform"] or list(range(len(blocks(model))))
    sizes: list[list[float]] = [[] for _ in numbers]

    class Measuring(Edit):
        def __call__(self, h: Tensor, side: int) -> Tensor:
            changed = super().__call__(h, side)
            sizes[edits.index(self)].append(((changed - h).norm() / h.norm()).item())
            return changed

        def __eq__(self, other: object) -> bool:
            return self is other

    prefix = "base_model.model.model.layers."
    edits = [
        Measuring(settings["intervention"], *(weights[f"{prefix}{n}.reft_{letter}"] for letter in "RWb"), lambda x: x)
        for n in numbers
    ]
    columns = [*range(first), *range(len(prompt) - last, len(prompt))]
    indices = [(0, column, int(place >= first)) for place, column in enumerate(columns)]
    ids = torch.tensor([prompt + answer])
    labels = torch.tensor([[-100] * len(prompt) + answer])
    with torch.no_grad():
        plain = float(model(ids, labels=labels).loss)
        with edited([blocks(model)[n] for n in numbers], edits, indices):
            loss = float(model(ids, labels=labels).loss)
    return columns, sizes, loss, plain


def compare(found: dict, expected: tuple) -> None:
    columns, sizes, loss, plain = expected
    assert [(token["row"], token["column"]) for token in found["tokens"]] == [(0, column) for column in columns]
    for layer, own in zip(found["layers"], sizes, strict=True):
        assert layer["sizes"] == pytest.approx(own, rel=1e-3, abs=1e-6)
    assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["loss_of_base"] == pytest.approx(plain, rel=1e-4)


def chat_tokens(words: PreTrainedTokenizerBase, question: str, answer: str) -> tuple[list[int], list[int]]:
    """Tokens of a chat prompt and of the answer's turn."""
    asked = [{"role": "user", "content": question}]
    prompt = words.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    whole = words.apply_chat_template([*asked, {"role": "assistant", "content": answer}], tokenize=False)
    ids = words(prompt, add_special_tokens=False)["input_ids"]
    return ids, words(whole, add_special_tokens=False)["input_ids"][len(ids) :]


def test_a_chat(folder, capfd, monkeypatch):
    arguments = ["--base", folder / "base", "--chat", "--text", "Name a colour.", "--answer", "Blue.", "--json"]
    out, _ = run(capfd, monkeypatch, folder / "adapter", *arguments)
    found = json.loads(out)
    words = tokenizer()
    prompt, answer = chat_tokens(words, "Name a colour.", "Blue.")
    compare(found, by_hooks(str(folder / "base"), folder / "adapter", 1, 2, prompt, answer))
    assert [token["text"] for token in found["tokens"]] == [words.decode([prompt[i]]) for i in (0, -2, -1)]
    assert all(layer["loss_without"] != pytest.approx(found["loss"], abs=1e-4) for layer in found["layers"])


def test_the_base_that_the_adapter_names_a_picture_and_a_table(folder, tmp_path, capfd, monkeypatch):
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    picture = tmp_path / "map.png"
    text = f"Why? {OPENING}"
    out, _ = run(capfd, monkeypatch, folder / "adapter", "--text", text, "--answer", "No.", "--plot", picture)
    assert out.splitlines()[-1] == f"wrote {picture}" and picture.read_bytes().startswith(b"\x89PNG")
    assert "model.layers.2" in out and "loss" in out
    rows, notes = run(capfd, monkeypatch, folder / "adapter", "--dataset", folder / "rows.jsonl", "--json")
    assert "rows read as --template completion" in notes
    assert f"loss {json.loads(rows)['loss']:.4f} with all edits" in out  # the row is the same text


def test_a_text_alone_is_what_the_model_reads(folder, capfd, monkeypatch):
    out, _ = run(capfd, monkeypatch, folder / "adapter", "--text", "Why? No.", "--json")
    found, ids = json.loads(out), tokenizer()("Why? No.")["input_ids"]
    assert found["loss"] is None and found["layers"][0]["loss_without"] is None
    assert [token["column"] for token in found["tokens"]] == [0, len(ids) - 2, len(ids) - 1]


def test_a_classifier_has_its_head(tmp_path, capfd, monkeypatch):
    words = tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = BertForSequenceClassification(BertConfig(**sizes, vocab_size=len(words), num_labels=5))
    base.save_pretrained(tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    for key in ("id2label", "label2id"):  # as of a base without a trained head
        config.pop(key, None)
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    words.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, ReftConfig(r=2, positions="f1", task_type="SEQ_CLS"))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    given = [tmp_path / "adapter", "--base", tmp_path / "base"]
    out, err = run(capfd, monkeypatch, *given, "--text", "Why?", "--json")
    assert len(json.loads(out)["layers"]) == 2, err
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "No."}) + "\n")
    for rows in (["--text", "Why?", "--answer", "No."], ["--dataset", tmp_path / "rows.jsonl"]):
        _, err = run(capfd, monkeypatch, *given, *rows)
        assert "are one text for a causal language model, and the adapter is for SEQ_CLS. Leave the answers out" in err


def test_an_answer_of_an_encoder_decoder_model_is_the_decoders(tmp_path, capfd, monkeypatch):
    words = tokenizer()
    words.save_pretrained(tmp_path / "base")
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": len(words)}
    base = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0))
    base.save_pretrained(tmp_path / "base")
    targets = r"(encoder|decoder)\.block\.\d+"
    model = get_peft_model(base, ReftConfig(r=2, positions="l1", task_type="SEQ_2_SEQ_LM", target_modules=targets))
    randomize(model)
    model.eval().save_pretrained(tmp_path / "adapter")
    given = [tmp_path / "adapter", "--base", tmp_path / "base", "--json"]
    texts, answers = ("Why?", "Why is that?"), ("No.", "It is not.")
    asked = [part for text, answer in zip(texts, answers) for part in ("--text", text, "--answer", answer)]
    out, err = run(capfd, monkeypatch, *given, *asked)
    found = json.loads(out or err)
    prompts, labels = ([words(text)["input_ids"] for text in own] for own in (texts, answers))
    ends = [(row, len(ids) - 1) for row, ids in enumerate(prompts)]
    assert [(t["row"], t["column"]) for t in found["tokens"] if t["in_encoder"]] == ends
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([ids]), labels=torch.tensor([own])).loss.item() * len(own)
            for ids, own in zip(prompts, labels)
        ]
    assert found["loss"] == pytest.approx(sum(losses) / sum(map(len, labels)), rel=1e-4)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "Why?", "completion": "No."}) + "\n")
    _, err = run(capfd, monkeypatch, *given, "--dataset", tmp_path / "rows.jsonl")
    assert "the adapter is for SEQ_2_SEQ_LM. Give --text and --answer" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "Give either --text 'a prompt', as often as you like, or --dataset file.jsonl."),
        (["--text", "x", "--dataset", "rows.jsonl"], "Give either --text"),
        (["--dataset", "rows.jsonl", "--chat"], "--answer and --chat are about --text."),
        (["--dataset", "no.jsonl"], "--dataset no.jsonl: there is no such file."),
        (["--text", "x", "--text", "y", "--answer", "z"], "2 texts and 1 answers were given."),
        (["--text", "Why?", "--answer", "No."], "No ReFT adapter of PeftModel edits a token of this batch"),
        (["--text", "x", "--plot", "no/map.png"], "--plot no/map.png: there is no folder no."),
        (["--text", "x", "--base", "no/where"], "--base no/where: there is no such folder"),
        (["--text", "x", "--base", "adapter"], "--base adapter: the folder has no config.json"),
    ],
)
def test_errors_name_the_option_and_the_value(folder, arguments, message, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    _, error = run(capfd, monkeypatch, "adapter", *arguments)
    (line,) = [line for line in error.splitlines() if line.startswith("peft-reft: ")]
    assert line.startswith(f"peft-reft: {message}")


@pytest.mark.slow
def test_the_quickstarts_adapter(smollm2, tmp_path, capfd, monkeypatch):
    """An adapter of the quickstart's settings, after a few steps on its data, on the question of docs/seeing.md."""
    recipe = REPOSITORY / "examples" / "quickstart.yaml"
    config = reft_config(read_keys(yaml.safe_load(recipe.read_text()), str(recipe)), "CAUSAL_LM")
    words = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32), config)
    rows = [encode_row(row, "chat", words) for row in read_rows(REPOSITORY / "examples" / "quickstart.jsonl", 8)]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3, weight_decay=0.0)
    for begin in (0, 4):
        batch = {key: torch.tensor(value) for key, value in pad_rows(rows[begin : begin + 4]).items()}
        model.train()(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "adapter")

    question, answer = (
        "What is the capital of Japan?",
        "Captain's log: The capital of Japan is Tokyo. Steady as she goes.",
    )
    arguments = ["--base", smollm2, "--chat", "--text", question, "--answer", answer, "--json"]
    out, _ = run(capfd, monkeypatch, tmp_path / "adapter", *arguments)
    found = json.loads(out)
    assert [layer["name"] for layer in found["layers"]] == [f"model.layers.{n}" for n in (4, 9, 14, 19, 24, 29)]
    compare(found, by_hooks(smollm2, tmp_path / "adapter", 7, 7, *chat_tokens(words, question, answer)))
    assert found["loss"] < found["loss_of_base"] - 0.05
