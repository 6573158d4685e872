"""`inspect_adapter`: what a saved adapter does to texts, from its folder. The command `peft-reft inspect` calls it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import load_peft_weights

from ..tuner.card import CLASSIFIES, labels_of_head
from ..tuner.config import ReftConfig
from .explain_edits import ExplainedEdits, explain_edits
from .formats import encode_row, pad_rows


# The class of transformers that loads the base for a task. Without a task, the base is taken for a causal LM.
LOADS = {
    None: "AutoModelForCausalLM",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


def read_config(adapter: str | os.PathLike) -> ReftConfig:
    """The config of a saved ReFT adapter.

    Raises:
        ValueError: when the adapter is not ReFT's.
    """
    config: Any = ReftConfig.from_pretrained(str(adapter))
    if not isinstance(config, ReftConfig):
        raise ValueError(f"{adapter} holds an adapter of kind {config.peft_type.value}, not REFT.")
    return config


def task_of(config: ReftConfig) -> str | None:
    """The task type of an adapter, `"CAUSAL_LM"` for example. None: its config names none."""
    return None if config.task_type is None else str(getattr(config.task_type, "value", config.task_type))


def check_answers(task: str | None, source: str) -> None:
    """Refuse rows of a prompt and an answer for an adapter whose base does not read both in one.

    Args:
        task (`str`, *optional*): The adapter's task type.
        source (`str`): Where the answers come from, for the message.

    Raises:
        ValueError: naming both.
    """
    if task in (None, "CAUSAL_LM"):
        return
    way_out = "Give --text and --answer" if task == "SEQ_2_SEQ_LM" else "Leave the answers out"
    raise ValueError(
        f"{source}: a prompt and its answer are one text for a causal language model, and the adapter is for {task}. "
        f"{way_out}, or call explain_edits(model, batch) with labels of your own."
    )


def rows_of_texts(
    texts: Sequence[str], answers: Sequence[str], chat: bool, tokenizer: Any, task: str | None = None
) -> list[dict[str, list[int]]]:
    """Tokens of prompts, with labels where they have answers.

    Args:
        texts (`Sequence[str]`): The prompts.
        answers (`Sequence[str]`): An answer for each, or none at all.
        chat (`bool`): Whether a prompt is what a user says, to be put into the tokenizer's chat template. Else it is
            the text that the model reads.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer.
        task (`str`, *optional*): The adapter's task type. The labels of `"SEQ_2_SEQ_LM"` are the decoder's.

    Raises:
        ValueError: when there are answers, and not one for each prompt, or of an adapter for a task without answers,
            or when the tokenizer has no chat template.
    """
    if answers and len(answers) != len(texts):
        raise ValueError(
            f"{len(texts)} texts and {len(answers)} answers were given. Give an answer for each, or none."
        )
    if answers and task == "SEQ_2_SEQ_LM" and not chat:
        return [
            {
                "input_ids": list(tokenizer(text)["input_ids"]),
                "labels": list(tokenizer(text_target=answer)["input_ids"]),
            }
            for text, answer in zip(texts, answers)
        ]
    if answers:
        check_answers(task, "--answer")
    if not chat:
        if answers:
            rows = [{"prompt": text, "completion": answer} for text, answer in zip(texts, answers)]
            return [encode_row(row, "completion", tokenizer) for row in rows]
        return [{"input_ids": list(tokenizer(text)["input_ids"])} for text in texts]
    if not tokenizer.chat_template:
        raise ValueError(
            "The base's tokenizer has no chat template. Give texts as the model reads them, without chat."
        )
    chats = [[{"role": "user", "content": text}] for text in texts]
    if answers:
        turns = [[*chat, {"role": "assistant", "content": answer}] for chat, answer in zip(chats, answers)]
        return [encode_row({"messages": messages}, "chat", tokenizer) for messages in turns]
    rendered = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for messages in chats
    ]
    return [{"input_ids": list(tokenizer(text, add_special_tokens=False)["input_ids"])} for text in rendered]


def load_adapted(adapter: str | os.PathLike, base: str, dtype: str = "float32") -> PeftModel:
    """Load a base model with an adapter, in evaluation mode, on a GPU if there is one.

    Args:
        adapter (`str` or `os.PathLike`): The folder or hub name of the adapter.
        base (`str`): The folder or hub name of the base model.
        dtype (`str`): The dtype of the base: `"float32"`, `"bfloat16"`, or `"auto"` for that of its file.

    Raises:
        ValueError: when the adapter is not ReFT's.
    """
    task = task_of(read_config(adapter))
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if task in CLASSIFIES:
        # The trained head is in the adapter, and the base is made with a head of its size.
        weights = load_peft_weights(str(adapter), device="cpu")
        labels = labels_of_head({name: tensor.shape for name, tensor in weights.items()})
        options |= {} if labels is None else {"num_labels": labels}
    model = getattr(transformers, LOADS[task]).from_pretrained(base, **options)
    adapted = PeftModel.from_pretrained(model, str(adapter))
    return adapted.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def inspect_adapter(
    adapter: str | os.PathLike,
    base: str,
    rows: Sequence[Mapping[str, list[int]]],
    tokenizer: Any,
    dtype: str = "float32",
    quiet: bool = False,
) -> ExplainedEdits:
    """Load an adapter on its base and explain its edits of some rows of tokens. Arguments and errors are those of
    `load_adapted` and `explain_edits`.

    Args:
        rows (`Sequence[Mapping]`): Rows with `input_ids` and, in all or none, `labels`, as `rows_of_texts` and
            `formats.encode_row` make them.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer that made them.
        quiet (`bool`): Whether to print nothing.
    """
    return explain_edits(
        load_adapted(adapter, base, dtype), pad_rows([dict(row) for row in rows]), tokenizer, quiet=quiet
    )
