"""Adapter files that are damaged, changed, of another method or not finite are refused, and change nothing."""

from __future__ import annotations

import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from hypothesis import strategies as st
from models import build, labelled, prompts, randomize
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file, save_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from peft_reft import ReftConfig, ReftLayer
from peft_reft.tuner.config import FORMAT
from peft_reft.tuner.interventions.formulas import INTERVENTIONS
from peft_reft.tuner.interventions.orthogonal import retract
from peft_reft.tuner.parameters.loading import ORTHONORMAL_TOLERANCE


BATCH = prompts(9, 4)
LAYER = "base_model.model.model.layers.1.reft_"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, torch.Tensor]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH).logits


def adapted(**settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l2", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build("llama"), ReftConfig(**settings))
    randomize(model)
    return model.eval()


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    """A good adapter."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    adapted().save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of the good adapter, for a test to break."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **settings) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **settings}))


def fill(letter: str, value: float) -> Callable[[Tensors], None]:
    return lambda tensors: tensors[f"{LAYER}{letter}"][0, 1].fill_(value)


def replace(letter: str, value: torch.Tensor) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({f"{LAYER}{letter}": value})


def swap(tensors: Tensors) -> None:
    tensors[f"{LAYER}R"], tensors[f"{LAYER}W"] = tensors[f"{LAYER}W"], tensors[f"{LAYER}R"]


def only_lora(tensors: Tensors) -> None:
    tensors.clear()
    tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.ones(2, 32)


# Faults in the tensors of one layer.
TENSORS = {
    "missing": (lambda tensors: tensors.pop(f"{LAYER}W"), r"layers.1.reft_W.*is missing"),
    "unknown": (replace("Q", torch.ones(2)), r"reft_Q'?"),
    "shape": (replace("R", torch.eye(32)[:3].repeat(2, 1, 1)), r"reft_R.* has shape \[2, 3, 32\].* \[2, 4, 32\]"),
    "groups": (replace("W", torch.ones(1, 4, 32)), r"reft_W.* has shape \[1, 4, 32\]"),
    "bias": (replace("b", torch.tensor(1.0)), r"reft_b.* has shape \[\].* \[2, 4\]"),
    "integers": (replace("b", torch.ones(2, 4, dtype=torch.int64)), r"reft_b.* holds int64, .*float32"),
    "8 bits": (replace("b", torch.ones(2, 4).to(torch.float8_e4m3fn)), r"reft_b.* holds float8_e4m3fn"),
    "NaN": (fill("W", float("nan")), r"reft_W.* holds 32 NaN and 0 infinite values, of 256.*earlier save"),
    "NaN in R": (fill("R", float("nan")), r"reft_R.* holds 32 NaN"),
    "Inf": (fill("b", float("-inf")), r"reft_b.* holds 0 NaN and 1 infinite values, of 8"),
    "scaled": (
        lambda tensors: tensors[f"{LAYER}R"].mul_(2),
        r"rows of .*reft_R.* not orthonormal.*off by 3,.*from 2 to 2,",
    ),
    "opposed": (
        lambda tensors: tensors[f"{LAYER}R"].mul_(0.05),
        r"rows of .*reft_R.* not orthonormal.*from 0.05 to 0.05,.*one start",
    ),
    "one row": (fill("R", 0.0), r"rows of .*reft_R.* not orthonormal.*off by 1,?"),
    "huge": (lambda tensors: tensors[f"{LAYER}R"].mul_(1e30), r"rows of .*reft_R.* not orthonormal"),
    "swapped": (swap, r"rows of .*reft_R.* not orthonormal.*interventions.orthogonal.retract"),
}
# Faults in which layers the file has.
LAYERS = {
    "a layer more": (
        lambda tensors: tensors.update(
            {f"{LAYER}{x}".replace("1", "3"): tensors[f"{LAYER}{x}"].clone() for x in "RWb"}
        ),
        r"no tensor '.*layers.3.reft_.*unload\(\)",
    ),
    "a layer less": (
        lambda tensors: [tensors.pop(f"{LAYER}{x}") for x in "RWb"],
        r"layers.1.reft_R.*is missing.*unload\(\)",
    ),
}  # fmt: skip


def load_first(folder: Path, **options) -> None:
    base = build("llama")
    before = logits(base)
    try:
        PeftModel.from_pretrained(base, folder, **options)
    finally:
        assert torch.equal(logits(base), before)
        assert not any(isinstance(module, ReftLayer) for module in base.modules())


def load_second(folder: Path) -> None:
    model = adapted(positions="l3")
    before = logits(model)
    try:
        model.load_adapter(folder, "other")
    finally:
        assert list(model.peft_config) == ["default"]
        assert torch.equal(logits(model), before)


WAYS = {
    "from_pretrained": load_first,
    "trainable": lambda folder: load_first(folder, is_trainable=True),
    "low_cpu_mem_usage": lambda folder: load_first(folder, low_cpu_mem_usage=True),
    "load_adapter": load_second,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_do_not_fit_their_config_leave_the_model_alone(adapter, fault, way):
    change, message = TENSORS[fault]
    rewrite(adapter, change)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: .*{message}"):
        WAYS[way](adapter)


@pytest.mark.parametrize("fault", {**TENSORS, **LAYERS})
def test_tensors_that_do_not_fit_the_model_are_not_written(saved, fault):
    """Names and values are checked also where a state dict is loaded without a file."""
    change, message = {**TENSORS, **LAYERS}[fault]
    model = adapted(intervention="loreft")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = {name: tensor * 1.001 if "_W" in name else tensor for name, tensor in load_file(saved / WEIGHTS).items()}
    change(tensors)
    with pytest.raises(ValueError, match=f"^Adapter 'default'.*{message}"):
        set_peft_model_state_dict(model, tensors)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fault", LAYERS)
def test_layers_that_only_the_model_or_only_the_file_has(adapter, fault):
    change, message = LAYERS[fault]
    rewrite(adapter, change)
    for options in ({}, {"low_cpu_mem_usage": True}):
        with pytest.raises(ValueError, match=f"^Adapter 'default'.*{message}"):
            PeftModel.from_pretrained(build("llama"), adapter, **options)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"r": 5}, r"shape \[2, 4, 32\].*\[2, 5, 32\]"),
        ({"r": "4"}, "adapter_config.json of .*r='4' is not allowed"),
        ({"positions": "l3"}, r"shape \[2, 4, 32\].*\[1, 4, 32\]"),
        ({"positions": 7}, "adapter_config.json of .*positions"),
        ({"share_weights": True}, r"shape \[2, 4, 32\].*\[1, 4, 32\]"),
        ({"intervention": "lobireft"}, "reft_W' is no tensor of .*'lobireft'"),
        ({"add_bias": False}, "reft_b' is no tensor of .*add_bias=False"),
        ({"width": 64}, r"shape \[2, 4, 32\].*\[2, 4, 64\]"),
        ({"layers_to_transform": [0, 1]}, "Adapter 'default'.* has no tensor '.*layers.2.reft_"),
        ({"layers_to_transform": "all"}, "adapter_config.json of .*layers_to_transform='all'"),
        ({"target_modules": ["mlp"]}, "Adapter 'default'.*(none of the 9 tensors|has no tensor)"),
        ({"task_type": "CHAT"}, "adapter_config.json of .*'CHAT'"),
    ],
    ids=str,
)
def test_a_config_that_was_changed(adapter, settings, message):
    configure(adapter, **settings)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PeftModel.from_pretrained(build("llama"), adapter)


@pytest.mark.parametrize("text", ["", '{"r": 4, "peft_type": "RE', "[1]", "\x00\xff"])
def test_a_config_file_that_holds_no_config(adapter, text):
    (adapter / CONFIG).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"adapter_config.json of '{adapter}.*can't be used"):
        ReftConfig.from_pretrained(adapter)
    with pytest.raises((ValueError, TypeError)):  # PEFT's own error: it does not know yet that the config is ReFT's
        load_first(adapter)


def test_settings_of_a_later_version(adapter):
    """An unknown setting of a later format is refused. PEFT warns of any other, and drops it."""
    configure(adapter, edit_every=2, reft_format=FORMAT + 1)
    for load in (PeftConfig.from_pretrained, ReftConfig.from_pretrained, load_first, build("llama").load_adapter):
        with pytest.raises(
            ValueError, match=f"edit_every=2 and reft_format={FORMAT + 1}: fields of a newer peft_reft"
        ):
            load(str(adapter))
    configure(adapter, reft_format=FORMAT)
    with pytest.warns(UserWarning, match="'edit_every'"):
        assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), adapter)), logits(adapted()))
    with pytest.raises(TypeError, match="unexpected keyword argument 'edit_every'"):
        ReftConfig(edit_every=2)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_that_is_cut_off_or_damaged(adapter, way):
    file = adapter / WEIGHTS
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for damaged in (
        b"",
        whole[:5],
        whole[: header // 2],
        whole[: header + 8],
        whole[:-1],
        whole + b"\0",
        (header - 3).to_bytes(8, "little") + whole[8:],
        (2**63).to_bytes(8, "little") + whole[8:],
        whole.replace(b'"F32"', b'"F33"', 1),
        whole.replace(b"[2,4,32]", b"[2,5,32]", 1),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{WEIGHTS} \([\d,]+ bytes\) is no readable safetensors file.*cut off"):
            WAYS[way](adapter)


@hypothesis.settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(st.data())
def test_any_change_to_the_header_of_a_file(saved, data):
    """The file is refused, or gives the same weights: only the bytes after the header hold numbers."""
    good = load_file(saved / WEIGHTS)
    raw = bytearray((saved / WEIGHTS).read_bytes())
    end = 8 + int.from_bytes(raw[:8], "little")
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "delete", "swap"]))
    at = data.draw(st.integers(0, end - 1))
    if kind == "flip":
        raw[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del raw[data.draw(st.integers(0, len(raw) - 1)) :]
    elif kind == "insert":
        raw[at:at] = data.draw(st.binary(min_size=1, max_size=4))
    elif kind == "delete":
        del raw[at : at + data.draw(st.integers(1, 4))]
    else:  # two bytes of the header, such as in the names of two tensors
        other = data.draw(st.integers(8, end - 1))
        raw[at], raw[other] = raw[other], raw[at]
    folder = saved.parent / "fuzzed"
    shutil.copytree(saved, folder, dirs_exist_ok=True)
    (folder / WEIGHTS).write_bytes(raw)
    try:
        model = PeftModel.from_pretrained(build("llama"), folder)
    except ValueError as error:
        assert WEIGHTS in str(error) or "Adapter 'default'" in str(error)
        return
    loaded = get_peft_model_state_dict(model)
    assert loaded.keys() == good.keys()
    # Two tensors of one shape may have exchanged their names, which no reader can see.
    assert sorted(map(_bytes, loaded.values())) == sorted(map(_bytes, good.values()))


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


@pytest.mark.parametrize("intervention", sorted(INTERVENTIONS))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_good_files_of_every_dtype_pass(tmp_path, intervention, dtype):
    model = adapted(intervention=intervention)
    model.save_pretrained(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(build("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        for name, tensor in get_peft_model_state_dict(loaded).items():
            if "reft_R" in name:  # an R of 16 bits may be orthonormalized in 32
                torch.testing.assert_close(
                    tensor, tensors[name], atol=ORTHONORMAL_TOLERANCE, rtol=0, check_dtype=False
                )
            else:
                assert torch.equal(tensor.to(dtype), tensors[name])


@pytest.mark.parametrize("rank, width", [(1, 4096), (8, 64), (64, 64), (128, 4096)])
def test_rounding_to_16_bits_keeps_within_the_tolerance(rank, width):
    """The error of an inner product is at most half the tolerance, for any rank and width."""
    torch.manual_seed(0)
    R_GRD = torch.randn(2, rank, width)
    retract([R_GRD])
    for dtype in (torch.bfloat16, torch.float16):
        rounded_GRD = R_GRD.to(dtype).double()
        error = (rounded_GRD @ rounded_GRD.mT - torch.eye(rank, dtype=torch.float64)).abs().max()
        assert error <= ORTHONORMAL_TOLERANCE / 2


def test_values_of_a_module_that_is_saved_whole(tmp_path):
    adapted(modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda tensors: tensors["base_model.model.lm_head.weight"][3].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: '.*lm_head.weight' holds 32 NaN"):
        load_first(tmp_path)


def test_weights_of_another_method(adapter, tmp_path):
    rewrite(adapter, only_lora)
    with pytest.raises(ValueError, match=r"no tensor of a ReFT adapter, of 1 tensors \(such as '.*lora_A"):
        load_first(adapter)
    get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    assert isinstance(ReftConfig.from_pretrained(tmp_path / "lora"), LoraConfig)  # PEFT reads the type from the file


@pytest.mark.parametrize("renamed", [lambda name: None, lambda name: name.removeprefix("base_model."), str.upper])
def test_nothing_to_load(saved, renamed):
    model = adapted()
    tensors = {renamed(name): tensor for name, tensor in load_file(saved / WEIGHTS).items() if renamed(name)}
    if not hasattr(BaseTuner, "_remap_adapter_state_dict_for_load"):  # PEFT 0.20 does not say which adapter it loads
        assert len(set_peft_model_state_dict(model, tensors).missing_keys) > 0
        return
    with pytest.raises(
        ValueError, match=rf"Adapter 'default': none of the {len(tensors)} tensors to load is one of its own"
    ):
        set_peft_model_state_dict(model, tensors)


def test_an_adapter_of_a_model_with_more_or_fewer_layers(saved, tmp_path):
    def shorter() -> torch.nn.Module:
        base = build("llama")
        del base.model.layers[2:]
        base.config.num_hidden_layers = 2
        return base

    with pytest.raises(ValueError, match="Adapter 'default' has no tensor '.*layers.2.reft_.*base model"):
        PeftModel.from_pretrained(shorter(), saved)
    get_peft_model(shorter(), ReftConfig(r=4, positions="f2+l2")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="Adapter 'default': '.*layers.2.reft_R.default' is missing"):
        PeftModel.from_pretrained(build("llama"), tmp_path)


# -- state dicts that load --------------------------------------------------------------------------------------------


def test_state_dicts_of_whole_and_partial_models():
    model = adapted(modules_to_save=["lm_head"])
    model.add_adapter("other", ReftConfig(r=2, positions="l3", layers_to_transform=[1], task_type="CAUSAL_LM"))
    fresh = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l2", modules_to_save=["lm_head"]))
    fresh.add_adapter("other", ReftConfig(r=2, positions="l3", layers_to_transform=[1]))
    everything = model.state_dict()
    fresh.load_state_dict(everything, strict=True)
    assert torch.equal(logits(fresh), logits(model))
    others = {name: tensor for name, tensor in everything.items() if name.endswith(".other")}
    fresh.load_state_dict(others, strict=False)  # of one adapter alone
    for shard in (0, 1):  # the files of a large checkpoint, each with a part of an adapter
        part = {name: t for number, (name, t) in enumerate(everything.items()) if number % 2 == shard}
        fresh.load_state_dict(part, strict=False)
    fresh.load_state_dict({name: t for name, t in everything.items() if "reft_" not in name}, strict=False)
    torch.nn.Sequential(fresh).load_state_dict({f"0.{name}": tensor for name, tensor in everything.items()})
    assert torch.equal(logits(fresh), logits(model))
    blocks = fresh.base_model.model.model.layers
    blocks[0] = checkpoint_wrapper(blocks[0])  # the wrapper does not show in the names of a state dict
    fresh.load_state_dict(everything, strict=True)
    fresh.base_model.model.again = fresh.base_model.model.model.layers[1]  # a module under two names
    fresh.load_state_dict(fresh.state_dict(), strict=True)
    # of a layer in which that adapter has no weights
    stray = {"base_model.model.model.layers.2.reft_W.other": torch.ones(1, 2, 32)}
    with pytest.raises(ValueError, match="Adapter 'other' has no tensor '.*layers.2.reft_W.other'"):
        fresh.load_state_dict({**everything, **stray}, strict=False)
    everything["base_model.model.model.layers.1.reft_W.other"].fill_(float("nan"))
    with pytest.raises(ValueError, match="Adapter 'other': '.*reft_W.other' holds 64 NaN"):
        fresh.load_state_dict(everything)


def test_an_unloaded_model_checks_nothing():
    base = adapted().unload()
    assert not base._load_state_dict_pre_hooks
    base.load_state_dict(base.state_dict())


def test_parameters_put_in_place_without_a_state_dict(adapter):
    """transformers' load_adapter does so: it reports tensors that are missing or do not fit, and checks no values."""
    rewrite(adapter, fill("W", float("nan")))
    base = build("llama")
    base.load_adapter(str(adapter))
    with pytest.raises(ValueError, match="Adapter 'default': 'model.layers.1.reft_W.default' holds 32 NaN"):
        logits(base)
    with pytest.raises(ValueError, match="holds 32 NaN"):
        base.generate(**BATCH, max_new_tokens=2)


# -- pickles ----------------------------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_a_pickle_is_written_with_a_warning_and_read(tmp_path):
    model = adapted()
    with pytest.warns(UserWarning, match="saved as a pickle, .*adapter_model.bin.*weights_only=True.*safe_serializat"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / WEIGHTS).exists()
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path)), logits(model))
    loaded = adapted(positions="l3")
    loaded.load_adapter(tmp_path, "other")
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), logits(model))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*pickle")
        model.save_pretrained(tmp_path)  # beside the pickle, and read in its place


@pytest.mark.parametrize("way", WAYS)
def test_a_pickle_is_looked_at_as_any_other_file(adapter, way):
    pickled = adapter / "adapter_model.bin"
    tensors = load_file(adapter / WEIGHTS)
    (adapter / WEIGHTS).unlink()
    torch.save({**tensors, LAYER + "W": torch.full_like(tensors[LAYER + "W"], torch.nan)}, pickled)
    with pytest.raises(ValueError, match="adapter_model.bin: .*reft_W' holds .* NaN"):
        WAYS[way](adapter)
    torch.save({key: value for key, value in tensors.items() if key != LAYER + "W"}, pickled)
    with pytest.raises(ValueError, match="adapter_model.bin.*reft_W"):
        WAYS[way](adapter)
    torch.save(tensors, pickled)
    pickled.write_bytes(pickled.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"adapter_model.bin \([\d,]+ bytes\) can't be read as a pickle of tensors"):
        WAYS[way](adapter)


def test_code_in_a_pickle_is_not_run(adapter, tmp_path):
    marker = tmp_path / "ran"
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Malicious(marker)))
    loads = [load_first, load_second, build("llama").load_adapter]
    # A trainer that resumes loads into the adapter of the model, for which PEFT does not read the config.
    loads.append(lambda folder: adapted().load_adapter(folder, "default"))
    for load in loads:
        with pytest.raises(Exception, match="pickle|[Ww]eights only|No such file"):
            load(str(adapter))
    assert not marker.exists()
    pickle.loads((adapter / "adapter_model.bin").read_bytes())
    assert marker.exists()  # loading it does run the code


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """The checkpoint of a trainer after one step of two."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder / "checkpoint-1"


def trainer(folder: Path) -> transformers.Trainer:
    examples = [{key: value[0] for key, value in labelled(8, prompt=3, seed=seed).items()} for seed in range(2)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return transformers.Trainer(adapted(), arguments, train_dataset=examples)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_code_in_a_trainer_s_checkpoint_is_not_run(checkpoint, tmp_path, file):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint-1"))
    assert (folder / file).exists()
    torch.save(Malicious(tmp_path / "ran"), folder / file)
    try:
        trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    except Exception as error:
        assert "Weights only load failed" in str(error)
    else:
        assert file == "training_args.bin"  # which no loader reads
    assert not (tmp_path / "ran").exists()


def test_the_auto_class(adapter, tmp_path):
    build("llama").save_pretrained(tmp_path / "base")
    configure(adapter, base_model_name_or_path=str(tmp_path / "base"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(adapter)), logits(adapted()))
    rewrite(adapter, fill("W", float("nan")))
    with pytest.raises(ValueError, match=f"{WEIGHTS}: .*reft_W' holds 32 NaN"):
        AutoPeftModelForCausalLM.from_pretrained(adapter)
