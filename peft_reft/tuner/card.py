"""The model card of a saved adapter: what it is, and a snippet that loads it.

PEFT, TRL, transformers and axolotl each write a README.md of their own, none of which names the package that ReFT
needs. This module adds a section to whatever card there is, or makes a card. A save renews the section, unless
somebody edited it; the rest of a card is left as it is, but for tags that are added.
"""

from __future__ import annotations

import json
import os
import re
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData
from safetensors import safe_open

from .chat_template import AUTO
from .peft_api import SAFETENSORS_WEIGHTS_NAME
from .positions.spec import PositionSpec
from .versions import installed


CARD = "README.md"
TAG = "reft"
# PEFT's Auto classes, by task type.
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
# The number in the first line is a checksum of the section: an edited section has another.
BEGIN = "<!-- peft_reft {}: written by peft_reft. A save renews it, unless it was edited. -->"
END = "<!-- peft_reft: end -->"
SECTION = re.compile(r"<!-- peft_reft (\w+): [^\n]*-->\n(.*?)\n<!-- peft_reft: end -->", re.DOTALL)
CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")  # the tasks whose base is made for a number of labels
# A trained head of a classifier in an adapter's file, whose rows are the labels.
HEAD = re.compile(r"\b(?:score|classifier|out_proj)\.weight$")

REFERENCE = """```bibtex
@article{wu2024reft,
  title   = {{ReFT}: Representation Finetuning for Language Models},
  author  = {Wu, Zhengxuan and Arora, Aryaman and Wang, Zheng and Geiger, Atticus and Jurafsky, Dan and
             Manning, Christopher D. and Potts, Christopher},
  journal = {arXiv preprint arXiv:2404.03592},
  year    = {2024}
}
```"""


class Config(Protocol):
    """The fields of a ReftConfig that this module reads."""

    base_model_name_or_path: str | None
    task_type: Any
    intervention: str
    positions: str
    r: int
    rank_pattern: dict[str, int]
    response_template: str | list[int] | None
    response_template_optional: bool

    @property
    def spec(self) -> PositionSpec: ...


def introduce(
    folder: str | os.PathLike, config: Config, adapter: str | None = None, weights: str | os.PathLike | None = None
) -> None:
    """Write the section about ReFT into the model card of a folder, and make the card if there is none.

    Whatever goes wrong is a warning: a card is never the reason for a lost training run.

    Args:
        folder (`str` or `os.PathLike`): The folder of the card.
        config (`ReftConfig`): The config of the adapter.
        adapter (`str`, *optional*): What the snippet loads: a name on the Hub, or a path seen from the folder. None:
            the folder itself.
        weights (`str` or `os.PathLike`, *optional*): The folder of the adapter's weights. None: the card's.
    """
    try:
        path = Path(folder, CARD)
        card = ModelCard.load(path) if path.exists() else _new_card(config)
        data: Any = card.data
        tags = [*(data.tags or [])]
        data.tags = [*tags, *(tag for tag in (TAG, config.intervention) if tag not in tags)]
        shapes = _shapes(Path(weights or folder, SAFETENSORS_WEIGHTS_NAME))
        card.text = _with_section(card.text, _section(config, adapter or ".", shapes))
        card.save(path)
    except Exception as error:
        warnings.warn(f"The model card in {os.fspath(folder)!r} says nothing of ReFT: {type(error).__name__}: {error}")


def _new_card(config: Config) -> ModelCard:
    """A card with metadata as PEFT writes it, and a title."""
    base = config.base_model_name_or_path
    data = ModelCardData(library_name="peft", base_model=base or None)
    if config.task_type == "CAUSAL_LM":
        data.pipeline_tag = "text-generation"
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# A ReFT adapter{f' for {base}' if base else ''}\n")


def _with_section(text: str, section: str) -> str:
    """The text of a card with the section: in the place of an earlier one, else before the first heading after the
    title. A section that somebody edited stays."""
    written = f"{BEGIN.format(_checksum(section))}\n{section}\n{END}"
    earlier = SECTION.search(text)
    if earlier:
        edited = _checksum(earlier[2]) != earlier[1]
        return text if edited else text[: earlier.start()] + written + text[earlier.end() :]
    lines, fence = text.splitlines(), False
    for index, line in enumerate(lines):
        if line.lstrip().startswith("```"):
            fence = not fence
        elif not fence and line.startswith("## "):
            return "\n".join([*lines[:index], written, "", *lines[index:]])
    return "\n".join([*lines, "", written, ""])


def _checksum(section: str) -> str:
    return f"{zlib.crc32(section.encode()):08x}"


def _shapes(weights: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in an adapter's file, by name. Empty, where there is no such file."""
    if not weights.exists():
        return {}
    with safe_open(weights, framework="pt") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def _section(config: Config, adapter: str, shapes: dict[str, list[int]]) -> str:
    base = config.base_model_name_or_path
    rows = {
        "edit": f"`{config.intervention}`",
        "positions": f"`{config.positions}`: {_words(config.spec)}",
        "answers begin after": _template(config),
        "rank": f"{config.r}" + ("; others by `rank_pattern`" if config.rank_pattern else ""),
        "parameters": f"{sum(_size(shape) for shape in shapes.values()):,}" if shapes else "",
        "made with": f"peft-reft {installed('peft-reft')}, PEFT {installed('peft')}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    of_base = f" for `{base}`" if base else ""
    return f"""## How to use this ReFT adapter

This is a [ReFT](https://arxiv.org/abs/2404.03592) adapter{of_base}, in PEFT's format. The weights of the base model
stay as they are; the hidden states of a few tokens are edited.

```bash
pip install peft-reft
```

```python
{_snippet(config, adapter, shapes)}
```

| | |
| --- | --- |
{table}

The method's paper:

{REFERENCE}"""


def _words(spec: PositionSpec) -> str:
    if spec.all_tokens:
        return "every token"
    sides = [f"the {side} {count}" for side, count in (("first", spec.first), ("last", spec.last)) if count]
    tokens = "token" if max(spec.first, spec.last) == 1 and not spec.two_sided else "tokens"
    return f"{' and '.join(sides)} {tokens} of the prompt"


def _template(config: Config) -> str:
    """The response template, as a cell of a table in Markdown."""
    template = config.response_template
    if template in (None, AUTO) or config.spec.all_tokens:
        return ""
    return f"`{template!r}`".replace("|", "\\|") if isinstance(template, str) else f"the token ids `{template}`"


def _size(shape: list[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _snippet(config: Config, adapter: str, shapes: dict[str, list[int]]) -> str:
    """Python code that loads the adapter and uses it."""
    task = getattr(config.task_type, "value", config.task_type)
    auto_class = AUTO_CLASSES.get(task, "AutoPeftModel")
    labels = labels_of_head(shapes) if task in CLASSIFIES else None
    options = "" if labels is None else f", num_labels={labels}"
    here = "  # the folder of this card, or its name on the Hub" if adapter == "." else ""
    lines = [
        "import peft_reft  # makes PEFT know ReFT",
        f"from peft import {auto_class}",
        "from transformers import AutoTokenizer",
        "",
        f"adapter = {json.dumps(adapter)}{here}",
        f"model = {auto_class}.from_pretrained(adapter{options}).eval()",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(config.base_model_name_or_path or 'the base model')})",
    ]
    if task not in AUTO_CLASSES:
        return "\n".join(lines)
    lines += ["", *_inputs(config, generates := task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))]
    if not generates:
        return "\n".join([*lines, "print(model(**inputs))"])
    answer = "output[0]" if task == "SEQ_2_SEQ_LM" else 'output[0, inputs["input_ids"].shape[1] :]'
    lines += [
        "output = model.generate(**inputs, max_new_tokens=64)",
        f"print(tokenizer.decode({answer}, skip_special_tokens=True))",
    ]
    return "\n".join(lines)


def _inputs(config: Config, generates: bool) -> list[str]:
    """Lines of the snippet that make inputs in the form that the adapter was trained on, as far as its config says."""
    template, text = config.response_template, "Name a colour of the sky."
    to_model = ".to(model.device)"
    if generates and template not in (None, AUTO) and config.response_template_optional:  # of the chat template
        return [
            f'messages = [{{"role": "user", "content": {json.dumps(text)}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            f"){to_model}",
        ]
    prompt = json.dumps(text)
    if generates and isinstance(template, str) and template != AUTO:
        prompt = json.dumps(f"{text}\n{template}")
    elif generates and isinstance(template, list):
        prompt = f"{prompt} + tokenizer.decode({template})"
    return [f'inputs = tokenizer({prompt}, return_tensors="pt"){to_model}']


def labels_of_head(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """The number of labels of the trained head in an adapter's file, which the base needs a head of the size of.

    Args:
        shapes (`Mapping[str, Sequence[int]]`): The shapes of the file's tensors, by name.

    Returns:
        `int`, *optional*: The number. None: the file has no head.
    """
    sizes = [shape[0] for name, shape in shapes.items() if HEAD.search(name) and "reft_" not in name]
    return sizes[-1] if sizes else None
