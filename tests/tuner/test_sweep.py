"""Every causal, sequence-classification and vision-language architecture of transformers, on tiny random models.

A part is tried each day, so that a run in CI stays short; `--long` tries all. helpers/sweep.py says what is checked,
and docs/architectures.md what the outcomes are.
"""

from __future__ import annotations

import datetime

import pytest
import transformers
from sweep import documented, outcome
from zoo import architectures


PARTS = 4
TODAY = datetime.date.today().toordinal() % PARTS
ALL = architectures()
# The outcomes in the document are those of this release; older ones lack some of the architectures.
pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith("5.24."), reason="the document is about transformers 5.24"
)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--long")
        chosen = [entry for index, entry in enumerate(ALL) if whole or index % PARTS == TODAY]
        part = "all" if whole else f"part {TODAY} of {PARTS}"
        metafunc.parametrize("architecture", chosen, ids=["-".join((part, *entry)) for entry in chosen])


def test_architecture(architecture, tmp_path):
    assert outcome(*architecture, tmp_path) == documented().get(architecture, "works")


def test_the_document_has_no_row_for_what_is_gone():
    assert set(documented()) <= set(ALL)


def test_enough_causal_architectures_work():
    """At least 185 of every 187 that were tried work, and none is documented as wrong."""
    found = {entry: documented().get(entry, "works") for entry in ALL}
    assert not [entry for entry, text in found.items() if not text.startswith(("works", "not tried", "only with"))]
    causal = [text for (kind, _, _), text in found.items() if kind == "causal" and not text.startswith("not tried")]
    assert sum(text.startswith("works") for text in causal) / len(causal) >= 185 / 187
