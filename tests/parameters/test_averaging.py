"""Weights that averages, EMA callbacks or casts write: a saved adapter loads, and edits as the live model does."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft_of_transformers  # noqa: F401 - add_adapter takes the installed PEFT
import pytest
import torch
import transformers
from models import build, labelled, prompts, randomize, weight
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.optim.swa_utils import AveragedModel

from peft_reft import ReftConfig, ReftLayer
from peft_reft.tuner.interventions import orthogonal


BATCH = prompts(9, 4)
CONFIG = {"r": 4, "positions": "f2+l2", "task_type": "CAUSAL_LM"}
FILE = "adapter_model.safetensors"
EYE = torch.eye(4, dtype=torch.float64)
NEAREST = r"Adapter 'default': the rows of 3 of 3 tensors reft_R .*off by up to .*nearest.*W and b as they are"


def adapted(**settings) -> PeftModel:
    model = get_peft_model(build("llama"), ReftConfig(**{**CONFIG, **settings}))
    randomize(model)
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH, prompt_lengths=torch.tensor([9, 4])).logits  # which training mode asks for


def layers(model: torch.nn.Module) -> Iterator[ReftLayer]:
    return (module for module in model.modules() if isinstance(module, ReftLayer))


def error(R: torch.Tensor) -> float:
    return (R.double() @ R.double().mT - EYE).abs().max().item()


def disturb(model: torch.nn.Module, how: Callable = lambda old, new: old.data.copy_(new), by: float = 0.05) -> None:
    """Write to all weights of the adapter, as an averaging callback does."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "reft_" in name:
            how(parameter, parameter.data + by * torch.randn(parameter.shape, generator=generator))


def replace_data(parameter: torch.nn.Parameter, value: torch.Tensor) -> None:
    parameter.data = value


def polar(A: torch.Tensor) -> torch.Tensor:
    """(A Aᵀ)^(-1/2) A: the nearest matrix with orthonormal rows, by eigenvalues."""
    values, vectors = torch.linalg.eigh(A.double() @ A.double().mT)
    return (vectors * values.rsqrt()[..., None, :] @ vectors.mT @ A.double()).to(A.dtype)


# -- saving -----------------------------------------------------------------------------------------------------------


STATES = {
    "state_dict": lambda model: model.state_dict(),
    "base model": lambda model: model.base_model.model.state_dict(),
    "PEFT": get_peft_model_state_dict,
    "torch.distributed": get_model_state_dict,
    "a stack of blocks": lambda model: model.base_model.model.model.layers.state_dict(),
    "keep_vars": lambda model: model.state_dict(keep_vars=True),
}


@pytest.mark.parametrize("write", [lambda old, new: old.data.copy_(new), replace_data], ids=["copied", "replaced"])
@pytest.mark.parametrize("state", STATES)
def test_saved_R_are_orthonormal_whatever_wrote_them(state, write):
    model = adapted()
    logits(model)
    disturb(model, write)
    assert all(error(weight(layer, "R")) > 0.1 for layer in layers(model))
    saved = [value for name, value in STATES[state](model).items() if "reft_R" in name]
    assert len(saved) == 3 and all(error(R) < 1e-5 for R in saved)


@pytest.mark.parametrize("part", ["layers.1", "layers.1.self_attn"])
def test_a_part_of_the_model_retracts_the_R_that_it_saves(part):
    model = adapted(target_modules=["self_attn"] if "attn" in part else None)
    disturb(model)
    (R,) = (
        value
        for name, value in model.base_model.model.model.get_submodule(part).state_dict().items()
        if "reft_R" in name
    )
    assert error(R) < 1e-5
    assert error(weight(next(layers(model)), "R")) > 0.1  # R outside of the part stays as it is
    model.state_dict()
    disturb(model)  # also after the whole model was saved
    (R,) = (
        value
        for name, value in model.base_model.model.model.get_submodule(part).state_dict().items()
        if "reft_R" in name
    )
    assert error(R) < 1e-5


@pytest.mark.parametrize("native", [False, True], ids=["peft", "transformers"])
@pytest.mark.parametrize("write", [lambda old, new: old.data.copy_(new), replace_data], ids=["copied", "replaced"])
def test_a_saved_adapter_computes_what_the_live_model_computes(write, native, tmp_path):
    """Also by W and b: the weights that a forward has stacked may be older than those that a callback wrote."""
    if native:
        model = build("llama")
        model.add_adapter(ReftConfig(**CONFIG))
        randomize(model)
        model.eval()
    else:
        model = adapted()
    before = logits(model)
    disturb(model, write)
    model.save_pretrained(tmp_path)
    live = logits(model)
    assert (live - before).abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), live)


def test_W_alone_is_written_and_saved(tmp_path):
    """No R shows that write, and the W that a forward has stacked is out of date."""
    model = adapted()
    before = logits(model)
    for layer in layers(model):
        weight(layer, "W").data.mul_(2)
    model.save_pretrained(tmp_path)
    live = logits(model)
    assert not torch.equal(live, before)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), live)


def test_an_average_that_is_swapped_in_for_evaluation(tmp_path):
    model = adapted().train()
    logits(model)
    disturb(model)
    model.eval()
    live = logits(model)
    assert all(error(weight(layer, "R")) < 1e-5 for layer in layers(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), live)


@pytest.mark.parametrize("positions", ["f2+l2", "all"])  # weights stacked for all layers, or read by each layer
@pytest.mark.parametrize(
    "between", [lambda model: model.state_dict(), lambda model: model.eval()], ids=["saved", "evaluated"]
)
def test_nothing_is_written_between_a_forward_and_its_backward(between, positions):
    """Autograd would refuse the backward after any write, even of the same values."""
    model = adapted(positions=positions).train()
    batch = labelled(9, 4, prompt=3, seed=0)
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    loss = model(**batch).loss
    between(model)
    logits(model)
    loss.backward()
    assert all(torch.equal(p.grad, expected[name]) for name, p in model.named_parameters() if p.requires_grad)


def test_a_state_dict_retracts_once_and_in_one_batch(monkeypatch):
    model, sizes = adapted(), []
    retracted = orthogonal.retracted
    monkeypatch.setattr(orthogonal, "retracted", lambda all_R: sizes.append(len(all_R)) or retracted(all_R))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(**labelled(9, 4, prompt=3, seed=0)).loss.backward()
        sizes.clear()
        optimizer.step()
        model.state_dict()
        assert sizes == [3]
        model.state_dict()
        assert sizes == [3]  # orthonormal R are not factorized again


def test_after_a_state_dict_that_failed_each_layer_is_retracted():
    model = adapted()
    hook = model.base_model.model.lm_head.register_state_dict_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.state_dict()
    hook.remove()
    disturb(model)
    logits(model)  # the forward ends the state dict that failed
    disturb(model)
    for layer in layers(model):
        (R,) = (value for name, value in layer.state_dict().items() if "reft_R" in name)
        assert error(R) < 1e-5


def test_an_unloaded_model_has_no_hooks():
    base = adapted().unload()
    assert not base._state_dict_pre_hooks and not base._state_dict_hooks


# -- loading ----------------------------------------------------------------------------------------------------------


def singular_values(R: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(R.double())


@pytest.fixture
def averaged(tmp_path) -> Path:
    """A file with the mean of two adapters that were trained on the same data at different learning rates."""
    folders = []
    for rate in (0.01, 0.05):
        model = adapted().train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        for _ in range(20):
            model(**labelled(9, 4, prompt=3, seed=0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        folders.append(tmp_path / str(rate))
        model.save_pretrained(folders[-1])
    one, other = (load_file(folder / FILE) for folder in folders)
    folder = Path(shutil.copytree(folders[0], tmp_path / "averaged"))
    save_file({name: (one[name] + other[name]) / 2 for name in one}, folder / FILE)
    assert all(0.1 < error(R) < 0.9 for name, R in load_file(folder / FILE).items() if "reft_R" in name)
    return folder


def set_state_dict(folder: Path, **_) -> PeftModel:
    model = adapted()
    set_peft_model_state_dict(model, load_file(folder / FILE))
    return model


WAYS = {
    "from_pretrained": lambda folder: PeftModel.from_pretrained(build("llama"), folder),
    "low_cpu_mem_usage": lambda folder: PeftModel.from_pretrained(build("llama"), folder, low_cpu_mem_usage=True),
    "set_peft_model_state_dict": set_state_dict,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("way", WAYS)
def test_an_average_is_loaded_as_the_nearest(averaged, way, dtype):
    given = {name: tensor.to(dtype) for name, tensor in load_file(averaged / FILE).items()}
    save_file(given, averaged / FILE)
    content = (averaged / FILE).read_bytes()
    with pytest.warns(UserWarning, match=NEAREST) as caught:
        model = WAYS[way](averaged)
    assert sum("nearest" in str(one.message) for one in caught) == 1
    assert (averaged / FILE).read_bytes() == content
    tolerance = max(1e-6, 4 * torch.finfo(dtype).eps)
    for name, tensor in get_peft_model_state_dict(model).items():
        if "reft_R" in name:
            torch.testing.assert_close(tensor.double(), polar(given[name].double()), rtol=0, atol=tolerance)
            assert error(tensor) < max(1e-5, 4 * torch.finfo(tensor.dtype).eps)
        else:
            torch.testing.assert_close(tensor.double(), given[name].double(), rtol=1e-7, atol=0)


def test_the_tensors_of_the_caller_are_not_written_to(averaged):
    model = adapted()
    state = {f"base_model.model.{name}": value for name, value in model.base_model.model.state_dict().items()}
    given = {f"{name}.default": tensor for name, tensor in load_file(averaged / FILE).items()}
    assert given.keys() < state.keys()
    before = copy.deepcopy(given)
    with pytest.warns(UserWarning, match=NEAREST):
        model.load_state_dict(given, strict=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in given.items())


def test_placeholders_are_passed_over():
    """As DeepSpeed's ZeRO-3 has them in a model and in its own checkpoints: empty, with the shape noted beside."""
    model = adapted()
    for name, parameter in model.named_parameters():
        if "reft_" in name:
            parameter.ds_shape = parameter.shape
            parameter.data = torch.empty(0)
    placeholders = {name: torch.empty(0) for name, _ in model.named_parameters() if "reft_" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(placeholders, strict=False)


def test_adapters_that_started_apart_average(tmp_path):
    """Their R have little in common, but the mean of two R, each orthogonal to the other, is far from losing rank."""
    states = []
    for seed in range(2):
        model = get_peft_model(build("llama"), ReftConfig(**CONFIG))
        torch.manual_seed(seed)
        for layer in layers(model):
            weight(layer, "R").data = torch.linalg.qr(torch.randn(2, 32, 4)).Q.mT.contiguous()
        states.append(get_peft_model_state_dict(model))
    mean = {name: (value + states[1][name]) / 2 for name, value in states[0].items()}
    assert min(singular_values(R).min() for name, R in mean.items() if "reft_R" in name) < 0.6
    with pytest.warns(UserWarning, match=NEAREST):
        set_peft_model_state_dict(model, mean)


def test_an_average_of_R_that_cancel_each_other_is_refused():
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = get_peft_model_state_dict(model)
    name = next(name for name in state if "layers.1.reft_R" in name)
    R = state[name].clone()
    R[0, 2] *= 0.05  # the mean of r and -0.9 r
    with pytest.raises(
        ValueError, match="'.*layers.1.reft_R.default' are not orthonormal.*from 0.05 to 1,.*cancel each other"
    ):
        set_peft_model_state_dict(model, {**state, name: R})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_an_EMA_is_swapped_in_and_out_by_load_state_dict(rate):
    torch.manual_seed(0)
    model = adapted().train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    average = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=rate)
    batch = labelled(9, 4, prompt=3, seed=0)
    worst = 0.0
    for step in range(300):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, p in trained.items():
            average[name].lerp_(p.detach(), 0.01)
        if step % 50 == 49:
            worst = max([worst, *(error(p) for name, p in average.items() if "reft_R" in name)])
            mine = {name: p.detach().clone() for name, p in trained.items()}
            with warnings.catch_warnings(record=True):
                model.load_state_dict(average, strict=False)
                assert logits(model).isfinite().all()
                assert all(error(weight(layer, "R")) < 1e-5 for layer in layers(model))
                model.load_state_dict(mine, strict=False)
    assert worst > 2**-6  # else no average was off


# -- tools that average -----------------------------------------------------------------------------------------------


def test_AveragedModel_of_torch(tmp_path):
    model = adapted().train()
    averaged = AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(5):
        model(**labelled(9, 4, prompt=3, seed=0)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        averaged.update_parameters(model)
    averaged.module.save_pretrained(tmp_path)
    live = logits(averaged.eval())
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval()), live)
    assert not torch.equal(live, logits(model.eval()))


class EMA(transformers.TrainerCallback):
    """A callback that averages the weights, and writes the average at the end of training."""

    def on_train_begin(self, args, state, control, model, **_):
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def on_step_end(self, args, state, control, model, **_):
        for name, p in model.named_parameters():
            if p.requires_grad:
                self.average[name].lerp_(p.detach(), 0.3)

    def on_train_end(self, args, state, control, model, **_):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.copy_(self.average[name])


def test_an_EMA_callback_of_Trainer(tmp_path):
    model = adapted()
    examples = [{key: value[0] for key, value in labelled(8, prompt=3, seed=seed).items()} for seed in range(4)]
    options = {"max_steps": 12, "learning_rate": 0.05, "per_device_train_batch_size": 1, "save_strategy": "no"}
    arguments = transformers.TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, use_cpu=True, **options)
    trainer = transformers.Trainer(model, arguments, train_dataset=examples, callbacks=[EMA()])
    trainer.train()
    assert max(error(weight(layer, "R")) for layer in layers(model)) > 1e-3  # else this test could not fail
    trainer.save_model(str(tmp_path / "ema"))
    live = logits(model.eval())
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path / "ema").eval()), live)
