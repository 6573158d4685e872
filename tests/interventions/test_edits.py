"""The formulas, one token at a time; start values; dropout; the orthonormal rows of R."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from models import DECODERS, build, labelled, prompts, randomize, weight
from peft import get_peft_model
from torch import nn
from transformers.activations import ACT2FN

from peft_reft import ReftConfig
from peft_reft.tuner.interventions.formulas import INTERVENTIONS
from peft_reft.tuner.interventions.orthogonal import retract, tangent


def edit_by_hand(name, h, R, W, b, act):
    """The table in interventions/formulas.py, for one hidden state h [D]."""
    match name:
        case "loreft" | "noreft":
            return h + R.T @ (act(W @ h + b) - R @ h)
        case "direft" | "nodireft":
            return h + R.T @ act(W @ h + b)
        case "consreft":
            return h + R.T @ (b - R @ h)
        case "lobireft":
            return h + R.T @ b


class Tokenwise(nn.Module):
    """A model whose output at a token depends on that token alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.stream = nn.Linear(16, 16)

    def forward(self, input_ids, attention_mask=None):
        return self.stream(self.embed(input_ids))


@pytest.mark.parametrize("share_weights", [True, False])
@pytest.mark.parametrize("act_fn", [None, "gelu", "tanh"])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_selected_token_is_edited_by_the_formula_and_no_other(name, act_fn, share_weights):
    if act_fn and not INTERVENTIONS[name].has_source:
        pytest.skip("no activation in this edit")
    torch.manual_seed(0)
    base = Tokenwise()
    batch = prompts(9, 3, 6)
    batch["input_ids"] %= 50
    with torch.no_grad():
        plain = base(**batch)
    config = ReftConfig(
        r=4,
        intervention=name,
        act_fn=act_fn,
        positions="f2+l3",
        share_weights=share_weights,
        target_modules=["stream"],
        init_weights="pyreft",
    )
    model = get_peft_model(base, config).eval()
    R, W, b = ((weight(base.stream, k) if "default" in getattr(base.stream, f"reft_{k}") else None) for k in "RWb")
    expected = plain.clone()
    act = ACT2FN[act_fn] if act_fn else nn.Identity()
    # f2+l3 of prompts of 9, 3 and 6 tokens: 3 < 5 leaves one first and one last token
    for row, first, last in [(0, [0, 1], [6, 7, 8]), (1, [0], [2]), (2, [0, 1], [3, 4, 5])]:
        for group, tokens in enumerate([first, last]):
            g = 0 if share_weights else group
            for token in tokens:
                weights = [None if w is None else w[g] for w in (R, W, b)]
                expected[row, token] = edit_by_hand(name, plain[row, token], *weights, act)
    with torch.no_grad():
        edited = model(**batch)
    torch.testing.assert_close(edited, expected, rtol=0, atol=1e-5)
    assert (edited - plain).abs().amax(dim=-1).gt(1e-3).sum() == 5 + 2 + 5


@pytest.mark.parametrize("positions", ["f2+l2", "l1", "all"])
@pytest.mark.parametrize("name", ["loreft", "noreft", "direft", "nodireft", "lobireft"])
def test_starts_as_the_base_model_to_the_bit(name, positions):
    base, batch = build("llama"), prompts(8, 5)
    labels = batch["input_ids"].masked_fill(torch.arange(8) < 3, -100)
    plain = base(**batch).logits
    model = get_peft_model(base, ReftConfig(r=4, intervention=name, positions=positions))
    assert torch.equal(model(**batch).logits, plain)
    trained = model.train()(**batch, labels=labels)
    assert torch.equal(trained.logits, plain)
    trained.loss.backward()
    gradients = [p.grad.abs().max() for p in model.parameters() if p.requires_grad]
    assert max(gradients) > 0  # training can leave the start values


@pytest.mark.parametrize("name", ["nodireft", "noreft"])
@pytest.mark.parametrize("act_fn", ["sigmoid", "gelu"])
def test_starts_as_the_base_model_behind_an_activation_where_R_is_free(name, act_fn):
    base, batch = build("llama"), prompts(8)
    plain = base(**batch).logits
    model = get_peft_model(base, ReftConfig(r=4, intervention=name, act_fn=act_fn))
    assert torch.equal(model(**batch).logits, plain)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_pyreft_start_is_random(name):
    base, batch = build("llama"), prompts(8)
    plain = base(**batch).logits
    model = get_peft_model(base, ReftConfig(r=4, intervention=name, init_weights="pyreft"))
    assert (model(**batch).logits - plain).abs().max() > 1e-3
    R = weight(base.model.layers[0], "R")
    eye = torch.eye(4).expand(2, 4, 4)
    assert torch.allclose(R @ R.mT, eye, atol=1e-6) == INTERVENTIONS[name].orthonormal


def test_without_bias_there_is_none():
    base = build("llama")
    model = get_peft_model(base, ReftConfig(r=4, add_bias=False))
    assert not any("reft_b" in name for name, _ in model.named_parameters())
    model(**prompts(8))


def test_dropout_is_on_the_edited_state_and_in_training_only():
    torch.manual_seed(0)
    base = Tokenwise()
    config = ReftConfig(r=4, positions="f4", dropout=0.5, target_modules=["stream"], intervention="lobireft")
    model = get_peft_model(base, config)
    batch = {"input_ids": torch.arange(30).view(3, 10)}
    plain = base.stream.base_layer(base.embed(batch["input_ids"]))
    assert torch.equal(model.eval()(**batch), plain)
    dropped = model.train()(**batch, prompt_lengths=torch.tensor([10, 10, 10]))
    assert torch.equal(dropped[:, 4:], plain[:, 4:])
    zero = dropped[:, :4] == 0
    assert 0.3 < zero.float().mean() < 0.7
    torch.testing.assert_close(dropped[:, :4][~zero], 2 * plain[:, :4][~zero])


# -- the orthonormal rows of R ----------------------------------------------------------------------------------------


def polar(A: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthonormal rows, by singular values."""
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return U @ Vh


def test_tangent_has_the_gradient_of_the_polar_factor():
    torch.manual_seed(0)
    R = torch.linalg.qr(torch.randn(3, 20, 5, dtype=torch.float64)).Q.mT.contiguous().requires_grad_()
    target = torch.randn_like(R)
    (tangent(R) * target).sum().backward()
    assert torch.equal(tangent(R), R)
    with torch.no_grad():
        for _ in range(10):
            step = 1e-6 * torch.randn_like(R)
            moved = ((polar(R + step) - polar(R - step)) / 2 * target).sum()
            torch.testing.assert_close((R.grad * step).sum(), moved, rtol=1e-6, atol=1e-14)


def test_retract_leaves_orthonormal_rows_alone_and_mends_others():
    torch.manual_seed(0)
    good = torch.linalg.qr(torch.randn(2, 30, 4)).Q.mT.contiguous()
    off = good + 0.1 * torch.randn_like(good)
    deficient = torch.ones(1, 4, 30)
    half = good.to(torch.bfloat16)
    matrices = [good.clone(), off.clone(), deficient.clone(), half.clone()]
    retract(matrices)
    assert torch.equal(matrices[0], good) and torch.equal(matrices[3], half)  # to the bit
    for R, tolerance in zip(matrices, (1e-6, 1e-6, 1e-6, 2e-2)):
        error = (R.float() @ R.float().mT - torch.eye(4)).abs().max()
        assert error < tolerance
    assert (matrices[1] - off).abs().max() < 0.3  # near what it was


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("r, width", [(1, 1), (4, 32), (32, 32), (8, 4096), (256, 1024)])
def test_retracting_twice_is_retracting_once(r, width, dtype):
    torch.manual_seed(0)
    R = torch.randn(2, r, width).to(dtype)
    retract([R])
    once = R.clone()
    retract([R])
    assert torch.equal(R, once)


class ByData(torch.optim.Optimizer):
    """Writes past the version counter of its parameters, as bitsandbytes' optimizers do."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})

    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


# Trainer's default optimizer is the fused AdamW.
OPTIMIZERS = [torch.optim.AdamW, torch.optim.SGD, partial(torch.optim.AdamW, fused=True), ByData]


@pytest.mark.parametrize("copied", [False, True], ids=["", "copied"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_rows_stay_orthonormal_through_training_and_saving(optimizer, copied, tmp_path):
    model = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM")).train()
    if copied:
        model = copy.deepcopy(model)
    base = model.base_model.model
    steps = optimizer((p for p in model.parameters() if p.requires_grad), lr=0.5)
    batch = prompts(8, 6)
    labels = batch["input_ids"].masked_fill(torch.arange(8) < 4, -100)
    R = weight(base.model.layers[1], "R")
    for _ in range(20):
        model(**batch, labels=labels).loss.backward()
        torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)
        steps.step()
        steps.zero_grad()
    off = (R @ R.mT - torch.eye(4)).abs().max()
    assert off > 1e-4  # the last step left the manifold, else this test could not fail
    saved = {key: value for key, value in model.state_dict().items() if ".reft_R." in key}
    assert len(saved) == 3
    for value in saved.values():
        torch.testing.assert_close(value @ value.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_forward_with_the_adapter_off_between_a_forward_and_its_backward(optimizer):
    """Preference training runs its reference so. PEFT freezes the parameters of an adapter that is switched off."""
    model = get_peft_model(build("llama"), ReftConfig(r=4, positions="f2+l2", task_type="CAUSAL_LM")).train()
    steps = optimizer((p for p in model.parameters() if p.requires_grad), lr=0.1)
    batch = labelled(8, 6, prompt=4, seed=0)
    for _ in range(3):
        loss = model(**batch).loss
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        loss.backward()
        steps.step()


def test_weights_are_float32_on_a_16_bit_base_unless_autocast_adapter_dtype_is_off():
    batch = prompts(8)
    for cast, dtype in ((True, torch.float32), (False, torch.bfloat16)):
        base = build("llama").to(torch.bfloat16)
        plain = base(**batch).logits
        model = get_peft_model(base, ReftConfig(r=4), autocast_adapter_dtype=cast)
        assert {p.dtype for n, p in model.named_parameters() if "reft_" in n} == {dtype}
        assert torch.equal(model(**batch).logits, plain)
        randomize(model)
        edited = model(**batch).logits
        assert edited.dtype == torch.bfloat16 and (edited - plain).abs().max() > 0.1


def test_edit_is_computed_in_full_precision_under_autocast():
    torch.manual_seed(0)
    base = Tokenwise()
    model = get_peft_model(base, ReftConfig(r=4, positions="f2+l3", target_modules=["embed"])).eval()
    randomize(model)
    ids = prompts(9, 3)["input_ids"] % 50
    seen = []  # the output of an embedding, which stays float32 under autocast, unlike a matrix product
    base.embed.register_forward_hook(lambda *call: seen.append(call[2]))
    model(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids)
    assert seen[1].dtype == torch.float32
    assert torch.equal(seen[0], seen[1])


def test_dims_of_every_decoder_are_known_by_structure():
    for name in DECODERS:
        model = get_peft_model(build(name), ReftConfig(r=4))
        assert model.peft_config["default"].width == 32


def test_an_R_that_is_cast_through_its_data():
    """TRL does so over a quantized base. No version counter shows it."""
    model = get_peft_model(build("llama"), ReftConfig(r=4, task_type="CAUSAL_LM")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    with torch.no_grad():
        model(**prompts(9, 4))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    with torch.no_grad():
        model(**prompts(9, 4))
    for block in model.base_model.model.model.layers:
        R = weight(block, "R")
        torch.testing.assert_close(R @ R.mT, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)
