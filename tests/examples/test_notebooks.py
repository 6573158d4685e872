"""The notebooks in examples/notebooks: each runs from top to bottom on a CPU, and shows what its text says."""

from __future__ import annotations

import re

import nbformat
import pytest
from paths import REPOSITORY


FOLDER = REPOSITORY / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def outputs(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def ran(smollm2, tmp_path_factory):
    """Runs a notebook, and returns what it printed. A cell that fails fails the test, with its traceback."""
    pytest.importorskip("nbclient", reason="needs the extra `dev`")
    pytest.importorskip("trl", reason="needs the extra `dev`")
    sys_path = str(REPOSITORY / "scripts")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(sys_path)
        import run_notebooks

    def run(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        return outputs(run_notebooks.run(FOLDER / f"{name}.ipynb", smollm2, str(folder)))

    return run


@pytest.mark.slow
def test_quickstart(ran):
    text = ran("quickstart")
    before, after = (re.findall(rf"{word}: +(.*)", text) for word in ("before", "after"))
    assert len(before) == len(after) == 3
    assert all(answer.startswith("Captain's log:") for answer in after)
    assert not any("Captain" in answer for answer in before)
    # The positions, as they were before training: seven first tokens, seven last.
    shown = text[text.index("positions='f7+l7'") : text.index("before:")]
    assert shown.count("F[") - shown.count("F[ ]") == shown.count("L[") - shown.count("L[ ]") == 7
    assert losses(text)[-1] < losses(text)[0] / 2


@pytest.mark.slow
def test_what_it_learnt(ran):
    text = ran("what_it_learnt")
    logged = [
        float(size)
        for size in re.findall(r"^step +\d+: edits change a state by (\S+) of its size", text, re.MULTILINE)
    ]
    assert len(logged) == 4 and 0 < logged[0] < logged[-1]
    loss, base = map(float, re.search(r"^loss (\S+) with all edits, (\S+) without any", text, re.MULTILINE).groups())
    assert loss < base / 2
    without = {
        name: float(one) for name, one in re.findall(r"^(model\.layers\.\d+) .* (\d\.\d{4})$", text, re.MULTILINE)
    }
    assert len(without) == 6 and all(one > loss for one in without.values())
    assert f"the layer that matters most: {max(without, key=without.get)}\n" in text
    answers = dict(re.findall(r"^ *([\d.]+): (.*)", text[text.rindex("first token:") :], re.MULTILINE))
    assert list(answers) == ["0", "0.25", "0.5", "0.75", "1", "2"]
    assert answers["1"].startswith("Captain's log:") and "Captain" not in answers["0"]


@pytest.mark.slow
def test_subspaces(ran):
    text = ran("subspaces")
    found = re.findall(r"^  (greeting\+farewell|greeting|farewell) +(.*)", text, re.MULTILINE)
    assert len(found) == 6
    for choice, answer in found:
        assert answer.startswith("Ahoy!") == ("greeting" in choice), (choice, answer)
        assert answer.endswith("Over and out.") == ("farewell" in choice), (choice, answer)
    assert "greeting: a gradient\nfarewell: none\n" in text


@pytest.mark.slow
def test_lora_and_reft(ran):
    text = ran("lora_and_reft")
    answers = dict(re.findall(r"^(both|neither|LoRA): +(.*)", text, re.MULTILINE))
    assert answers["both"].startswith("Captain's log:") and not answers["neither"].startswith("Captain's log:")
    assert not answers["LoRA"].startswith("Captain's log:")
    assert text.endswith(f"\n{answers['both']}\n")  # ReFT on the base with LoRA merged
    assert "both/lora/adapter_model.safetensors" in text and "both/reft/adapter_model.safetensors" in text


@pytest.mark.slow
def test_from_pyreft(ran):
    text = ran("from_pyreft")
    assert "pyreft does not save its positions" in text
    assert "loreft f3+l3 rank 4 layers [8, 16, 24]" in text
    assert "\nequal\n" in text
    assert losses(text)[-1] < losses(text)[0] / 2


def losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"^step +\d+: loss ([\d.]+)", text, re.MULTILINE)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_kept_of_a_run_is_small_and_plain(name):
    path = FOLDER / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 30_000
    assert outputs(notebook), "run scripts/run_notebooks.py --write"
    for cell in notebook.cells:
        assert cell.metadata == {} and cell.get("execution_count") is None
        assert all(output.output_type == "stream" and output.name == "stdout" for output in cell.get("outputs", []))
    # The first cell of code installs what is missing, and nothing where it is there.
    install = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert 'find_spec("peft_reft") is None:\n    %pip install -q peft-reft' in install.source
    for private in ("/home/", "/tmp/", "/root/", "/work/"):
        assert private not in path.read_text()


def test_every_notebook_has_a_test():
    tests = globals()
    assert NAMES and all(f"test_{name}" in tests for name in NAMES)
