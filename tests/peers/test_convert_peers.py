"""The real pyreft, with checkpoints that were converted here. PYREFT_PYTHON names the interpreter of an environment
that has pyreft==0.1.0, pyvene==0.1.8 and transformers==4.45.1; without it these tests are skipped, and say so."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from conversions import BASES, DATA, PYREFT, base_of, expected, from_pyreft, logits_of, tokens_of
from paths import HELPERS
from peft import get_peft_model
from safetensors.torch import load_file

from peft_reft import ReftConfig
from peft_reft.conversion import export_pyreft
from peft_reft.conversion.pyvene_places import ARCHITECTURES, path_of
from peft_reft.tuner.positions.prompts import Prompts
from peft_reft.tuner.positions.spec import PositionSpec, first_and_last


PYTHON = os.environ.get("PYREFT_PYTHON")
pytestmark = pytest.mark.skipif(
    PYTHON is None, reason="needs pyreft: PYREFT_PYTHON=<the python of an environment with pyreft 0.1.0>"
)
TOLERANCE = 1e-6
# The edits that pyreft's own `load` can make. For noreft and nodireft it leaves out a required argument.
LOADABLE = [f"{edit}.{kind}" for edit in ("loreft", "direft", "consreft", "lobireft") for kind in ("tied", "untied")]


def pyreft(jobs: list[dict], tmp_path: Path) -> dict[str, torch.Tensor]:
    """pyreft's results, by the index of the job."""
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), str(HELPERS / "pyreft_worker.py"), "jobs.json", "results.safetensors"],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(tmp_path / "results.safetensors")


def test_pyreft_loads_what_it_wrote_after_there_and_back(tmp_path):
    """Every checkpoint of pyreft, converted in and out, gives pyreft its own logits and tokens again."""
    jobs = []
    for name, case in PYREFT.items():
        from_pyreft(case, tmp_path / "adapters" / name)
        export_pyreft(tmp_path / "adapters" / name, tmp_path / "out" / name)
        exported = {**case, "add_bias": False}  # the bias of the projection was merged into b
        if name.startswith("paths"):  # a path comes out as a component, where there is one
            exported["places"] = [case["places"][0], {"layer": 2, "component": "block_output"}]
        jobs.append({"case": exported, "folder": str(tmp_path / "out" / name), "by": "state"})
    results, known, compared = pyreft(jobs, tmp_path), expected("pyreft"), 0
    for index, name in enumerate(PYREFT):
        logits = known[f"{name}.logits"]
        torch.testing.assert_close(results[f"{index}.logits"], logits, rtol=0, atol=TOLERANCE)
        for row in range(2):
            if f"{name}.tokens{row}" in known:
                assert results[f"{index}.tokens{row}"].tolist() == known[f"{name}.tokens{row}"].tolist()
                compared += 1
    assert compared > 50


@pytest.mark.parametrize("act_fn", [None, "gelu"])
def test_adapters_trained_here_give_the_same_in_pyreft(act_fn, tmp_path):
    jobs, ours = [], []
    edits = ("loreft", "noreft", "direft", "nodireft") + (() if act_fn else ("consreft", "lobireft"))
    for edit in edits:
        for tied in (True, False):
            torch.manual_seed(len(jobs))
            has_bias = edit not in ("noreft", "direft") or tied
            config = ReftConfig(
                r=3,
                intervention=edit,
                positions="f3+l3",
                share_weights=tied,
                act_fn=act_fn,
                add_bias=has_bias,
                init_weights="pyreft",
                layers_to_transform=[0, 2],
                task_type="CAUSAL_LM",
            )
            model = get_peft_model(base_of("llama"), config).eval()
            folder = tmp_path / f"{edit}.{tied}"
            model.save_pretrained(folder)
            export_pyreft(folder, tmp_path / "out" / folder.name)
            ours.append((logits_of(model, "llama"), [tokens_of(model, "llama", row) for row in range(2)]))
            layers = [0, 2] if tied else [0, 2, 0, 2]
            case = {
                "name": "x",
                "base": "llama",
                "intervention": edit.title(),
                "share_weights": tied,
                "positions": "f3+l3",
                "act_fn": act_fn,
                "add_bias": False,
                "head": [],
                "places": [{"layer": layer, "component": "block_output"} for layer in layers],
            }
            jobs.append({"case": case, "folder": str(tmp_path / "out" / folder.name), "by": "state"})
    results = pyreft(jobs, tmp_path)
    for index, (logits, tokens) in enumerate(ours):
        torch.testing.assert_close(results[f"{index}.logits"].double(), logits, rtol=0, atol=TOLERANCE)
        assert [results[f"{index}.tokens{row}"].tolist() for row in range(2)] == tokens
        assert results[f"{index}.moved"].item() > 0.1


def test_pyrefts_own_load_takes_both_alike(tmp_path):
    """`ReftModel.load` on a base in bfloat16, which is how it makes W and b: of the file of pyreft's and of the one
    from here, the same."""
    jobs = []
    for name in LOADABLE:
        from_pyreft(PYREFT[name], tmp_path / "adapters" / name)
        export_pyreft(tmp_path / "adapters" / name, tmp_path / "out" / name)
        for folder in (DATA / "pyreft" / name, tmp_path / "out" / name):
            jobs.append({"case": PYREFT[name], "folder": str(folder), "by": "load"})
    results = pyreft(jobs, tmp_path)
    for index, name in enumerate(LOADABLE):
        assert torch.equal(results[f"{2 * index}.logits"], results[f"{2 * index + 1}.logits"]), name


def test_positions_are_those_of_pyrefts_lists(tmp_path):
    """The same tokens, but on prompts of fewer than 2 · max(first, last) where there are not as many first as last
    ones."""
    asked = [
        (positions, tied, length)
        for positions in ("f7+l7", "f3+l3", "f1+l1", "f2+l5", "f5+l2", "f3", "l4", "l1")
        for tied in (True, False)
        for length in range(1, 25)
    ]
    pyreft([{"locations": asked}], tmp_path)
    differing = 0
    for (positions, tied, length), lists in zip(asked, json.loads((tmp_path / "locations.json").read_text())):
        spec = PositionSpec.parse(positions)
        whole = torch.ones(1, length, dtype=torch.bool)
        start = torch.arange(length)[None] == 0
        first, last = first_and_last(Prompts(whole, start, None, 1), spec)
        ours = [(first | last).nonzero()[:, 1].tolist()] * 2
        if spec.groups(tied) == 2:
            ours = [first.nonzero()[:, 1].tolist(), last.nonzero()[:, 1].tolist()]
        theirs = [sorted({place for place in places if place >= 0}) for places in lists]
        if spec.first != spec.last and length < 2 * max(spec.first, spec.last):
            differing += ours != theirs
        else:
            assert ours == theirs, (positions, tied, length)
    assert differing > 0


def test_the_components_are_pyvenes(tmp_path):
    pyreft([{"tables": True}], tmp_path)
    tables = json.loads((tmp_path / "tables.json").read_text())
    for name, (blocks, parts) in ARCHITECTURES.items():
        for component, part in parts.items():
            assert tables[name][component] == path_of(f"{blocks}.0.{part}".rstrip(".")).replace("[0]", "[%s]")
    assert set(BASES) == {"llama", "llama-classifier", "gpt2", "roberta", "roberta-flex"}
