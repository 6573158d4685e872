"""examples/serving: the server's answers for SmolLM2 with an adapter of the quickstart's kind are those of `generate`,
as examples/compare.py shows them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_reft import ReftConfig


pytest.importorskip("vllm")

from paths import REPOSITORY


pytestmark = pytest.mark.slow

PROMPTS = ["What is the capital of Japan?", "What do bees make?"]


def train(base: str, folder: Path) -> None:
    """Train the quickstart's adapter for one round of its examples: enough for answers that are not the base's."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    layers = [4, 9, 14, 19, 24, 29]
    config = ReftConfig(
        r=4, layers_to_transform=layers, task_type="CAUSAL_LM", response_template="<|im_start|>assistant\n"
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=4e-3)
    for line in (REPOSITORY / "examples" / "quickstart.jsonl").read_text().splitlines():
        messages = json.loads(line)["messages"]
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        model(input_ids=torch.tensor([ids]), labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def test_served_answers_are_those_of_generate(smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY / "examples"))
    import compare

    adapter = tmp_path / "adapter"
    train(smollm2, adapter)
    command = [sys.executable, str(REPOSITORY / "examples" / "serving" / "ask.py"), "--base", smollm2]
    command += ["--adapter", str(adapter), "--max-new-tokens", "16", "--port", "8177", "--log", str(tmp_path / "log")]
    done = subprocess.run([*command, *PROMPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer = AutoTokenizer.from_pretrained(smollm2, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    expected, by_adapter = "", {}
    for prompt in PROMPTS:
        for name, with_adapter in (("base", False), ("reft", True)):
            (text,) = by_adapter[name] = compare.answer(model, tokenizer, [prompt], 16, with_adapter)
            expected += f"{name}: {prompt}\n    {text}\n"
    assert by_adapter["base"] != by_adapter["reft"]
    assert done.stdout == expected
