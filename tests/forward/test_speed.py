"""Speed: work is done once, or not at all, and no such saving changes a result."""

from __future__ import annotations

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from models import blocks, build, labelled, prompts, randomize, weight
from paths import REPOSITORY
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

import peft_reft.tuner.parameters.stacked
import peft_reft.tuner.positions.deferred_checks
from peft_reft import ReftConfig
from peft_reft.tuner.forward.selector import Call, Selector
from peft_reft.tuner.interventions.apply import Edit, EditWeights, Job, _AddToStates, edit_state
from peft_reft.tuner.interventions.formulas import INTERVENTIONS, activation
from peft_reft.tuner.interventions.orthogonal import retracted
from peft_reft.tuner.layer import ReftLayer
from peft_reft.tuner.positions.batch import Batch
from peft_reft.tuner.positions.deferred_checks import Checks
from peft_reft.tuner.positions.selection import Selection, selection_from_masks
from peft_reft.tuner.positions.spec import PositionSpec, Rules
from peft_reft.tuner.positions.template import IdTemplate
from peft_reft.tuner.positions.unedited import UneditedRows


def adapted(name: str = "llama", **settings) -> PeftModel:
    settings = {"r": 4, "positions": "f2+l3", "task_type": "CAUSAL_LM", **settings}
    model = get_peft_model(build(name), ReftConfig(**settings))
    randomize(model)
    return model


# -- no waiting for a device ------------------------------------------------------------------------------------------


class Noted(Checks):
    """On the meta device, where there are no numbers: to read one is an error."""

    def require(self, numbers, error_for):
        self._pending.append(numbers)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("template", [None, IdTemplate((5, 6))])
@pytest.mark.parametrize("given", [{}, {"prompt_lengths": torch.tensor([3, 2])}], ids=["labels", "prompt_lengths"])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_training_step_reads_nothing_back_from_the_device(groups, given, template, optional):
    spec = PositionSpec(first=2, last=2)
    rules = Rules(spec, groups, template=template, template_optional=optional, end_ids=(2, 7))
    checks = Noted(queueing=("meta",))
    selector = Selector(UneditedRows(checks))
    selector._masks_number_sequences = False  # as after the first batch
    batch = {key: tensor.to("meta") for key, tensor in labelled(9, 6, prompt=4, seed=1).items()}
    given = {key: tensor.to("meta") for key, tensor in given.items()}
    tokens = Batch.from_inputs({**batch, **given})
    call = Call("Model", batch, tokens, "", subspaces=None, training=True, generation=None, in_encoder=False)
    selection = selector.select(rules, call)
    assert selection.index_T.is_meta and selection.index_T.numel() == 2 * 2 * 2
    assert len(checks._pending) >= 2  # that there is something to edit, that the mask does not number


def test_the_batch_on_the_meta_device_would_notice_a_read():
    with pytest.raises(Exception, match="meta"):
        bool(torch.ones(3, device="meta").any())


@pytest.fixture
def queueing(monkeypatch):
    """Treat the CPU as a device that works through a queue, with events that have to be waited for."""
    waited = []

    class Event:
        def __init__(self, device):
            self.device = device

        def record(self):
            waited.append("recorded")

        def synchronize(self):
            waited.append("waited")

    monkeypatch.setattr(peft_reft.tuner.positions.deferred_checks.torch, "Event", Event)
    return waited


def on_a_queue(**settings) -> PeftModel:
    model = adapted(**settings).train()
    context = model.base_model._context
    context.state.checks = Checks(queueing=("cpu",))
    context.state.unedited = UneditedRows(context.state.checks)
    context._selector = Selector(context.state.unedited)
    return model


def test_an_empty_batch_on_a_gpu_is_refused_by_the_next_forward(queueing):
    model = on_a_queue()
    batch = labelled(9, 6, prompt=4, seed=1)
    unmasked = {**batch, "labels": batch["input_ids"]}
    model(**unmasked)
    assert set(queueing) == {"recorded"}
    with pytest.raises(ValueError, match="no prompt tokens to edit: no label of -100"):
        model(**batch)
    assert "waited" in queueing
    model(**batch).loss.backward()  # and the next is as good as ever
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**unmasked).loss.backward()
    with pytest.warns(UserWarning, match="2 of 4 rows of training so far had no token to edit"):
        model(**batch)  # a later batch is counted, and no error


def test_or_when_the_adapter_is_saved(queueing, tmp_path):
    model = on_a_queue()
    batch = labelled(9, 6, prompt=4, seed=1)
    model(**{**batch, "labels": batch["input_ids"]})
    with pytest.raises(ValueError, match="no prompt tokens to edit"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_missing_template_on_a_gpu_is_counted_one_forward_later(queueing):
    model = on_a_queue(response_template=[5, 6])
    batch = labelled(9, 9, prompt=4, seed=1)
    batch["input_ids"] = torch.full((2, 9), 9)
    batch["input_ids"][0, 3:5] = torch.tensor([5, 6])
    model(**batch)
    with pytest.warns(UserWarning, match="1 of 2 rows of training .* response_template is not in it"):
        model(**batch)


def test_masks_that_number_only_later_are_refused_on_a_gpu_and_those_that_do_from_the_start_are_read(queueing):
    numbered = {**labelled(8, prompt=2, seed=1), "use_cache": False}
    numbered["attention_mask"] = torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2]])
    numbered["labels"] = numbered["input_ids"].masked_fill(torch.tensor([[1, 1, 0, 0, 1, 1, 0, 0]]).bool(), -100)
    late, early = on_a_queue(), on_a_queue()
    late(**labelled(8, prompt=2, seed=1))
    late(**numbered)
    with pytest.raises(ValueError, match="numbers packed sequences.*position_ids"):
        late(**numbered)
    expected = adapted().train()(**numbered).loss
    torch.testing.assert_close(early(**numbered).loss, expected, rtol=0, atol=0)
    early(**numbered)


# -- nothing in decode steps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions, calls", [("f2+l3", 3), ("all", 3 * 5)])
def test_decode_steps_go_past_the_layers_unless_all_tokens_are_edited(monkeypatch, positions, calls):
    model = adapted(positions=positions).eval()
    counted, forward = [], ReftLayer.forward

    def count(self, *args, **kwargs):
        counted.append(self.name)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ReftLayer, "forward", count)
    model.generate(**prompts(9, 6, side="left"), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(counted) == calls


def test_who_listens_to_a_layer_hears_of_decode_steps_too():
    model = adapted().eval()
    heard = []
    blocks(model)[1].register_forward_hook(lambda *_: heard.append(1))
    model.generate(**prompts(9), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert len(heard) == 5


def test_a_layer_that_is_not_in_the_plan_of_a_forward_is_an_error():
    model = adapted().eval()
    context, block = model.base_model._context, blocks(model)[1]
    context.state.call.jobs = {}  # as while an encoder runs whose call was not noticed
    try:
        with pytest.raises(RuntimeError, match="ran without a Selection"):
            block(
                torch.zeros(1, 9, 32),
                position_embeddings=model.get_base_model().model.rotary_emb(torch.zeros(1), torch.arange(9)[None]),
            )
    finally:
        context.state.call.clear()


def replicated(module: torch.nn.Module) -> torch.nn.Module:
    """A copy as `torch.nn.DataParallel` makes it for a further device: its parameters are tensors of the graph."""
    replica = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        setattr(replica, name, replicated(child))
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.clone())
    return replica


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_replicas_of_data_parallel_read_their_own_weights(positions):
    batch = labelled(9, 6, prompt=4, seed=1)
    model, expected = adapted(positions=positions).train(), adapted(positions=positions).train()
    expected(**batch).loss.backward()
    replica = replicated(model.get_base_model())
    with torch.no_grad():  # what a replica must not read
        saved = [weight(block, "W").clone() for block in blocks(model)]
        for block in blocks(model):
            weight(block, "W").zero_()
    loss = replica(**batch).loss
    with torch.no_grad():
        for block, W in zip(blocks(model), saved):
            weight(block, "W").copy_(W)
    loss.backward()
    for one, other in zip(model.parameters(), expected.parameters()):
        if other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


def test_a_forward_between_two_generations_is_no_decode_step():
    model, batch = adapted().eval(), prompts(9)
    before = model(**batch).logits
    model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert torch.equal(model(**batch).logits, before)


# -- weights that are prepared once -----------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch):
    """How often weights are prepared for inference."""
    calls, plain = [], peft_reft.tuner.parameters.stacked._stack_without_graph

    def count(layers):
        calls.append(layers[0].adapter_name)
        return plain(layers)

    monkeypatch.setattr(peft_reft.tuner.parameters.stacked, "_stack_without_graph", count)
    return calls


@torch.no_grad()
def test_weights_are_prepared_once_for_inference_and_adapters_are_switched_without(prepared):
    model = adapted(positions="all").eval()
    model.add_adapter("other", ReftConfig(r=2, positions="f1", task_type="CAUSAL_LM"))
    batch = prompts(9)
    for _ in range(3):
        for name in ("default", "other"):
            model.set_adapter(name)
            model(**batch)
            model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert prepared == ["default", "other"]


def write(model, how):
    W = weight(blocks(model)[1], "W")
    if how == "in place":
        with torch.no_grad():
            W.add_(0.5)
    elif how == "data, then eval()":
        W.data.add_(0.5)
        model.eval()
    elif how == "replaced":
        blocks(model)[1].reft_W["default"] = torch.nn.Parameter(W.detach() + 0.5)
    elif how == "cast by its data":
        W.data = W.data + 0.5
        model.to(torch.float32)
    elif how == "loaded":
        state = get_peft_model_state_dict(model)
        set_peft_model_state_dict(model, {k: v + 0.5 * ("layers.1.reft_W" in k) for k, v in state.items()})
    else:
        W.grad = -torch.ones_like(W)  # of W alone: a step of R is noticed by itself
        torch.optim.SGD([W], lr=0.5, fused=how == "fused step").step()


@pytest.mark.parametrize(
    "how", ["in place", "data, then eval()", "replaced", "cast by its data", "loaded", "step", "fused step"]
)
@torch.no_grad()
def test_changed_weights_are_prepared_anew(how):
    model, batch = adapted().eval(), prompts(9, 6)
    before = model(**batch).logits
    write(model, how)
    fresh = adapted().eval()
    write(fresh, "in place")
    assert not torch.allclose(model(**batch).logits, before)
    torch.testing.assert_close(model(**batch).logits, fresh(**batch).logits, rtol=1e-5, atol=1e-5)


def test_what_a_thread_prepares_while_another_makes_a_step_is_not_kept(monkeypatch):
    model = adapted().eval()
    context, plain = model.base_model._context, peft_reft.tuner.parameters.stacked._stack_without_graph

    def overtaken(layers):
        found = plain(layers)
        context.forget_weights()
        return found

    monkeypatch.setattr(peft_reft.tuner.parameters.stacked, "_stack_without_graph", overtaken)
    with torch.no_grad():
        model(**prompts(9))
        monkeypatch.undo()
        weight(blocks(model)[0], "W").data.add_(1.0)  # as a fused step writes: without a trace
        fresh = copy.deepcopy(model)
        assert torch.equal(model(**prompts(9)).logits, fresh(**prompts(9)).logits)


def test_a_model_copied_or_put_in_inference_mode_trains_on():
    model, batch = adapted(), labelled(9, 6, prompt=4, seed=1)
    with torch.inference_mode():
        model.eval()(**batch)
    assert model(**batch).logits.requires_grad
    model.train()(**batch).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_a_bfloat16_base_is_edited_in_bfloat16_when_nothing_is_trained():
    model = get_peft_model(build("llama").to(torch.bfloat16), ReftConfig(r=4, positions="f2+l3")).eval()
    randomize(model)
    batch = prompts(9, 6)
    narrow = model(**batch).logits.float()
    (entry,) = model.base_model._context.state.weights._entries.values()
    assert next(iter(entry[-1]._in_bfloat16.values())).R_QD.dtype == torch.bfloat16
    wide = copy.deepcopy(model).float()(**batch).logits
    assert torch.nn.functional.cosine_similarity(narrow.flatten(), wide.flatten(), dim=0) > 0.999
    assert weight(blocks(model)[0], "R").dtype == torch.float32


# -- the graph --------------------------------------------------------------------------------------------------------


def nodes(output: torch.Tensor) -> list[str]:
    """The names of all nodes of a graph."""
    seen, names, todo = set(), [], [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            names.append(node.name())
            todo += [following for following, _ in node.next_functions]
    return names


def test_the_hidden_state_is_written_to_without_copies_of_its_gradient():
    batch = labelled(9, 6, prompt=4, seed=1)
    base = build("llama").train().requires_grad_(False)
    base.enable_input_require_grads()
    names, of_base = nodes(adapted().train()(**batch).loss), nodes(base(**batch).loss)
    assert "IndexPutBackward0" in names and not any("CopySlices" in name for name in names)
    assert sum("Clone" in name for name in names) <= sum("Clone" in name for name in of_base)
    assert sum("Tangent" in name for name in names) == 1  # for all layers


def test_little_is_kept_for_backward_beside_what_the_base_keeps():
    def stored(model):
        sizes = []
        batch = labelled(64, 64, 64, 64, prompt=40, seed=1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(**batch, use_cache=False)
        return sum(sizes)

    base = build("llama").train().requires_grad_(False)
    base.enable_input_require_grads()
    assert stored(adapted().train()) < 1.05 * stored(base)


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_backward_stops_at_the_first_edited_layer(checkpointing):
    batch = labelled(9, 6, prompt=4, seed=1)
    needed, gradients = {}, {}
    for asked in (False, True):
        model = adapted(layers_to_transform=[2]).train()
        base = model.get_base_model()
        if asked and checkpointing is None:
            base.enable_input_require_grads()
        elif asked:
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
        states = []
        for block in base.model.layers[:2]:
            block.register_forward_hook(lambda m, args, output, states=states: states.append(output.requires_grad))
        model(**batch).loss.backward()
        needed[asked] = any(states)
        gradients[asked] = [p.grad for p in model.parameters() if p.grad is not None]
    assert not needed[False]
    assert needed[True] == (checkpointing == {"use_reentrant": True}), "reentrant checkpointing alone needs it"
    assert len(gradients[True]) == 3
    torch.testing.assert_close(gradients[True], gradients[False])


def test_gradients_that_are_asked_for_below_the_first_edited_layer_are_given():
    batch = labelled(9, 6, prompt=4, seed=1)
    trained = batch["input_ids"][0, :2].tolist()
    model = adapted(layers_to_transform=[2], trainable_token_indices=trained).train()
    model.get_base_model().enable_input_require_grads()
    model(**batch).loss.backward()
    (tokens,) = (p.grad for n, p in model.named_parameters() if "trainable_tokens" in n and p.requires_grad)
    assert tokens is not None and tokens.abs().sum() > 0
    model = adapted(layers_to_transform=[2]).train()
    model.get_base_model().enable_input_require_grads()
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    model(inputs_embeds=embeds, **batch).loss.backward()
    assert embeds.grad is not None and embeds.grad.abs().sum() > 0


# -- gradients and retraction -----------------------------------------------------------------------------------------


def selection(groups: int) -> Selection:
    index = torch.tensor([[0, 5, 5], [3, 7, 7]])[:groups]
    empty = torch.tensor([[False, False, True], [False, False, False]])[:groups]
    if groups == 2:
        index[1, 2] = 8
    return Selection.of_slots(torch.zeros(2, 5, dtype=torch.bool), index, empty)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("act_fn", [None, "gelu"])
@pytest.mark.parametrize("name", INTERVENTIONS)
def test_gradcheck(name, act_fn, groups):
    intervention, act = INTERVENTIONS[name], activation(act_fn)
    if act and not intervention.has_source:
        pytest.skip("no activation in this edit")
    torch.manual_seed(0)
    h = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    R, W = (torch.randn(groups, 2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    b = torch.randn(groups, 2, dtype=torch.float64, requires_grad=True)

    def edited(h, R, W, b):
        edit = Edit(intervention, act)
        weights = EditWeights.of(edit, R, W if intervention.has_source else None, b)
        job = Job("layer", "default", edit, selection(groups), None, weights, None)
        return edit_state(h * 1.0, [job], lambda name: (R, W, b), writable=True)

    assert torch.autograd.gradcheck(edited, (h, R, W, b))


def test_gradcheck_of_the_write_that_gpus_use():
    index = torch.tensor([0, 7, 7, 3])
    h = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    delta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda h, delta: _AddToStates.apply(h * 1.0, index, delta), (h, delta))
    assert torch.autograd.gradgradcheck(lambda h, delta: _AddToStates.apply((h * h), index, delta * delta), (h, delta))
    plain = h.detach().clone()
    for position, row in zip(index, delta.detach()):
        plain.view(-1, 3)[position] += row
    torch.testing.assert_close(_AddToStates.apply(h * 1.0, index, delta).detach(), plain)


def dependent(kind: str, rank: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    R = torch.randn(2, rank, width, generator=generator)
    match kind:
        case "zero":
            return torch.zeros_like(R)
        case "equal rows":
            return R[:, :1].expand_as(R).contiguous()
        case "half the rank":
            return R[:, :, : rank // 2] @ R[:, : rank // 2]
        case "a zero row":
            return R.index_fill(1, torch.tensor([1]), 0.0)
        case "rows of all sizes":
            return R * torch.logspace(-25, 15, rank)[:, None]
        case "minus the unit vectors":
            return -1e-4 * torch.eye(rank, width).expand_as(R).contiguous()
        case "nearly equal rows":
            return R[:, :1] + 1e-5 * R


KINDS = [
    "zero",
    "equal rows",
    "half the rank",
    "a zero row",
    "rows of all sizes",
    "minus the unit vectors",
    "nearly equal rows",
]


@pytest.mark.parametrize("rank, width", [(8, 8), (8, 64), (64, 8192)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_parameter_becomes_orthonormal(kind, rank, width):
    (R,) = retracted([dependent(kind, rank, width)])
    off = (R.double() @ R.double().mT - torch.eye(rank, dtype=torch.float64)).abs().max()
    assert off < 2e-6  # the bar is 1e-5
    assert torch.equal(retracted([R])[0], R)


def test_independent_rows_become_those_of_gram_and_schmidt():
    R = torch.randn(3, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = R.clone()
    for n in range(3):
        for i in range(5):
            for j in range(i):
                expected[n, i] -= (expected[n, i] @ expected[n, j]) * expected[n, j]
            expected[n, i] /= expected[n, i].norm()
    torch.testing.assert_close(retracted([R])[0], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(retracted([R.float()])[0], expected.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_thousand_steps_at_a_large_learning_rate(fused, tmp_path):
    torch.manual_seed(0)
    model = adapted().train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3, fused=fused)
    batch = labelled(6, 5, prompt=3, seed=1)
    for _ in range(1000):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    for block, again in zip(blocks(model), blocks(loaded)):
        R = weight(block, "R").detach()
        assert (R @ R.mT - torch.eye(4)).abs().max() < 1e-5
        assert torch.equal(weight(again, "R"), R)


# -- the benchmarks ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_benchmark_runs_as_a_user_runs_it(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "step", "--pairs", "2", "--out", str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "reft" in run.stdout and "lora" in run.stdout and (tmp_path / "step.json").is_file()


def test_every_slot_filled_or_not_gives_the_same_edit():
    """Where it is known that no slot is empty, nothing is masked."""
    first = torch.zeros(2, 5, dtype=torch.bool).index_fill(1, torch.tensor([0, 4]), True)
    last = torch.zeros_like(first)
    assert selection_from_masks(first, last, 1, limit=4).unused_TGR is None
    assert selection_from_masks(first, last, 1, limit=5).unused_TGR is not None
    model = adapted(share_weights=True, positions="f2+l2").eval()
    one, two = prompts(9), prompts(9, 3)  # the second leaves a slot empty
    torch.testing.assert_close(model(**one).logits[0], model(**two).logits[0], rtol=1e-5, atol=1e-5)
