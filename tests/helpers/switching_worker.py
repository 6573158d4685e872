"""Runs the code blocks of docs/switching.md for pyreft or adapters, in that library's own environment. Started by
tests/peers/test_switching.py.

    python tests/helpers/switching_worker.py pyreft|adapters blocks.json results.json

blocks.json: the code blocks, a list of texts. results.json: numbers of trained parameters, the names that the page has
to explain, and measurements of the behaviour that the page describes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers as t
from models import build, chat_model, tokenizer


PROMPTS = ["user: What is the answer?", "user: Name a colour, and another one."]
ANSWERS = [" It is 4.", " Blue."]


def given(dtype: torch.dtype) -> dict[str, Any]:
    """The names that the page's code blocks use without defining them."""
    args = t.TrainingArguments("out", max_steps=2, use_cpu=True, save_strategy="no", report_to=[], disable_tqdm=True)
    tokens = tokenizer()
    tokens.model_max_length = 128  # where pyreft truncates
    tokens.model_input_names = ["input_ids", "attention_mask"]  # as a Llama's tokenizer has them
    known = {"tokenizer": tokens, "args": args, "prompts": PROMPTS, "answers": ANSWERS}
    examples = [tokenizer()(prompt + answer) for prompt, answer in zip(PROMPTS, ANSWERS)]
    known["dataset"] = [{"input_ids": one["input_ids"], "labels": one["input_ids"]} for one in examples]
    known["collator"] = t.DataCollatorForSeq2Seq(tokenizer())
    return known | {"model": chat_model().to(dtype), "classifier": build("roberta").to(dtype)}


def trained(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def last_place_of_a_dataset() -> int:
    """The last token that pyreft's datasets edit, counted from the end of the prompt: -1 would be its last token."""
    import datasets
    import pyreft

    known = given(torch.float32)
    made = pyreft.ReftGenerationDataset(
        "none",
        None,
        known["tokenizer"],
        dataset=datasets.Dataset.from_list([{"prompt": PROMPTS[0], "answer": ANSWERS[0]}]),
        position="l2",
        prompt_field="prompt",
        completion_field="answer",
        num_interventions=1,
    )[0]
    padded = 1  # the pad token that pyreft puts in front
    return made["intervention_locations"][0][-1] - padded - len(tokenizer()(PROMPTS[0])["input_ids"])


def gradient(positions: list[int]) -> torch.Tensor:
    """The gradient of pyreft's W with a list of positions."""
    import pyreft

    torch.manual_seed(0)
    edit = pyreft.LoreftIntervention(embed_dim=32, low_rank_dimension=2, dtype=torch.float32)
    representation = {"layer": 1, "component": "block_output", "low_rank_dimension": 2, "intervention": edit}
    model = pyreft.get_reft_model(chat_model(), pyreft.ReftConfig(representations=[representation]))
    batch = tokenizer()(PROMPTS[:1], return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    locations = {"sources->base": (None, [[positions]])}
    model(inputs, unit_locations=locations, labels=inputs["input_ids"])[1].loss.backward()
    return edit.learned_source.weight.grad


def continued(use_cache: bool, **positions: int) -> list[int] | str:
    """The tokens that the adapters library generates with random edits, or its error's message."""
    import adapters

    model = chat_model()
    adapters.init(model)
    model.add_adapter("reft", config=adapters.LoReftConfig(r=4, **positions))
    model.set_active_adapters("reft")
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "learned_source" in name:
            parameter.data.normal_(0, 1, generator=generator)
    batch = tokenizer()(PROMPTS[:1], return_tensors="pt")
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    try:
        tokens = model.eval().generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use_cache)
    except (IndexError, RuntimeError) as error:
        return str(error)
    return tokens[0].tolist()


def main() -> None:
    peer, blocks, target = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    # pyreft makes W and b bfloat16 by default, which fails with a float32 base.
    known: dict[str, Any] = {}
    for block in blocks:
        known |= given(torch.bfloat16 if peer == "pyreft" else torch.float32)
        exec(compile(block, "docs/switching.md", "exec"), known)
        if peer == "adapters":
            known["adapted"] = known["model"]
    if peer == "pyreft":
        import pyreft

        count = pyreft.ReftModel.count_parameters
        results = {
            "model": count(known["reft_model"], include_model=False),
            "classifier": count(known["reft_classifier"], include_model=False),
            "steered": known["steered"].shape[1] - known["prompt"]["input_ids"].shape[1],
            "last place": last_place_of_a_dataset(),
            "twice": (gradient([3, 3]) / gradient([3])).median().item(),
            "names": [
                name for name in dir(pyreft) if name[0].isupper() or name.startswith(("get_", "make_", "parse_"))
            ],
        }
    else:
        import dataclasses

        import adapters

        results = {
            "model": trained(known["adapted"]),
            "suffix, cached": continued(True, prefix_positions=0, suffix_positions=2),
            "prefix, cached": continued(True, prefix_positions=3),
            "prefix": continued(False, prefix_positions=3),
            "names": [field.name for field in dataclasses.fields(adapters.LoReftConfig)],
        }
    target.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
