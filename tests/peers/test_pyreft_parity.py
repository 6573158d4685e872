"""The numbers of pyreft 0.1.0, for every edit, tied and untied: logits, loss, gradients and greedy tokens.

tests/data/pyreft holds them, with the base model that they were made with; reference.json describes them.
"""

from __future__ import annotations

import json

import paths
import pytest
import torch
from models import weight
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from peft_reft import ReftConfig


DATA = paths.DATA / "pyreft"
REFERENCE = json.loads((DATA / "reference.json").read_text())
CASES = {case["name"]: case for case in REFERENCE["cases"]}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return load_file(DATA / "reference.safetensors")


def adapted(case: dict, numbers: dict[str, torch.Tensor]) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(DATA / "base")
    config = ReftConfig(
        r=REFERENCE["rank"],
        positions=REFERENCE["positions"],
        layers_to_transform=REFERENCE["layers"],
        intervention=case["intervention"],
        share_weights=case["share_weights"],
        act_fn=case["act_fn"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    for index in REFERENCE["layers"]:
        for letter in "RWb":
            value = numbers.get(f"{case['name']}.layer{index}.{letter}")
            ours = getattr(base.model.layers[index], f"reft_{letter}")
            assert ("default" in ours) == (value is not None)
            if value is not None:
                with torch.no_grad():
                    ours["default"].copy_(value)
    return model


def test_there_is_a_case_for_every_edit_tied_and_untied():
    assert {(case["intervention"], case["share_weights"]) for case in CASES.values()} == {
        (name, tied)
        for name in ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
        for tied in (True, False)
    }


@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(name, numbers):
    model = adapted(CASES[name], numbers).train()
    output = model(**{key: numbers[key] for key in ("input_ids", "attention_mask", "labels")})
    output.loss.backward()

    close = {"rtol": 0, "atol": TOLERANCE}
    torch.testing.assert_close(output.logits, numbers[f"{name}.logits"], **close)
    torch.testing.assert_close(output.loss[None], numbers[f"{name}.loss"], **close)
    assert (output.logits - numbers["base.logits"]).abs().max() > 0.1  # the edits change the output
    compared = 0
    for index in REFERENCE["layers"]:
        for letter in "Wb":
            gradient = numbers.get(f"{name}.layer{index}.grad_{letter}")
            if gradient is not None:
                block = model.base_model.model.model.layers[index]
                torch.testing.assert_close(weight(block, letter).grad, gradient, **close)
                compared += 1
    assert compared >= len(REFERENCE["layers"])


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(name, numbers):
    model = adapted(CASES[name], numbers).eval()
    for row in range(2):
        expected = numbers[f"{name}.generate{row}"]
        prompt = numbers["input_ids"][row : row + 1, : int(numbers["prompt_lengths"][row])]
        new_tokens = expected.shape[1] - prompt.shape[1]
        generated = model.generate(input_ids=prompt, max_new_tokens=new_tokens, do_sample=False)
        assert generated.tolist() == expected.tolist()
