"""The recipes in examples/: their settings against the paper's numbers, written here by hand; the README's commands;
the GLUE script.

The paper is arXiv 2404.03592, whose tables count parameters as a share of the base model's, a classifier's apart.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest
import tokenizers as tk
import torch
import transformers as t
import yaml
from models import tokenizer
from paths import REPOSITORY
from peft import LoraConfig, get_peft_model

from peft_reft import ReftConfig


EXAMPLES = REPOSITORY / "examples"
YAMLS = sorted(
    path for folder in ("commonsense", "arithmetic", "instruct") for path in (EXAMPLES / folder).glob("*.yaml")
)
A100 = {"bf16": True, "fp8": False, "tf32": True, "n_gpu": 1, "n_node": 1, "compute_capability": "sm_80"}
UNTIED, TIED = False, True


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def validated(path: Path, **overrides):
    """A YAML as axolotl reads it, with what the command line overrides."""
    pytest.importorskip("axolotl", reason="needs the extra `axolotl`")
    from axolotl.cli.config import prepare_plugins
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    cfg = DictDefault(yaml.safe_load(path.read_text()) | overrides)
    prepare_plugins(cfg)
    return validate_config(cfg, capabilities=A100, env_capabilities={"torch_version": "2.6.0"})


def reft_config(cfg) -> ReftConfig:
    from peft_reft.integrations.axolotl.args import ReftBlock
    from peft_reft.integrations.axolotl.keys import reft_config

    if isinstance(cfg.reft, dict):
        cfg.reft = ReftBlock(**cfg.reft)
    return reft_config(cfg, "CAUSAL_LM")


# -- the settings of the paper ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_axolotl_takes_every_yaml(path):
    cfg = validated(path)
    assert cfg.adapter == ("lora" if path.name == "lora.yaml" else "loreft")
    assert [dict(one)["path"] for one in cfg.datasets] == [f"outputs/{path.parent.name}/train.jsonl"]


def test_no_recipe_is_missing():
    assert len(YAMLS) == 9


@pytest.mark.parametrize("folder", ["commonsense", "arithmetic", "instruct"])
def test_a_smol_yaml_runs_lora_by_options_alone(folder):
    cfg = validated(EXAMPLES / folder / "smol.yaml", adapter="lora", lora_alpha=16, lora_target_linear=True)
    assert cfg.adapter == "lora" and cfg.lora_r > 0


@pytest.mark.parametrize(
    "folder, r, positions, tied, layers, base, epochs, batch, length, warmup",
    [
        ("commonsense", 8, "f7+l7", TIED, None, "yahma/llama-7b-hf", 6, 32, 512, 0.1),
        ("arithmetic", 8, "f7+l7", TIED, None, "yahma/llama-7b-hf", 12, 32, 512, 0.1),
        ("instruct", 4, "f5+l5", UNTIED, [3, 9, 18, 24], "meta-llama/Llama-2-7b-hf", 9, 128, 768, 0.0),
    ],
)
def test_settings_of_the_7b_runs(folder, r, positions, tied, layers, base, epochs, batch, length, warmup):
    cfg = validated(EXAMPLES / folder / "paper.yaml")
    config = reft_config(cfg)
    assert (config.intervention, config.r, config.positions, config.share_weights) == ("loreft", r, positions, tied)
    assert (config.layers_to_transform, config.dropout, config.act_fn) == (layers, 0.0, None)
    assert (cfg.base_model, cfg.num_epochs, cfg.sequence_len) == (base, epochs, length)
    assert cfg.micro_batch_size * cfg.gradient_accumulation_steps == batch
    assert (cfg.learning_rate, cfg.lr_scheduler, cfg.optimizer) == (9e-4, "linear", "adamw_torch")
    assert (cfg.warmup_ratio, cfg.weight_decay, cfg.train_on_inputs or False) == (warmup, 0.0, False)


@pytest.fixture
def llama_7b() -> torch.nn.Module:
    """The model on the meta device. LLaMA-7B and Llama-2 7B have the same sizes."""
    sizes = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    with torch.device("meta"):
        model = t.LlamaForCausalLM(t.LlamaConfig(**sizes, num_attention_heads=32, tie_word_embeddings=False))
    assert model.num_parameters() == 6_738_415_616
    return model


def trained(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize(
    "folder, count, percent",
    [
        ("commonsense", 32 * (8 * 2 * 4096 + 8), 0.031),
        ("arithmetic", 32 * (8 * 2 * 4096 + 8), 0.031),
        ("instruct", 4 * 2 * (4 * 2 * 4096 + 4), 0.0039),
    ],
)
def test_share_of_a_7b_model_that_loreft_trains(llama_7b, folder, count, percent):
    found = trained(get_peft_model(llama_7b, reft_config(validated(EXAMPLES / folder / "paper.yaml"))))
    assert found == count
    assert 100 * found / 6_738_415_616 == pytest.approx(percent, rel=0.02)


@pytest.mark.parametrize("folder, percent", [("commonsense", 0.826), ("arithmetic", 0.826), ("instruct", 0.1245)])
def test_share_of_a_7b_model_that_lora_trains(llama_7b, folder, percent):
    cfg = validated(EXAMPLES / folder / "lora.yaml")
    config = LoraConfig(r=cfg.lora_r, lora_alpha=cfg.lora_alpha, target_modules=list(cfg.lora_target_modules))
    assert 100 * trained(get_peft_model(llama_7b, config)) / 6_738_415_616 == pytest.approx(percent, rel=0.01)


# Tables 9 and 10: positions, dropout, learning rate, warm-up and epochs, in the tables' order of tasks.
ORDER = ["mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"]
ROBERTA = {
    "roberta-base": {
        "positions": ["f1", "f3", "f3", "f3", "f11", "f11", "f3", "f3"],
        "dropout": [0.05, 0.1, 0.05, 0.2, 0.05, 0.05, 0.05, 0.05],
        "learning_rate": [6e-4, 6e-4, 3e-4, 4e-4, 9e-4, 6e-4, 9e-4, 6e-4],
        "warmup_ratio": [0.06, 0.1, 0, 0.005, 0.1, 0, 0, 0.03],
        "epochs": [40, 40, 40, 60, 20, 40, 60, 60],
    },
    "roberta-large": {
        "positions": ["f1", "f3", "f3", "f3", "f11", "f11", "f3", "f3"],
        "dropout": [0.05, 0.05, 0.2, 0.2, 0.05, 0.05, 0.05, 0.05],
        "learning_rate": [6e-4, 6e-4, 3e-4, 1e-4, 9e-4, 6e-4, 6e-4, 8e-4],
        "warmup_ratio": [0, 0.1, 0.06, 0.2, 0.1, 0.06, 0, 0.2],
        "epochs": [20, 20, 30, 30, 20, 20, 30, 30],
    },
}


@pytest.mark.parametrize("model", ROBERTA)
def test_settings_of_the_roberta_runs(model):
    settings = yaml.safe_load((EXAMPLES / "glue" / f"{model}.yaml").read_text())["loreft"]
    assert (settings["all"]["rank"], settings["all"]["batch_size"], settings["all"]["weight_decay"]) == (1, 32, 0.0)
    for setting, values in ROBERTA[model].items():
        assert [settings[task][setting] for task in ORDER] == values


@pytest.mark.parametrize(
    "layers, width, count, percent", [(12, 768, 12 * (2 * 768 + 1), 0.015), (24, 1024, 24 * (2 * 1024 + 1), 0.014)]
)
def test_share_of_roberta_that_loreft_trains(layers, width, count, percent):
    train = script()
    sizes = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "intermediate_size": 4 * width}
    with torch.device("meta"):
        base = t.RobertaForSequenceClassification(
            t.RobertaConfig(**sizes, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
        )
    model = train["prepare_model"](base, "loreft", {"rank": 1, "positions": "f3", "dropout": 0.05})
    counts = train["count_parameters"](model)
    assert counts["trained_parameters"] == count
    assert 100 * counts["trained_share"] == pytest.approx(percent, rel=0.05)
    assert (
        counts["trained_head_parameters"] == width * width + width + 2 * width + 2
    )  # a dense layer, then two classes


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_axolotl_trains_on_the_prompt_that_evaluate_gives(path):
    """Braces and line ends are kept, nothing is added around the prompt, and labels begin at the completion."""
    cfg = validated(path)
    from axolotl.prompt_strategies.user_defined import UserDefinedDatasetConfig, load

    given = {key: value for key, value in dict(cfg.datasets[0]["type"]).items() if value is not None}
    tokens = tokenizer()
    row = {"prompt": "Tell {me}\na story\n", "completion": "about {cats}"}
    made = load(tokens, cfg, UserDefinedDatasetConfig(**given)).tokenize_prompt(row)
    prompt, answer = (tokens(row[key])["input_ids"] for key in ("prompt", "completion"))
    assert made["input_ids"] == [*prompt, *answer, tokens.eos_token_id]
    assert made["labels"] == [*[-100] * len(prompt), *answer, tokens.eos_token_id]


# -- the commands of the README ---------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """The README's lines of shell, as words."""
    blocks = re.findall(r"```bash\n(.*?)```", (EXAMPLES / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_files_of_the_readme_are_there():
    named = {word for words in commands() for word in words if word.startswith("examples/")}
    assert len(named) > 10
    assert [file for file in sorted(named) if not (REPOSITORY / file).exists()] == []
    assert [path for path in YAMLS if f"examples/{name(path)}" not in named] == []


def test_commands_of_the_readme_fit_together():
    """Each command reads files that an earlier one writes: a YAML the prepared file, `evaluate` an adapter."""
    written: set[str] = set()
    read = 0
    for words in commands():
        options = {one: other for one, other in zip(words, words[1:]) if one.startswith("--")}
        if words[:2] == ["axolotl", "train"]:
            keys = yaml.safe_load((REPOSITORY / words[2]).read_text())
            assert keys["datasets"][0]["path"] in written
            written.add(options.get("--output-dir", keys["output_dir"]))
        elif "--output-dir" in options:
            methods = ("loreft", "lora", "head", "full")
            written |= {options["--output-dir"].replace("$method", method) for method in methods}
        elif words[:2] == ["peft-reft", "prepare"]:
            written.add(options["--out"])
        elif words[:2] == ["peft-reft", "evaluate"]:
            adapters = [other for one, other in zip(words, words[1:]) if one == "--adapter"]
            assert len(adapters) == 2 and set(adapters) <= written
            read += 1
    assert read == 8


def test_tasks_of_the_readme_are_known():
    from peft_reft.evaluation import find_tasks

    for words in commands():
        if words[0] == "peft-reft":
            names = words[2 : next(index for index, word in enumerate(words) if word.startswith("--"))]
            assert find_tasks(names)


# -- GLUE's script ----------------------------------------------------------------------------------------------------


def script() -> dict:
    return runpy.run_path(str(EXAMPLES / "glue" / "train.py"))


@pytest.fixture
def encoder(tmp_path) -> Path:
    """A small BERT with random weights, and rows whose class depends on one word."""
    words = ["good", "bad", *(f"w{number}" for number in range(20))]
    torch.manual_seed(0)
    vocab = {word: index for index, word in enumerate(["[PAD]", "[CLS]", "[SEP]", "[UNK]", *words])}
    tokens = tk.Tokenizer(tk.models.WordLevel(vocab, unk_token="[UNK]"))
    tokens.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
    tokens.post_processor = tk.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    words_only = t.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64
    )
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    base = t.BertForSequenceClassification(t.BertConfig(vocab_size=len(words_only), **sizes, pad_token_id=0))
    base.save_pretrained(tmp_path / "base")
    words_only.save_pretrained(tmp_path / "base")
    for split, count in (("train", 64), ("validation", 21)):
        rows = [{"sentence": f"{words[n % 2]} w{n % 20} w{n % 7}", "label": n % 2} for n in range(count)]
        (tmp_path / f"sst2.{split}.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("method", ["loreft", "lora"])
def test_a_glue_run_ends_in_an_adapter_that_evaluate_scores_alike(encoder, monkeypatch, method):
    pytest.importorskip("sklearn", reason="needs the extra `eval`")
    pytest.importorskip("scipy", reason="needs the extra `eval`")
    from peft_reft.evaluation import TASKS, Settings, evaluate, read_adapters, read_examples

    out = encoder / "out"
    options = f"--task sst2 --model {encoder}/base --method {method} --data-dir {encoder} --output-dir {out}"
    settings = f"--settings {EXAMPLES}/glue/smol.yaml --epochs 8 --learning-rate 0.01"
    monkeypatch.setattr("sys.argv", ["train.py", *shlex.split(f"{options} {settings}")])
    script()["main"]()
    results = json.loads((out / "results.json").read_text())
    assert results["examples"] == {"train": 64, "chosen_by": 10, "test": 11}
    assert results["test"]["accuracy"] > 0.9
    assert results["seconds"] > 0 and results["peak_memory_bytes"] > 1e6
    hidden, rank = 32, results["settings"]["rank"]
    each = 2 * rank * hidden + rank if method == "loreft" else 2 * 2 * rank * hidden
    assert results["trained_parameters"] == 2 * each

    rows = read_examples(TASKS["sst2"], "validation", encoder)
    adapters = read_adapters([f"it={out}"])
    report = evaluate(Settings(f"{encoder}/base", with_base=False), [(TASKS["sst2"], rows)], adapters)
    right = 10 * results["chosen_by"]["accuracy"] + 11 * results["test"]["accuracy"]
    assert report["results"][0]["scores"]["accuracy"]["value"] == pytest.approx(right / 21)


def test_a_method_without_settings_names_the_options(monkeypatch, tmp_path):
    large = EXAMPLES / "glue" / "roberta-large.yaml"
    words = f"train.py --task cola --model m --method lora --output-dir {tmp_path} --settings {large} --rank 8"
    monkeypatch.setattr("sys.argv", words.split())
    with pytest.raises(SystemExit, match=r"no settings of this kind for lora on cola.*--alpha .*--learning-rate"):
        script()["main"]()
