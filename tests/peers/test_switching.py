"""docs/switching.md: its code blocks are run on tiny models, and its lists are complete.

The word after a code block's language says whose code it is: `python` alone is ours; `python pyreft` and `python
adapters` run in those libraries' own environments; of `diff python` and `diff yaml` both sides are run, or read. The
blocks of a section share their variables. Variables that the page does not define are made anew for each block.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from models import VOCAB, build, chat_model, tokenizer
from paths import HELPERS, REPOSITORY
from peft import LoraConfig, get_peft_model
from switching_worker import ANSWERS, PROMPTS
from transformers import TrainingArguments

from peft_reft import ReftConfig, ReftLayer, explain_positions


PAGE = (REPOSITORY / "docs" / "switching.md").read_text()
PEERS = {"pyreft": os.environ.get("PYREFT_PYTHON"), "adapters": os.environ.get("ADAPTERS_PYTHON")}
WIDTH, LAYERS = 32, 3  # of the tiny models


def weights(rank: int, layers: int, groups: int = 1) -> int:
    """The parameters of LoReFT: R and W, [r, D] each, and b, [r]."""
    return layers * groups * (2 * rank * WIDTH + rank)


# The parameters of each adapter on the page: l1 has one set of weights, f3+l2 has two.
FROM_PYREFT = {"model": weights(4, layers=2), "classifier": weights(1, layers=LAYERS)}
FROM_ADAPTERS = {"model": weights(4, layers=2, groups=2)}


def section(title: str) -> str:
    """The text of a section, its subsections included."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def blocks(title: str, kind: str) -> list[str]:
    """The code blocks of a kind in a section, in their order."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)


def side(diff: str, sign: str) -> str:
    """One side of a diff: the lines that both have, and those with this sign."""
    lines = diff.splitlines()
    assert all(line[:2] in ("+ ", "- ", "  ") for line in lines), diff
    return "".join(line[2:] + "\n" for line in lines if line[0] in (sign, " "))


def given() -> dict[str, Any]:
    """The variables that the page's code blocks use without defining them."""
    return {
        "base": chat_model(),
        "classifier": build("roberta"),
        "tokenizer": tokenizer(),
        "args": arguments(TrainingArguments),
        "prompts": PROMPTS,
        "answers": ANSWERS,
    }


def arguments(cls: type) -> Any:
    options = {
        "max_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return cls(output_dir="out", learning_rate=0.01, **options)


def run(source: str, known: dict[str, Any]) -> None:
    """Run a block. Its variables stay in `known`."""
    known |= given()
    exec(compile(source, "docs/switching.md", "exec"), known)


def edits(model: torch.nn.Module) -> int:
    """The trained parameters of a model's edits, a head left out."""
    return sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".reft_" in name)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CI", "1")


def test_every_block_is_of_a_kind_that_is_run():
    kinds = {"python", "python pyreft", "python adapters", "diff python", "diff yaml", "yaml"}
    assert {*re.findall(r"^```(.+)$", PAGE, re.MULTILINE)} == kinds


def test_from_pyreft():
    training, shorter, classifier, generating, loading, subspaces = blocks("From pyreft", "python")
    known: dict[str, Any] = {}
    run(training, known)
    trained = known["model"].eval()
    assert edits(trained) == FROM_PYREFT["model"]
    batch = tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        learned, plain = trained(**batch).logits, chat_model()(**batch).logits
    assert (learned - plain).abs().max() > 1e-3

    run(shorter, known)
    places = explain_positions(
        ReftConfig(positions="l2"), tokenizer(), {**batch, "prompt_lengths": known["lengths"]}, quiet=True
    )
    for one in places:  # as in pyreft's datasets, this is not the last token
        assert one.last == [len(one.ids) - 3, len(one.ids) - 2]
    assert known["output"].shape[1] > batch["input_ids"].shape[1]

    run(classifier, known)
    assert edits(known["classifier"]) == FROM_PYREFT["classifier"]
    heads = [name for name, p in known["classifier"].named_parameters() if p.requires_grad and ".reft_" not in name]
    assert heads and all("classifier" in name for name in heads)

    run(generating, known)
    for row, prompt in enumerate(PROMPTS):  # padded on the left, each prompt is continued as it is alone
        alone = trained.generate(**tokenizer()([prompt], return_tensors="pt"), max_new_tokens=4)
        assert known["steered"][row, -4:].tolist() == alone[0, -4:].tolist()

    run(loading, known)
    with torch.no_grad():
        torch.testing.assert_close(known["model"].eval()(**batch).logits, learned)

    run(subspaces, known)
    assert known["output"].shape[0] == 2


def test_from_adapters():
    (training,) = blocks("From the adapters library", "python")
    known: dict[str, Any] = {}
    run(blocks("From pyreft", "python")[0], known)  # imports, and the dataset
    run(training, known)
    assert edits(known["model"]) == FROM_ADAPTERS["model"]
    assert Path("adapter/reft/adapter_config.json").exists()


@pytest.mark.parametrize("peer", PEERS)
def test_the_peers_side(peer, tmp_path):
    """The other library's blocks run, train as many parameters as ours and behave as the page says, and the page lists
    all its names."""
    title, expected = {
        "pyreft": ("From pyreft", FROM_PYREFT),
        "adapters": ("From the adapters library", FROM_ADAPTERS),
    }[peer]
    sources = blocks(title, f"python {peer}")
    assert sources
    if PEERS[peer] is None:
        pytest.skip(f"needs {peer}: {peer.upper()}_PYTHON=<the python of an environment with {peer}>")
    (tmp_path / "blocks.json").write_text(json.dumps(sources))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [PEERS[peer], str(HELPERS / "switching_worker.py"), peer, "blocks.json", "results.json"],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(Path("results.json").read_text())
    assert {name: results[name] for name in expected} == expected
    if peer == "pyreft":
        assert (results["steered"], results["last place"]) == (4, -2)
        assert results["twice"] == pytest.approx(2, abs=1e-3)
    else:
        assert "out of bounds" in results["suffix, cached"]
        assert results["prefix, cached"] != results["prefix"]
    missing = [name for name in results["names"] if name not in section(title)]
    assert not missing


def diffs(title: str) -> list[str]:
    found = blocks(title, "diff python")
    assert found, title
    return found


@pytest.mark.parametrize("sign", "-+")
def test_from_lora_in_peft(sign):
    (diff,) = diffs("From LoRA in PEFT")
    known: dict[str, Any] = {}
    run(side(diff, sign), known)
    assert any(isinstance(module, ReftLayer) for module in known["model"].modules()) == (sign == "+")
    assert known["model"].get_nb_trainable_parameters()[0] > 0


def test_every_field_of_lora_is_spoken_of():
    text = section("From LoRA in PEFT")
    assert not [field.name for field in dataclasses.fields(LoraConfig) if f"`{field.name}`" not in text]


def test_fields_that_are_said_to_be_the_same():
    """A row with "the same" names fields of both configs, a row with "not there" fields of LoRA only."""
    ours, theirs = ({field.name for field in dataclasses.fields(config)} for config in (ReftConfig, LoraConfig))
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section("From LoRA in PEFT"), re.MULTILINE)
    checked = 0
    for left, right in rows:
        named = {name for name in re.findall(r"`(\w+)`", left) if name in theirs}
        if right.startswith("the same"):
            assert named <= ours, left
            checked += 1
        elif right.startswith("not there"):
            assert not named & ours, left
            checked += 1
    assert checked >= 7


@pytest.mark.parametrize("sign", "-+")
@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_from_lora_in_trl(trainer, sign):
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets")
    diff = next(diff for diff in diffs("From LoRA in TRL") if f"{trainer}Trainer" in diff)
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in zip(PROMPTS, ANSWERS)] * 2
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " No."} for row in rows]
    known: dict[str, Any] = {
        "sft_args": arguments(trl.SFTConfig),
        "dpo_args": arguments(trl.DPOConfig),
        "completions": datasets.Dataset.from_list(rows),
        "preferences": datasets.Dataset.from_list(pairs),
    }
    run(side(diff, sign), known)
    assert known["trainer"].state.global_step == 2
    model = known["trainer"].model
    assert (edits(model) == weights(8, LAYERS, groups=2)) == (sign == "+")
    if sign == "+":
        bias = [p for name, p in model.named_parameters() if ".reft_b." in name]
        assert bias and all(p.abs().max() > 0 for p in bias)  # they start at 0


def test_from_lora_in_axolotl():
    """Both sides are YAML and differ only in what the diff is about. The plugin makes of ours what the page says."""
    (diff,) = blocks("From LoRA in axolotl", "diff yaml")
    lora, reft = (yaml.safe_load(side(diff, sign)) for sign in "-+")
    changed = {key for key in lora | reft if lora.get(key) != reft.get(key)}
    assert changed == {"adapter", "plugins", "learning_rate"} and lora["adapter"] == "lora"
    (block,) = blocks("From LoRA in axolotl", "yaml")
    pytest.importorskip("axolotl", reason="needs the extra `axolotl`")
    from peft_reft.integrations.axolotl.args import ReftBlock
    from peft_reft.integrations.axolotl.keys import LOADING_KEYS, SHARED_KEYS, meaningless_keys, reft_config

    config = reft_config(SimpleNamespace(**reft))
    assert (config.intervention, config.r, config.dropout, config.positions) == ("loreft", 8, 0.05, "f7+l7")
    assert meaningless_keys(reft) == ["lora_alpha", "lora_target_linear"]
    settings = yaml.safe_load(block)
    config = reft_config(SimpleNamespace(**settings | {"reft": ReftBlock(**settings["reft"])}))
    assert config.share_weights and config.response_template == "<|im_start|>assistant\n"
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section("From LoRA in axolotl"), re.MULTILINE)
    same = {name for left, right in rows if right == "the same" for name in re.findall(r"`((?:lora|peft)_\w+)`", left)}
    assert same == {*SHARED_KEYS, *LOADING_KEYS}


def test_links():
    folder = REPOSITORY / "docs"
    for target in re.findall(r"\]\(([\w-]+\.md)", PAGE):
        assert (folder / target).exists(), target
    titles = {
        re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", PAGE, re.M)
    }
    assert {*re.findall(r"\]\(#([\w-]+)\)", PAGE)} <= titles


def test_a_start_that_is_the_base_models():
    """The page's statements on the start of training, ours and pyreft's."""
    ids = torch.randint(3, VOCAB, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = chat_model()(input_ids=ids).logits
        for init, same in ((True, True), ("pyreft", False)):
            model = get_peft_model(chat_model(), ReftConfig(positions="f1+l1", init_weights=init)).eval()
            assert torch.equal(model(input_ids=ids).logits, plain) == same
