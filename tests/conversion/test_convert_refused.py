"""What conversion refuses: files that could run code, places and settings that the files leave open, damaged
weights."""

from __future__ import annotations

import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from conversions import ADAPTERS, BASES, DATA, PYREFT, from_adapters, from_pyreft
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from peft_reft import ReftConfig
from peft_reft.conversion import convert_adapters, convert_pyreft, export_pyreft
from peft_reft.conversion.pyvene_places import Place


BASE = str(BASES["llama"])


class Malice:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


KEY = "intkey_layer_1_comp_block_output_unit_pos_nunit_1#0.bin"


def copy_of(name: str, tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    shutil.copytree(DATA / "pyreft" / name, folder)
    return folder


@pytest.mark.parametrize("file", [KEY, "pytorch_model.bin"])
def test_pickles_that_could_run_code_are_refused_unrun(file, tmp_path):
    folder, trap = copy_of("consreft.tied", tmp_path), tmp_path / "trap"
    torch.save(OrderedDict(learned_source=Malice(trap)), folder / file)
    with pytest.raises(ValueError, match=r"weights_only=True.*such files are refused") as error:
        convert_pyreft(folder, tmp_path / "out", BASE, "f3+l3")
    assert str(folder / file) in str(error.value)
    assert not trap.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(2)], "holds a list"),
        ({"weight": 1.5}, "'weight' is a float"),
        ({"weight": torch.eye(2).to_sparse()}, "only plain tensors"),
    ],
)
def test_other_contents_are_refused(content, says, tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    torch.save(content, folder / KEY)
    with pytest.raises(ValueError, match=says):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")


def test_damaged_files_are_named(tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    (folder / KEY).write_bytes((folder / KEY).read_bytes()[:900])
    with pytest.raises(ValueError, match=r"nunit_1#0.bin \(900 bytes\) can't be read"):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")
    (folder / KEY).unlink()
    with pytest.raises(ValueError, match=r"no intkey_\*.bin"):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("loreft.tied", {"positions": None}, "pyreft does not save its positions.*--positions"),
        ("loreft.tied", {"positions": "f3-l3"}, "does not parse"),
        ("loreft.tied", {"base_model": None}, "--base-model"),
        ("loreft.tied", {"base_model": str(BASES["gpt2"])}, "a GPT2LMHeadModel, has no module 'transformer.h.2'"),
        ("loreft.untied", {"positions": "f3"}, "positions='f3' has one set of weights for each module, and .* has 2"),
        ("loreft.untied", {"positions": "all"}, "positions='all' has one set of weights"),
        ("loreft.tied", {"intervention": "noreft"}, "intervention='noreft' is given, and .*config.json says 'loreft'"),
        ("loreft.tied", {"intervention": "reft"}, "intervention='reft' is not allowed"),
        ("loreft.tied", {"task_type": "CLASSES"}, "task_type='CLASSES' is not allowed"),
        ("loreft.tied", {"dropout": 2}, "dropout=2 is not allowed"),
        ("noreft.trainer", {"intervention": None}, "those of nodireft or noreft.*--intervention"),
        ("lobireft.trainer", {"intervention": None}, "those of consreft or lobireft"),
        ("loreft.trainer", {"intervention": "direft"}, "intervention='direft' has"),
        ("noreft.bias", {"act_fn": "gelu"}, "bias of its projection.*can't be converted"),
        ("head", {"task_type": None}, "'score.weight' is no weight of a LlamaForCausalLM.*task_type='SEQ_CLS'"),
        ("head.roberta", {"task_type": "TOKEN_CLS"}, "'classifier.dense.weight' is no weight of a RobertaForToken"),
    ],
)
def test_what_is_missing_or_contradicts_a_file_is_an_error(name, changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        from_pyreft(PYREFT[name], tmp_path / "out", **changes)
    assert not (tmp_path / "out").exists()


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        if name in config:
            config[name] = value
        else:
            config["representations"][0][int(name.removeprefix("field"))] = value
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("component", "says"),
    [
        (
            "block_input",
            "component='block_input' of layer 1 is the whole output of no module.*block_output of layer n",
        ),
        ("head_query_output", "component='head_query_output'"),
        ("mlp_activation", "component='mlp_activation'"),
        ("model.layers[1].input", "is the input of a module"),
        ("model.layers[7].output", "has no module 'model.layers.7'"),
    ],
)
@pytest.mark.parametrize("with_config", [True, False])
def test_places_that_are_no_modules_output(component, says, with_config, tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    place = Place(component, 1)
    (folder / KEY).rename(folder / f"intkey_{place.key}.bin")
    edit_config(folder, field1=component, sorted_keys=[place.key])
    if not with_config:
        (folder / "config.json").unlink()
        if "." in component:
            says = says.replace("has no module 'model.layers.7'", "the name fits no module")
    with pytest.raises(ValueError, match=says):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mode": "serial"}, "mode='serial'"),
        ({"intervention_types": ["<class '__main__.MyIntervention'>"]}, "the intervention <class '__main__.My"),
        ({"field9": "link"}, "intervention_link_key='link'"),
        ({"field7": [[0, 2]]}, r"subspace_partition=\[\[0, 2\]\]"),
        ({"field2": "h"}, "only one of both has"),
        ({"representations": []}, "only one of both has"),
        ({"sorted_keys": ["other"]}, "sorted_keys"),
    ],
)
def test_configs_that_mean_something_else(changes, says, tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=says):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")


def test_heads_are_single_units_of_no_module(tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    place = Place("block_output", 1, "h")
    (folder / KEY).rename(folder / f"intkey_{place.key}.bin")
    edit_config(folder, field2="h", sorted_keys=[place.key])
    with pytest.raises(ValueError, match="unit='h'"):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")


def test_interventions_in_another_order_are_refused(tmp_path):
    """pyreft gives the first half of its interventions the first tokens: a layer must not have both in that half."""
    folder = copy_of("loreft.untied", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, sorted_keys=sorted(config["sorted_keys"]))
    with pytest.raises(ValueError, match="the first half"):
        convert_pyreft(folder, tmp_path / "out", BASE, "f3+l3")


def test_an_R_that_weight_decay_has_made_0(tmp_path):
    """torch reads signs off the diagonal of what is decayed, as whole numbers: pyreft's R is 0 after one decayed
    step."""
    folder = copy_of("consreft.tied", tmp_path)
    state = torch.load(folder / KEY, weights_only=True)
    state["rotate_layer.parametrizations.weight.original"] *= 1 - 1e-4
    torch.save(state, folder / KEY)
    with pytest.raises(ValueError, match="not orthonormal.*") as error:
        convert_pyreft(folder, tmp_path / "out", BASE, "f3+l3")
    assert "reft_R" in str(error.value)


def test_weights_that_are_not_finite(tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    state = torch.load(folder / KEY, weights_only=True)
    state["bias"][0] = float("nan")
    torch.save(state, folder / KEY)
    with pytest.raises(ValueError, match="1 NaN"):
        convert_pyreft(folder, tmp_path / "out", BASE, "l2")


def test_heads_that_peft_can_not_save(tmp_path):
    folder = copy_of("loreft.last", tmp_path)
    torch.save({"model.layers.0.mlp.up_proj.weight": torch.zeros(64, 32)}, folder / "pytorch_model.bin")
    assert convert_pyreft(folder, tmp_path / "part", BASE, "l2").config.modules_to_save == [
        "model.layers.0.mlp.up_proj"
    ]
    config = LlamaConfig.from_pretrained(BASE, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    torch.save({"model.embed_tokens.weight": torch.zeros(97, 32)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="shared with another module.*--no-head"):
        convert_pyreft(folder, tmp_path / "out", str(tmp_path / "tied"), "l2")
    roberta = copy_of("head.roberta", tmp_path / "more")
    state = torch.load(roberta / "pytorch_model.bin", weights_only=True)
    del state["classifier.dense.bias"]
    torch.save(state, roberta / "pytorch_model.bin")
    with pytest.raises(ValueError, match="'classifier.dense.weight' was trained, and other weights"):
        convert_pyreft(roberta, tmp_path / "out", str(BASES["roberta"]), "f1")


def test_what_adapters_files_do_not_tell(tmp_path):
    with pytest.raises(ValueError, match=r"'noreft' if it is \(NoReftConfig\), or 'nodireft' if not \(DiReftConfig\)"):
        from_adapters(ADAPTERS["direft.untied"], tmp_path / "out", intervention=None)
    with pytest.raises(ValueError, match="head of the adapters library.*--no-head"):
        from_adapters(ADAPTERS["head.flex"], tmp_path / "out")
    from_adapters(ADAPTERS["head.flex"], tmp_path / "edits", with_head=False)
    folder = tmp_path / "source"
    shutil.copytree(DATA / "adapters" / "noreft.untied", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, says in (
        ({"architecture": "lora"}, "architecture='lora'"),
        ({"suffix_positions": 0, "prefix_positions": 0}, "edit nothing"),
        ({"gate": True}, "'gate': True"),
        ({"r": None}, "r=None should be there, as int"),
        ({"layers": [0, 1]}, r"layers=\[0, 1\]"),
    ):
        changed = {**config, "config": {**config["config"], **change}}
        (folder / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=says):
            convert_adapters(folder, tmp_path / "out", BASE, intervention="noreft")
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    for convert in (
        lambda: from_pyreft(PYREFT["loreft.tied"], tmp_path / "out"),
        lambda: from_adapters(ADAPTERS["loreft.last"], tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match="exists already"):
            convert()


def test_adapters_with_more_than_pyreft_has_do_not_go_out(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    config = ReftConfig(r=4, subspaces={"a": 2, "b": 2}, task_type="CAUSAL_LM", layers_to_transform=[0])
    get_peft_model(base, config).save_pretrained(tmp_path / "subspaces")
    with pytest.raises(ValueError, match="subspaces={'a': 2, 'b': 2}"):
        export_pyreft(tmp_path / "subspaces", tmp_path / "out")
    get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), LoraConfig()).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="an adapter of kind LORA"):
        export_pyreft(tmp_path / "lora", tmp_path / "out", BASE)
    assert not (tmp_path / "out").exists()
