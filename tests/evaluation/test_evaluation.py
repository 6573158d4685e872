"""`peft-reft prepare` and `peft-reft evaluate` with tiny models: the same answers in any batch, and the base left as
it was."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import tokenizers as tk
import torch
import transformers as t
from models import CHAT_VOCAB, SIZES, chat_model, randomize, tokenizer
from peft import LoraConfig, PeftModel, get_peft_model
from typer.testing import CliRunner

from peft_reft import ReftConfig
from peft_reft.evaluation.classify import classify
from peft_reft.evaluation.generate import encode_prompts, in_batches
from peft_reft.evaluation.models import Generators, fingerprint, read_adapters
from peft_reft.evaluation.report import means
from peft_reft_cli import app


pytest.importorskip("sklearn")
QUESTIONS = [
    "Name a colour.",
    "What?",
    "Is the answer known to you, or is it not known?",
    "The task describes a request. ok",
    "a",
]


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a LoRA and a ReFT adapter with random weights, and data."""
    root = tmp_path_factory.mktemp("evaluation")
    chat_model().save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    torch.manual_seed(1)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    for name, config in (("lora", lora), ("reft", ReftConfig(r=2, positions="f1+l2", task_type="CAUSAL_LM"))):
        model = get_peft_model(chat_model(), config)
        randomize(model)
        model.save_pretrained(root / name)
    rows = [{"instruction": text, "output": "The answer is 3.", "answer": str(n)} for n, text in enumerate(QUESTIONS)]
    for name in ("mawps.test.json", "mawps.train.json", "boolq.test.json", "alpaca_eval.json"):
        (root / name).write_text(json.dumps(rows))
    return root


def evaluate(folder: Path, *arguments: object) -> dict:
    out = folder / "out" / "results.json"
    adapters = ["--adapter", folder / "lora", "--adapter", f"mine={folder / 'reft'}"]
    run("evaluate", "--base", folder / "base", *adapters, "--data-dir", folder, "--out", out, "--dtype", "float32",
        "--max-new-tokens", 8, *arguments)  # fmt: skip
    return json.loads(out.read_text())


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prepare(folder):
    out = folder / "train.jsonl"
    assert "5 examples of mawps" in run("prepare", "mawps", "--data-dir", folder, "--out", out)
    written = lines(out)
    assert [list(line) for line in written] == [["prompt", "completion"]] * 5
    assert written[0]["prompt"].endswith("### Instruction:\nName a colour.\n\n### Response:\n")
    assert written[0]["completion"] == "The answer is 3."
    with pytest.raises(ValueError, match="cola is for a classifier"):
        run("prepare", "cola", "--data-dir", folder, "--out", out)
    (folder / "SVAMP.train.json").write_text(json.dumps([{"instruction": "a", "answer": "1"}]))
    with pytest.raises(ValueError, match="SVAMP, split 'train', row 1 has no output to learn from"):
        run("prepare", "SVAMP", "--data-dir", folder, "--out", out)


def test_answers_are_the_same_in_any_batch(folder):
    reports = [
        evaluate(folder, "mawps", "boolq", "--batch-size", size, "--outputs", folder / f"o{size}") for size in (1, 8)
    ]
    for task in ("mawps", "boolq"):
        for name in ("base", "lora", "mine"):
            one, eight = (lines(folder / f"o{size}" / f"{task}.{name}.jsonl") for size in (1, 8))
            assert one == eight
            assert len(one) == len(QUESTIONS)
    answers = {
        name: [line["output"] for line in lines(folder / "o8" / f"mawps.{name}.jsonl")]
        for name in ("base", "lora", "mine")
    }
    assert answers["base"] != answers["lora"] != answers["mine"] != answers["base"]
    report = reports[1]
    assert report["models"]["mine"]["method"] == "REFT" and report["models"]["lora"]["method"] == "LORA"
    assert report["models"]["mine"]["parameters"] == 3 * 2 * (
        2 * 32 * 2 + 2
    )  # layers, groups, rank x (R and W of 32, b)
    assert report["models"]["lora"]["parameters"] == 3 * 2 * (32 + 32)
    assert report["models"]["lora"]["bytes"] == 4 * 3 * 2 * (32 + 32)
    assert [(one["task"], one["model"]) for one in report["results"]] == [
        (task, name) for name in ("base", "lora", "mine") for task in ("mawps", "boolq")
    ]
    boolq = [one for one in report["results"] if one["task"] == "boolq"]
    assert [one["unanswered"] for one in boolq] == [5, 5, 5]  # no answer contains "the correct answer is"
    assert boolq[0]["scores"]["accuracy"]["value"] == 0
    assert report["versions"]["peft"] == peft.__version__ and report["split"] == {"mawps": "test", "boolq": "test"}


@pytest.mark.parametrize("name", ["lora", "reft"])
def test_answers_are_those_of_the_model_by_itself(folder, name):
    evaluate(folder, "mawps", "--outputs", folder / "o")
    tokens = t.AutoTokenizer.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(chat_model(), str(folder / name)).eval()
    for line in lines(folder / "o" / f"mawps.{ {'reft': 'mine'}.get(name, name) }.jsonl"):
        ids = tokens(line["prompt"], return_tensors="pt")["input_ids"]
        for _ in range(8):  # greedy, by a whole forward for each token, with prompt_lengths for the ReFT adapter
            told = (
                {"prompt_lengths": torch.tensor([len(tokens(line["prompt"])["input_ids"])])} if name == "reft" else {}
            )
            with torch.no_grad():
                following = model(input_ids=ids, **told).logits[0, -1].argmax()
            if following == tokens.eos_token_id:
                break
            ids = torch.cat([ids, following[None, None]], dim=1)
        assert line["output"] == tokens.decode(
            ids[0, len(tokens(line["prompt"])["input_ids"]) :], skip_special_tokens=True
        )


def test_the_base_comes_back(folder):
    tokens = t.AutoTokenizer.from_pretrained(folder / "base")
    generators = Generators(str(folder / "base"), tokens, "float32")
    base, before = generators.base, {name: tensor.clone() for name, tensor in generators.base.state_dict().items()}
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        logits = base(ids).logits
        for adapter in read_adapters([str(folder / "lora"), str(folder / "reft")]):
            with generators.on_base(adapter) as model:
                assert not torch.equal(model(input_ids=ids).logits, logits)
            assert generators.base is base
            assert torch.equal(generators.base(ids).logits, logits)
    assert {name: tensor.shape for name, tensor in before.items()} == {
        k: v.shape for k, v in base.state_dict().items()
    }
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())


def test_a_changed_base_is_loaded_anew(folder):
    tokens = t.AutoTokenizer.from_pretrained(folder / "base")
    generators = Generators(str(folder / "base"), tokens, "float32")
    base, before = generators.base, fingerprint(generators.base)
    with generators.on_base(read_adapters([str(folder / "lora")])[0]):
        with torch.no_grad():
            next(base.parameters()).data[0, 0] += 1  # as loading a PiSSA adapter does
    assert generators.base is not base
    assert fingerprint(generators.base) == before


def test_outputs_only(folder):
    report = evaluate(folder, "alpaca_eval", "--no-base", "--outputs", folder / "o")
    assert [(one["model"], one["scores"], one["note"]) for one in report["results"]] == [
        ("lora", {}, "outputs only"), ("mine", {}, "outputs only"),
    ]  # fmt: skip
    written = json.loads((folder / "o" / "alpaca_eval.mine.json").read_text())
    assert [list(one) for one in written] == [["instruction", "output", "generator", "dataset"]] * 5
    assert {one["generator"] for one in written} == {"mine"}


def test_room_for_answers():
    tokens = tokenizer()
    texts = ["a" * 20, "b" * 5, "c" * 17]
    lengths = [len(tokens(text)["input_ids"]) for text in texts]
    encoded = encode_prompts(tokens, texts, 8, context=max(lengths) + 2)
    assert [prompt.room for prompt in encoded] == [min(8, max(lengths) + 2 - length) for length in lengths]
    assert all(len({prompt.room for prompt in batch}) == 1 for batch in in_batches(encoded, 8))
    with pytest.raises(ValueError, match="leaves no room for an answer"):
        encode_prompts(tokens, texts, 8, context=max(lengths))


def test_a_prompt_does_not_end_the_text():
    plain, ending = tokenizer(), tokenizer()
    ending.backend_tokenizer.post_processor = tk.processors.TemplateProcessing(
        single=f"$A {ending.eos_token}", special_tokens=[(ending.eos_token, ending.eos_token_id)]
    )
    assert ending("abc")["input_ids"] == [*plain("abc")["input_ids"], plain.eos_token_id]
    assert encode_prompts(ending, ["abc"], 8, None)[0].ids == plain("abc")["input_ids"]


def test_means():
    """The mean is over several tasks, each with a score."""

    def result(model, value):
        return {"model": model, "scores": {} if value is None else {"accuracy": {"value": value}}}

    found = means([result("a", 0.5), result("b", None), result("c", 0.5), result("a", 1.0), result("b", 1.0)])
    assert found == {"a": 0.75}


# -- classifiers -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifiers(folder: Path) -> Path:
    sizes = {**SIZES, "vocab_size": CHAT_VOCAB}
    torch.manual_seed(0)
    t.BertModel(t.BertConfig(**sizes)).save_pretrained(folder / "encoder")
    tokenizer().save_pretrained(folder / "encoder")
    for name, config in (
        ("lora_cls", LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS")),
        ("reft_cls", ReftConfig(r=2, positions="f1", task_type="SEQ_CLS")),
    ):
        get_peft_model(
            t.AutoModelForSequenceClassification.from_pretrained(folder / "encoder", num_labels=2), config
        ).save_pretrained(folder / name)
    rows = [(text, number % 2) for number, text in enumerate(QUESTIONS)]
    (folder / "sst2.dev.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows))
    return folder


def test_classifiers(classifiers):
    found = []
    for size in (1, 8):
        out = classifiers / "glue.json"
        adapters = ("--adapter", classifiers / "lora_cls", "--adapter", classifiers / "reft_cls")
        places = ("--data-dir", classifiers, "--out", out, "--outputs", classifiers / "g")
        run("evaluate", "sst2", "--base", classifiers / "encoder", *adapters, *places, "--batch-size", size)
        report = json.loads(out.read_text())
        found.append([lines(classifiers / "g" / f"sst2.{name}.jsonl") for name in ("lora_cls", "reft_cls")])
        base, *adapters = report["results"]
        assert (
            base["note"] == "untrained head"
            and base["scores"] == {}
            and base["untrained"] == ["classifier.bias", "classifier.weight"]
        )
        for result, written in zip(adapters, found[-1]):
            right = sum(line["extracted"] == number % 2 for number, line in enumerate(written))
            assert result["scores"]["accuracy"]["value"] == right / 5
    assert found[0] == found[1]
    with pytest.raises(ValueError, match="reft_cls does not fit the base with the 3 classes of mnli"):
        rows = [{"premise": "a", "hypothesis": "b", "label": 2}]
        (classifiers / "mnli.dev.json").write_text(json.dumps(rows))
        run("evaluate", "mnli", "--base", classifiers / "encoder", "--adapter", classifiers / "reft_cls", "--data-dir",
            classifiers)  # fmt: skip


def test_a_text_gets_its_own_score_in_any_batch(classifiers):
    tokens = t.AutoTokenizer.from_pretrained(classifiers / "encoder")
    torch.manual_seed(0)
    model = t.AutoModelForSequenceClassification.from_pretrained(classifiers / "encoder", num_labels=1).eval()
    torch.nn.init.normal_(model.classifier.weight, std=10.0)  # so that the texts differ
    with torch.no_grad():
        alone = [model(**tokens(text, return_tensors="pt")).logits.item() for text in QUESTIONS]
    assert len({round(value, 3) for value in alone}) == len(QUESTIONS)
    found, cut = classify(model, tokens, [(text,) for text in QUESTIONS], 2, lambda count: None)
    assert found == pytest.approx(alone, abs=1e-4) and cut == 0


def test_an_adapter_without_a_head_has_no_score(classifiers):
    model = t.AutoModelForSequenceClassification.from_pretrained(classifiers / "encoder", num_labels=2)
    get_peft_model(model, LoraConfig(r=2, target_modules=["query"])).save_pretrained(classifiers / "headless")
    out = classifiers / "headless.json"
    run("evaluate", "sst2", "--base", classifiers / "encoder", "--adapter", classifiers / "headless", "--data-dir",
        classifiers, "--out", out)  # fmt: skip
    assert [one["note"] for one in json.loads(out.read_text())["results"]] == ["untrained head"] * 2


def test_results_as_json(folder):
    """Standard output holds the JSON alone, which is what --out writes."""
    out = folder / "train.json"
    places = ["--data-dir", folder, "--out", out]
    done = CliRunner().invoke(app, [*map(str, ("prepare", "mawps", *places, "--json"))])
    assert json.loads(done.stdout) == {"file": str(out), "examples": 5, "tasks": ["mawps"], "split": "train"}
    arguments = ("evaluate", "mawps", "--base", folder / "base", *places, "--max-new-tokens", 2, "--json")
    done = CliRunner().invoke(app, [*map(str, arguments)])
    assert json.loads(done.stdout) == json.loads(out.read_text())


def test_errors(folder):
    for arguments, message in (
        (["--adapter", folder / "none"], "--adapter .*none: there is no such folder"),
        (["--adapter", folder / "lora"], "'lora' is taken or empty"),
        (["--adapter", f"base={folder / 'lora'}"], "'base' is taken or empty"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(folder, "mawps", *arguments)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        run("evaluate", "mawps", "--base", folder / "base", "--no-base", "--data-dir", folder)
