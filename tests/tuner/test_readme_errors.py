"""The error messages that the README shows are those that its lines give."""

from __future__ import annotations

import re
import sys

import pytest
import torch
import transformers as t
from models import CHAT_VOCAB, GROUPED, chat_model, tokenizer
from paths import REPOSITORY
from peft import get_peft_model

from peft_reft import ReftConfig


SHOWN = re.findall(
    r"^>>> (.*?)(?: +#.*)?\n(\w+: .*?)(?=\n\n|\n```)", (REPOSITORY / "README.md").read_text(), re.S | re.M
)


def test_the_readme_shows_three():
    assert len(SHOWN) == 3


@pytest.mark.parametrize("line, shown", SHOWN, ids=[line for line, _ in SHOWN])
def test_a_line_of_the_readme_gives_the_error_beneath_it(line, shown, tmp_path, monkeypatch):
    for library in ("axolotl", "trl"):  # the message names the ways of the library that is in use
        monkeypatch.delitem(sys.modules, library, raising=False)
    if line.startswith("model("):
        chat_model().save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        base = t.AutoModelForCausalLM.from_pretrained(tmp_path)
    else:
        base = t.LlamaForCausalLM(t.LlamaConfig(**{**GROUPED, "num_hidden_layers": 30}))
    names = {"ReftConfig": ReftConfig, "get_peft_model": get_peft_model, "base": base}
    if line.startswith("model("):
        names["model"] = get_peft_model(base, ReftConfig(task_type="CAUSAL_LM")).train()
        names["ids"] = torch.arange(8, 28).view(2, 10) % CHAT_VOCAB
    with pytest.raises(ValueError) as error:
        eval(line, names)
    assert f"ValueError: {error.value}" == " ".join(shown.split())
