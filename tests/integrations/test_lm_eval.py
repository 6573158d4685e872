"""The lm-evaluation-harness with ReFT: likelihoods are those of generating the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from models import chat_model, randomize, tokenizer
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from peft_reft import ReftConfig


pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import peft_reft.integrations.lm_eval as integration


# Neither % nor ! is in the tokenizer's training text, so each is a token by itself.
REQUESTS = [
    ("Name a colour%\n", "%Blue, I think"),
    ("Name a colour%\n", "%Blue, I thin!"),
    ("Name a colour%\n", "%Blue, I thin%"),  # differs from the one before in the last token only
    ("Name a colour%\n%Blue", "!"),  # the same tokens, cut elsewhere
    ("Name a colour%\n%Blue", "! I think"),
    ("Name a", "%colour"),
    ("What is the answer? The answer is not", "%known"),
    ("", "The answer"),
]


def harness(batch_size: int = 3, **settings) -> HFLM:
    model = get_peft_model(chat_model(), ReftConfig(r=2, task_type="CAUSAL_LM", **{"positions": "f2+l2", **settings}))
    randomize(model)
    return HFLM(pretrained=model.eval(), tokenizer=tokenizer(), batch_size=batch_size, max_length=64)


def likelihoods(lm: HFLM, requests: list[tuple[str, str]]) -> list[float]:
    instances = [Instance("loglikelihood", {}, request, number) for number, request in enumerate(requests)]
    return [value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)]


def by_hand(lm: HFLM, context: str, continuation: str, told: bool = True) -> float:
    """A sequence whose edited tokens are given by its mask: 1 for a first token, 2 for a last one."""
    tokens = tokenizer()
    prompt = tokens(context)["input_ids"] or [lm.prefix_token_id]
    whole = tokens(context + continuation)["input_ids"] if context else prompt + tokens(continuation)["input_ids"]
    assert whole[: len(prompt)] == prompt
    mask = torch.zeros(1, len(whole), dtype=torch.long)
    end = len(prompt) if told else len(whole)
    some = min(2, end // 2)
    mask[0, :some], mask[0, end - some : end] = 1, 2
    ids = torch.tensor([whole])
    with torch.no_grad():
        logits = lm.model(input_ids=ids, intervention_mask=mask).logits.log_softmax(-1)
    scored = len(tokens(context.rstrip())["input_ids"]) or 1  # the harness scores spaces at the end of a context, too
    return logits[0, scored - 1 : -1].gather(1, ids[0, scored:, None]).sum().item()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_likelihoods(batch_size):
    lm = harness(batch_size)
    expected = [by_hand(lm, *request) for request in REQUESTS]
    assert likelihoods(lm, REQUESTS) == pytest.approx(expected, abs=1e-4)
    untold = [by_hand(lm, *request, told=False) for request in REQUESTS]
    assert all(abs(one - other) > 0.01 for one, other in zip(expected, untold))


def test_without_the_integration_the_wrong_tokens_are_edited(monkeypatch):
    """The reason for the patch: if this fails, the harness passes prompts itself and the patch can go."""
    lm = harness()
    monkeypatch.setattr(integration, "rules_in_use", lambda model: [])
    expected = [by_hand(lm, *request) for request in REQUESTS]
    assert likelihoods(lm, REQUESTS) != pytest.approx(expected, abs=1e-2)


def test_templates():
    lm = harness(response_template=tokenizer()("!")["input_ids"])
    context = "Name a colour! What is the answer! The answer"
    with_template, without = likelihoods(lm, [(context, "%I think"), REQUESTS[0]])
    assert without == pytest.approx(by_hand(lm, *REQUESTS[0]), abs=1e-4)
    # the template ends the prompt at the first !, for likelihoods as in generation
    ids = torch.tensor([tokenizer()(context + "%I think")["input_ids"]])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits.log_softmax(-1)
    scored = len(tokenizer()(context.rstrip())["input_ids"])
    assert with_template == pytest.approx(
        logits[0, scored - 1 : -1].gather(1, ids[0, scored:, None]).sum().item(), abs=1e-4
    )


def test_adapters_that_need_no_prompt():
    lm = harness(positions="all")
    ids = torch.tensor([tokenizer()("What?% The answer")["input_ids"]])
    with torch.no_grad():
        logits = lm.model(input_ids=ids).logits.log_softmax(-1)
    scored = len(tokenizer()("What?")["input_ids"])
    expected = logits[0, scored - 1 : -1].gather(1, ids[0, scored:, None]).sum().item()
    assert likelihoods(lm, [("What?", "% The answer")]) == pytest.approx([expected], abs=1e-4)
    assert lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("What?",), 0)], disable_tqdm=True)[0] < 0


def test_perplexity_is_refused():
    lm = harness()
    rolling = [Instance("loglikelihood_rolling", {}, ("What?",), 0)]
    with pytest.raises(ValueError, match=r"positions='f2\+l2'.*loglikelihood_rolling.*positions='all'"):
        lm.loglikelihood_rolling(rolling, disable_tqdm=True)
    with lm.model.disable_adapter():
        assert lm.loglikelihood_rolling(rolling, disable_tqdm=True)[0] < 0


def test_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--help"])
    with pytest.raises(SystemExit):
        integration.main()
    assert "lm-eval" in capsys.readouterr().out


@pytest.mark.slow
def test_the_harness_is_told_in_a_process_that_knows_nothing_of_reft(tmp_path):
    """Its Python API with `peft=`, without an import of peft_reft or of the integration."""
    chat_model().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, ReftConfig(r=2, positions="f2+l2", task_type="CAUSAL_LM"))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    base, adapter = str(tmp_path / "base"), str(tmp_path / "adapter")
    code = f"""
import sys, json
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
assert "peft_reft" not in sys.modules and "peft" not in sys.modules
lm = HFLM(pretrained={base!r}, peft={adapter!r}, dtype="float32", device="cpu", batch_size=3)
requests = json.loads({json.dumps(REQUESTS)!r})
instances = [Instance("loglikelihood", {{}}, tuple(one), number) for number, one in enumerate(requests)]
print(json.dumps([value for value, _ in lm.loglikelihood(instances, disable_tqdm=True)]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lm = HFLM(pretrained=model.eval(), tokenizer=tokenizer(), batch_size=3, max_length=64)
    expected = [by_hand(lm, *request) for request in REQUESTS]
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(expected, abs=1e-4)
