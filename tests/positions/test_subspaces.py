"""Subspaces: an example trains and runs the directions of its subspaces, as if the adapter had no others."""

from __future__ import annotations

import pytest
import torch
from models import build, prompts, randomize, weight
from peft import PeftModel, get_peft_model

from peft_reft import ReftConfig, ReftLayer
from peft_reft.tuner.interventions.formulas import INTERVENTIONS


SUBSPACES = {"style": 2, "facts": 3, "tone": 1}
DIRECTIONS = {"style": [0, 1], "facts": [2, 3, 4], "tone": [5]}
OPTIONS = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}


def adapted(name: str = "llama", **settings) -> PeftModel:
    settings = {"r": 6, "positions": "f2+l3", "task_type": "CAUSAL_LM", "subspaces": SUBSPACES, **settings}
    model = get_peft_model(build(name), ReftConfig(**settings)).eval()
    randomize(model)
    return model


def layers(model: PeftModel) -> list[ReftLayer]:
    return [module for module in model.modules() if isinstance(module, ReftLayer)]


def only(model: PeftModel, directions: list[int], **settings) -> PeftModel:
    """An adapter with only these directions of another."""
    small = adapted(r=len(directions), subspaces=None, **settings)
    with torch.no_grad():
        for ours, theirs in zip(layers(small), layers(model)):
            for letter in "RWb":
                if "default" in getattr(ours, f"reft_{letter}"):
                    weight(ours, letter).copy_(weight(theirs, letter)[:, directions])
    return small


def logits(model: PeftModel, batch: dict, **more) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, **more).logits


@pytest.mark.parametrize("positions", ["f2+l3", "l1", "all"])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_an_example_runs_its_subspaces_alone(intervention, positions):
    settings = {"intervention": intervention, "positions": positions}
    model, batch = adapted(**settings), prompts(9, 4, 6)
    used = [["facts"], ["tone", "style"], ["style"]]
    together = logits(model, batch, subspaces=["+".join(names) for names in used])
    for row, names in enumerate(used):
        alone = only(model, sorted(direction for name in names for direction in DIRECTIONS[name]), **settings)
        expected = logits(alone, {key: value[row : row + 1] for key, value in batch.items()})[0]
        real = batch["attention_mask"][row].bool()
        torch.testing.assert_close(together[row][real], expected[real], rtol=0, atol=1e-4)


def test_subspaces_are_named_numbered_or_marked():
    model, batch = adapted(), prompts(9, 4)
    by_name = logits(model, batch, subspaces=["facts", "style+tone"])
    marked = torch.tensor([[0, 1, 0], [1, 0, 1]])
    assert torch.equal(logits(model, batch, subspaces=marked), by_name)
    assert torch.equal(logits(model, batch, subspaces=marked.bool()), by_name)
    by_name = logits(model, batch, subspaces=["facts", "style"])
    assert torch.equal(logits(model, batch, subspaces=torch.tensor([1, 0])), by_name)
    same = logits(model, batch, subspaces="tone")
    assert torch.equal(logits(model, batch, subspaces=["tone", "tone"]), same)
    # inference without the argument uses all subspaces
    everything = logits(model, batch)
    assert torch.equal(logits(model, batch, subspaces="style+facts+tone"), everything)
    assert not torch.allclose(everything, same)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
def test_an_example_trains_its_subspaces_alone(positions):
    model = adapted(positions=positions).train()
    batch = prompts(9, 6)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :4] = -100
    model(**batch, labels=labels, subspaces=["style", "tone"]).loss.backward()
    for layer in layers(model):
        for letter in "Wb":
            gradient = weight(layer, letter).grad.abs()
            assert gradient[:, DIRECTIONS["facts"]].max() == 0
            for name in ("style", "tone"):
                assert gradient[:, DIRECTIONS[name]].amax() > 0
        assert weight(layer, "R").grad[:, DIRECTIONS["style"]].abs().max() > 0


def test_packed_rows_have_an_entry_for_each_sequence():
    model = adapted()
    ids = prompts(15)["input_ids"]
    positions = torch.tensor([[*range(6), *range(9)]])
    packed = logits(model, {"input_ids": ids, "position_ids": positions}, subspaces=["facts", "tone"], use_cache=False)
    for part, name in ((slice(0, 6), "facts"), (slice(6, 15), "tone")):
        alone = logits(model, {"input_ids": ids[:, part]}, subspaces=name)
        torch.testing.assert_close(packed[:, part], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", ["f2+l3", "all"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"use_cache": False}, {"num_beams": 2, "num_return_sequences": 2}], ids=str
)
def test_generate(positions, options):
    model = adapted(positions=positions)
    batch = prompts(9, 4, side="left")
    used = ["facts", "style+tone"]
    together = model.generate(**batch, subspaces=used, **options, **OPTIONS)[:, 9:]
    each = options.get("num_return_sequences", 1)
    for row, names in enumerate(used):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = model.generate(input_ids=ids, subspaces=names, **options, **OPTIONS)[:, ids.shape[1] :]
        assert torch.equal(together[row * each : (row + 1) * each], alone)
    assert not torch.equal(together[::each], model.generate(**batch, **OPTIONS)[:, 9:])


def test_subspaces_are_saved(tmp_path):
    model, batch = adapted(), prompts(9, 4)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert list(again.peft_config["default"].subspaces.items()) == list(SUBSPACES.items())  # in their order
    assert torch.equal(logits(again, batch, subspaces="facts"), logits(model, batch, subspaces="facts"))


@pytest.mark.parametrize(
    "given, message",
    [
        ("stile", r"subspaces='stile' names 'stile', which this adapter does not have. It has: style, facts, tone"),
        (["style"], "subspaces has 1 entries, but the batch has 2 sequences"),
        ([1, 2], "subspaces=1 names 1"),
        (torch.tensor([0, 3]), r"numbers outside 0 to 2"),
        (torch.tensor([[1, 0], [0, 1]]), r"subspaces has shape \[2, 2\].*\[2, 3\].*style, facts, tone"),
        (torch.tensor([0.0, 1.0]), r"subspaces has shape \[2\]"),
    ],
)
def test_unknown_subspaces_are_named(given, message):
    with pytest.raises(ValueError, match=message):
        adapted()(**prompts(9, 4), subspaces=given)


def test_training_without_subspaces_and_subspaces_that_no_adapter_has():
    batch = prompts(9, 6)
    labels = batch["input_ids"].clone()
    labels[:, :4] = -100
    with pytest.raises(ValueError, match="does not say which its examples use. Pass subspaces"):
        adapted().train()(**batch, labels=labels)
    for positions in ("f2+l3", "all"):
        plain = adapted(subspaces=None, positions=positions)
        with pytest.raises(ValueError, match="no adapter in use has subspaces"):
            plain(**batch, subspaces="style")
        with pytest.raises(ValueError, match="no adapter in use has subspaces"):
            plain.generate(**batch, subspaces="style", **OPTIONS)
