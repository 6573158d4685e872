"""`python -m benchmarks parameters`, against formulas written by hand, and docs/results.md against it."""

from __future__ import annotations

import json
import re

import pytest
import torch
from paths import REPOSITORY
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.parameters import count, published, table
from benchmarks.report import markdown_table
from peft_reft import ReftConfig


ROWS = list(published())
PAGE = (REPOSITORY / "docs" / "results.md").read_text()
# Width, layers, inner width, vocabulary, width of keys and values.
LLAMAS = {
    "LLaMA-7B": (4096, 32, 11_008, 32_000, 4096),
    "LLaMA-13B": (5120, 40, 13_824, 32_000, 5120),
    "Llama-2 7B": (4096, 32, 11_008, 32_000, 4096),
    "Llama-3 8B": (4096, 32, 14_336, 128_256, 1024),
}
ROBERTAS = {"RoBERTa-base": (768, 12), "RoBERTa-large": (1024, 24)}


def base_by_hand(model: str) -> int:
    if model in ROBERTAS:
        width, layers = ROBERTAS[model]
        norm = 2 * width
        attention = 4 * (width * width + width) + norm
        feed_forward = 2 * 4 * width * width + 4 * width + width + norm
        return (50_265 + 514 + 1) * width + norm + layers * (attention + feed_forward)
    width, layers, inner, vocabulary, keys = LLAMAS[model]
    attention = 2 * width * width + 2 * width * keys
    return 2 * vocabulary * width + layers * (attention + 3 * width * inner + 2 * width) + width


def adapter_by_hand(model: str, task: str, method: str) -> int:
    width, layers = (LLAMAS.get(model) or ROBERTAS[model])[:2]
    if method == "LoRA":
        _, _, inner, _, keys = LLAMAS[model]
        q, k = width + width, width + keys  # in and out
        return layers * (16 * (q + k) if task == "instructions" else 32 * (q + 2 * k + 2 * (width + inner)))
    rank, groups, edited = {
        ("instructions", "LoReFT"): (4, 2, 4),
        ("instructions", "LoReFT (half)"): (2, 2, 4),
        ("GLUE", "LoReFT"): (1, 1, layers),
    }.get((task, method), (8, 1, layers) if method == "LoReFT" else (4, 2, layers))
    return edited * groups * (2 * rank * width + rank)


@pytest.fixture(scope="module")
def counted() -> list:
    """Each row of the paper, and its counts."""
    return [(row, count(row)) for row in ROWS]


def test_what_is_counted(counted):
    assert len(counted) == 17
    for row, found in counted:
        expected = (base_by_hand(row.model), adapter_by_hand(row.model, row.task, row.method))
        assert (found["base"], found["adapter"]) == expected, row
        base, adapter = expected
        assert found["percent of base"] == pytest.approx(100 * adapter / base)
        assert found["percent of both"] == pytest.approx(100 * adapter / (base + adapter))
        # The paper's number, to its last digit.
        percent = found["percent of both" if row.of_both else "percent of base"]
        assert f"{percent:.{len(row.percent) - 2}f}" == row.percent, row


def test_of_what_the_percentage_is(counted):
    """Where the two denominators give different percentages, only the right one gives the paper's."""
    for row, found in counted:
        if row.method == "LoRA":
            other = found["percent of base" if row.of_both else "percent of both"]
            assert f"{other:.{len(row.percent) - 2}f}" != row.percent, row


def test_the_command_and_the_page(tmp_path):
    """The command writes its counts, and docs/results.md has the table that it prints."""
    done = CliRunner().invoke(app, ["parameters", "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "parameters.json").read_text())["parameters"]
    assert [one["paper"] for one in found] == [row.percent for row in ROWS]
    assert re.search(r"LLaMA-13B.*3,277,120.*0\.025", done.output)
    assert markdown_table(*table(found)) in PAGE


# Width, layers, inner width, width of keys and values.
BASES = {"Llama-3.2-1B": (2048, 16, 8192, 512), "SmolLM2-135M": (576, 30, 1536, 192)}


@pytest.mark.parametrize("base, shared", [("Llama-3.2-1B", False), ("Llama-3.2-1B", True), ("SmolLM2-135M", False)])
def test_how_many_times_fewer_than_lora_at_the_same_rank(base, shared):
    """What README and docs/results.md say, counted on models of these sizes without weights."""
    width, layers, inner, keys = BASES[base]
    sizes = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, intermediate_size=inner, num_attention_heads=width // 64,
        num_key_value_heads=keys // 64, vocab_size=64,
    )  # fmt: skip
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    reft = ReftConfig(r=8, share_weights=shared, task_type="CAUSAL_LM")
    counts = []
    for config in (lora, reft):
        with torch.device("meta"):
            model = get_peft_model(LlamaForCausalLM(sizes), config)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    ratio = f"{counts[0] / counts[1]:.1f}"
    name = {False: f"| {base}, the smol" if "Smol" in base else f"| {base}, README", True: f"| {base}, the same"}[
        shared
    ]
    (line,) = (line for line in PAGE.splitlines() if line.startswith(name))
    assert line.endswith(f"| {ratio} |")
    if base == "Llama-3.2-1B":
        readme = (REPOSITORY / "README.md").read_text()
        said = f"{ratio} with `share_weights: true`" if shared else f"{counts[1]:,} parameters where LoRA trained"
        assert said in readme and f"trained {counts[0]:,}: 5.4 times fewer" in readme
