"""`python -m benchmarks parameters`, against formulas written by hand, and docs/results.md against it."""

from __future__ import annotations

import json
import re

import pytest
from paths import REPOSITORY
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.parameters import count, published, table
from benchmarks.report import markdown_table


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
