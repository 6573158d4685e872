"""Checkpoints of pyreft and of the adapters library, in and out.

tests/data/conversion holds checkpoints that the real libraries made, with the logits and tokens that they computed;
make_pyreft.py and make_adapters.py there say how. test_convert_refused.py has what is refused, and
test_convert_peers.py runs pyreft itself.
"""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conversions import (
    ADAPTERS,
    BASES,
    DATA,
    PYREFT,
    adapted,
    expected,
    from_adapters,
    from_pyreft,
    logits_of,
    tokens_of,
)
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from typer.testing import CliRunner

from peft_reft.conversion import convert_pyreft, export_pyreft
from peft_reft.conversion.householder import basis_of, parameters_of
from peft_reft.conversion.pyvene_places import Place, place_of
from peft_reft_cli import app


TOLERANCE = 1e-6
CONVERTIBLE = [name for name in ADAPTERS if name != "head.flex"]
BASE = str(BASES["llama"])


# -- into PEFT --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PYREFT)
def test_pyrefts_own_logits_and_tokens(name, tmp_path):
    case, known = PYREFT[name], expected("pyreft")
    from_pyreft(case, tmp_path / "adapter")
    model = adapted(case["base"], tmp_path / "adapter")
    logits = known[f"{name}.logits"].double()  # transformers 4.45 gives Llama's in float32
    torch.testing.assert_close(logits_of(model, case["base"]), logits, rtol=0, atol=TOLERANCE)
    in_float32 = logits_of(model, case["base"], torch.float32).double()
    torch.testing.assert_close(in_float32, logits, rtol=0, atol=1e-5)
    for row in range(2):
        if f"{name}.tokens{row}" in known:
            assert tokens_of(model, case["base"], row) == known[f"{name}.tokens{row}"].tolist()


def test_the_pyreft_checkpoints_are_of_every_kind():
    kinds = {(case["intervention"], case["share_weights"], case["saved_by"]) for case in PYREFT.values()}
    edits = ("Loreft", "Noreft", "Direft", "Nodireft", "Consreft", "Lobireft")
    assert {(edit, tied, "save") for edit in edits for tied in (True, False)} <= kinds
    assert {edit for edit, _, saved_by in kinds if saved_by == "save_intervention"} == set(edits)
    assert {case["base"] for case in PYREFT.values()} == {"llama", "llama-classifier", "gpt2", "roberta"}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_adapters_librarys_own_logits_and_tokens(name, tmp_path):
    case, known = ADAPTERS[name], expected("adapters")
    from_adapters(case, tmp_path / "adapter")
    model = adapted(case["base"], tmp_path / "adapter")
    logits = known[f"{name}.logits"]
    # pyreft computes R in float64; the converted file has it in float32.
    atol = TOLERANCE * logits.abs().max().item()
    torch.testing.assert_close(logits_of(model, case["base"]), logits, rtol=0, atol=atol)
    for row in range(2):
        if f"{name}.tokens{row}" in known:
            assert tokens_of(model, case["base"], row) == known[f"{name}.tokens{row}"].tolist()


def test_an_ordinary_adapter_directory(tmp_path):
    done = from_pyreft(PYREFT["loreft.untied"], tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = done.config
    assert (config.r, config.positions, config.share_weights, config.width) == (3, "f3+l3", False, 32)
    assert (config.layers_to_transform, config.target_modules, str(config.task_type)) == ([0, 2], None, "CAUSAL_LM")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")  # the base model that the checkpoint names
    known = expected("pyreft")["loreft.untied.logits"].double()
    torch.testing.assert_close(logits_of(model.eval(), "llama"), known, rtol=0, atol=TOLERANCE)


def test_places_of_every_kind(tmp_path):
    config = from_pyreft(PYREFT["components"], tmp_path / "adapter").config
    assert set(config.target_modules) == {
        "model.layers.0.mlp",
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn",
        "model.layers.2",
    }
    assert config.width is None  # modules of several widths
    ranks = {name: config.rank_of(name) for name in config.target_modules}
    assert ranks == {
        "model.layers.0.mlp": 2,
        "model.layers.0.self_attn.k_proj": 2,
        "model.layers.1.self_attn": 3,
        "model.layers.2": 4,
    }


def test_heads_become_modules_to_save(tmp_path):
    config = from_pyreft(PYREFT["head.roberta"], tmp_path / "with").config
    assert (config.modules_to_save, str(config.task_type)) == (["classifier"], "SEQ_CLS")
    saved = torch.load(DATA / "pyreft" / "head.roberta" / "pytorch_model.bin", weights_only=True)
    tensors = load_file(tmp_path / "with" / "adapter_model.safetensors")
    for name, value in saved.items():
        assert torch.equal(tensors[f"base_model.model.{name}"], value)
    config = from_pyreft(PYREFT["head.roberta"], tmp_path / "without", with_head=False).config
    assert config.modules_to_save is None
    assert not any("classifier" in name for name in load_file(tmp_path / "without" / "adapter_model.safetensors"))


def test_the_options_of_pyrefts_training_script_are_read(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(DATA / "pyreft" / "consreft.trainer", folder)
    options = {
        "model": BASE,
        "position": "f3+l3",
        "share_weights": True,
        "intervention_type": "ConsreftIntervention",
        "act_fn": None,
        "dropout": 0.0,
    }
    (folder / "args.json").write_text(json.dumps(options))
    done = convert_pyreft(folder, tmp_path / "adapter")
    assert (done.config.positions, done.config.intervention, done.notes) == ("f3+l3", "consreft", [])
    with pytest.raises(ValueError, match=r"positions='f1\+l1' is given, and .*args.json says 'f3\+l3'"):
        convert_pyreft(folder, tmp_path / "other", positions="f1+l1")
    (folder / "args.json").write_text(json.dumps({**options, "share_weights": False}))
    with pytest.raises(ValueError, match="share_weights=False, says a file"):
        convert_pyreft(folder, tmp_path / "other")
    moved = (folder / "args.json").rename(tmp_path / "args.json")
    moved.write_text(json.dumps(options))
    convert_pyreft(folder, tmp_path / "other", args_file=moved)


def test_what_the_files_do_not_say_is_noted(tmp_path):
    notes = " ".join(from_pyreft(PYREFT["noreft.bias"], tmp_path / "adapter").notes)
    assert "act_fn: pyreft does not save it" in notes
    assert "prompts of fewer than 6 tokens" in notes
    assert "proj_layer.bias was left out" in " ".join(from_pyreft(PYREFT["nodireft.bias"], tmp_path / "b").notes)
    assert "answers included" in " ".join(from_adapters(ADAPTERS["loreft.last"], tmp_path / "c").notes)


def test_weights_of_16_bits_become_float32(tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(DATA / "pyreft" / "loreft.last", folder)
    (file,) = folder.glob("intkey_*.bin")
    state = torch.load(file, weights_only=True)
    state["weight"] = state["weight"].bfloat16()  # pyreft's default
    torch.save(state, file)
    done = convert_pyreft(folder, tmp_path / "adapter", BASE, "l2")
    assert "weights in bfloat16 were made float32" in " ".join(done.notes)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.model.layers.1.reft_W"][0], state["weight"].float())


# -- out to pyreft ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PYREFT)
def test_there_and_back_again(name, tmp_path):
    case = PYREFT[name]
    from_pyreft(case, tmp_path / "adapter")
    export_pyreft(tmp_path / "adapter", tmp_path / "pyreft")
    task_type = "SEQ_CLS" if case["base"] == "llama-classifier" else None
    convert_pyreft(tmp_path / "pyreft", tmp_path / "again", task_type=task_type)
    before, after = (load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "again"))
    assert before.keys() == after.keys()
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=TOLERANCE)
    configs = [json.loads((tmp_path / folder / "adapter_config.json").read_text()) for folder in ("adapter", "again")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", [name for name, case in PYREFT.items() if case["saved_by"] == "save"])
def test_the_files_are_pyrefts(name, tmp_path):
    """Names, shapes and dtypes of a checkpoint, and the fields of its config.json that matter."""
    original, out = DATA / "pyreft" / name, tmp_path / "pyreft"
    from_pyreft(PYREFT[name], tmp_path / "adapter")
    export_pyreft(tmp_path / "adapter", out)
    files = sorted(path.name for path in original.glob("intkey_*.bin"))
    theirs, ours = (json.loads((folder / "config.json").read_text()) for folder in (original, out))
    by_path = any("." in place["component"] for place in PYREFT[name]["places"])
    if not (by_path and PYREFT[name]["base"] == "llama"):  # a path that is also a component comes out as the component
        assert files == sorted(path.name for path in out.glob("intkey_*.bin"))
        assert sorted(theirs["sorted_keys"]) == sorted(ours["sorted_keys"])
        assert sorted(map(str, theirs["representations"])) == sorted(map(str, ours["representations"]))
        for file in files:
            states = [torch.load(folder / file, weights_only=True) for folder in (original, out)]
            assert states[1].keys() == states[0].keys() - {"proj_layer.bias"}
            assert all(states[1][key].shape == states[0][key].shape for key in states[1])
            assert all(states[1][key].dtype == states[0][key].dtype for key in states[1])
            if "rotate_layer" in states[0]:
                assert all(torch.equal(states[1][key], states[0][key]) for key in states[1])
    for field in ("intervention_types", "mode", "intervention_constant_sources"):
        assert theirs[field] == ours[field]
    heads = [torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (original, out)]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])


@pytest.mark.parametrize("shape", [(3, 32), (1, 5), (8, 8)])
def test_orthonormal_matrices_as_torch_saves_them(shape):
    torch.manual_seed(0)
    rank, width = shape
    linear = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(rank, width, bias=False))
    with torch.no_grad():
        linear.parametrizations.weight.original.sub_(0.3 * torch.randn(width, rank).tril(-1))
    state = linear.state_dict()
    original, base = (state[f"parametrizations.weight.{name}"] for name in ("original", "0.base"))
    assert (linear.weight - base[:, :rank]).abs().max() > 0.1
    torch.testing.assert_close(basis_of(original, base), linear.weight.detach().mT, rtol=0, atol=1e-6)

    R = linear.weight.detach().mT.contiguous()
    original, base = parameters_of(R)
    torch.testing.assert_close(base @ base.mT, torch.eye(width), rtol=0, atol=2e-6)
    linear.load_state_dict({"parametrizations.weight.original": original, "parametrizations.weight.0.base": base})
    torch.testing.assert_close(linear.weight.detach().mT, R, rtol=0, atol=TOLERANCE)
    assert torch.equal(basis_of(original, base), R)


def test_paths_and_components():
    assert place_of("model.layers.8.mlp", "LlamaForCausalLM") == Place("mlp_output", 8)
    assert place_of("model.layers.8.mlp.up_proj", "LlamaForCausalLM").component == "model.layers[8].mlp.up_proj.output"
    assert place_of("roberta.encoder.layer.1", "RobertaModel").key == (
        "comp_roberta_encoder_layer[1]_output_unit_pos_nunit_1#0"
    )
    assert Place.parse("layer_12_comp_block_output_unit_pos_nunit_1#1") == Place("block_output", 12, turn=1)


# -- the command ------------------------------------------------------------------------------------------------------


def test_the_command(tmp_path):
    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        assert result.exception is None, result.exception
        return result.output

    shown = run(
        DATA / "pyreft" / "loreft.gelu",
        tmp_path / "a",
        "--base-model",
        BASE,
        "--positions",
        "f3+l3",
        "--act-fn",
        "gelu",
    )
    assert "loreft, r=3, positions='f3+l3', share_weights=False, act_fn='gelu'" in " ".join(shown.split())
    assert "args.json" in run(tmp_path / "a", tmp_path / "b", "--to", "pyreft")
    run(tmp_path / "b", tmp_path / "c")
    model = adapted("llama", tmp_path / "c")
    known = expected("pyreft")["loreft.gelu.logits"].double()
    torch.testing.assert_close(logits_of(model, "llama"), known, rtol=0, atol=TOLERANCE)
    run(DATA / "adapters" / "loreft.first", tmp_path / "d", "--base-model", BASE, "--no-head")

    for arguments, says in (
        ([tmp_path / "a", tmp_path / "e"], "checkpoint of peft.*--to pyreft"),
        (
            [DATA / "adapters" / "loreft.first", tmp_path / "e", "--positions", "f3"],
            "--positions f3 has no meaning here",
        ),
        ([tmp_path / "a", tmp_path / "e", "--to", "pyreft", "--act-fn", "gelu"], "--act-fn gelu has no meaning"),
        ([tmp_path / "nowhere", tmp_path / "e"], "is no folder"),
    ):
        result = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        with pytest.raises(ValueError, match=says):
            raise result.exception
