"""Rows of a dataset file as tokens with labels, by a template: to look at positions before a trainer is set up.

The rows are read much as trainers read the common formats. To see a trainer's own tokens, pass one of its batches to
`explain_positions`; the axolotl plugin logs one under `--debug`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..tuner.positions.prompts import IGNORED_LABEL


ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input_part}### Response:\n"
)
TEMPLATES = {
    "chat": "`messages` (or `conversations`), by the tokenizer's chat template; the assistant's turns are answers",
    "alpaca": "`instruction`, `input` and `output`, as Alpaca words them",
    "completion": "`prompt` and `completion`, as texts or as messages",
    "text": "`text`, without an answer",
}


def read_rows(path: Path, limit: int) -> Iterator[dict[str, Any]]:
    """The first rows of a file: JSON lines, or one JSON list.

    Args:
        path (`Path`): The file.
        limit (`int`): How many rows to read at most.

    Raises:
        ValueError: when a line is not JSON, naming the file and the line.
    """
    with path.open(encoding="utf-8") as file:
        if file.read(1) == "[":
            file.seek(0)
            yield from json.load(file)[:limit]
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if limit <= 0:
                return
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
                limit -= 1


def alpaca_prompt(instruction: str, given: str = "") -> str:
    """Alpaca's prompt for an instruction, with an input or without."""
    return ALPACA.format(
        with_input=", paired with an input that provides further context" if given else "",
        instruction=instruction,
        input_part=f"### Input:\n{given}\n\n" if given else "",
    )


# Template to the fields that a row must have for it: one of each group.
_FIELDS = {
    "chat": (("messages", "conversations"),),
    "alpaca": (("instruction",), ("output",)),
    "completion": (("prompt",), ("completion",)),
    "text": (("text",),),
}


def template_of(row: dict[str, Any]) -> str:
    """The template whose fields a row has.

    Args:
        row (`dict`): The row.

    Returns:
        `str`: A name in `TEMPLATES`.

    Raises:
        ValueError: when the row has the fields of no template, or of several.
    """
    fitting = [name for name, groups in _FIELDS.items() if all(any(map(row.__contains__, group)) for group in groups)]
    if len(fitting) == 1:
        return fitting[0]
    has = f"A row has the fields {', '.join(row)}"
    if fitting:
        raise ValueError(f"{has}, which fit the templates {', '.join(fitting)}. Say which with --template.")
    known = "; ".join(f"{name}: {what}" for name, what in TEMPLATES.items())
    raise ValueError(
        f"{has}, which no template reads ({known}). Give --template a text of your own with fields in braces and |> "
        "where the answer begins: 'Q: {question} A:|> {answer}'."
    )


def encode_row(row: dict[str, Any], template: str, tokenizer: Any) -> dict[str, list[int]]:
    """Tokens and labels of a row.

    Args:
        row (`dict`): The row.
        template (`str`): A name in `TEMPLATES`, or a prompt of your own with the row's fields in braces, followed by
            `|>` and the answer: `"Q: {question} A:|> {answer}"`.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer.

    Returns:
        `dict`: `input_ids`, and `labels` with -100 at the prompt, except for the template "text", which has no answer.

    Raises:
        ValueError: when the row lacks a field that the template names, or when the template is unknown.
    """
    try:
        if template == "chat":
            return _encode_chat(row["messages"] if "messages" in row else row["conversations"], tokenizer)
        if template == "text":
            return {"input_ids": tokenizer(row["text"])["input_ids"]}
        if template == "alpaca":
            prompt = alpaca_prompt(row["instruction"], row.get("input") or "")
            return _encode_answer(prompt, row["output"], tokenizer)
        if template == "completion" and isinstance(row["prompt"], list):
            return _encode_last_turns(row["prompt"], row["completion"], tokenizer)
        if template == "completion":
            return _encode_answer(row["prompt"], row["completion"], tokenizer)
        if "|>" in template:
            prompt, answer = (part.format(**row) for part in template.split("|>", 1))
            return _encode_answer(prompt, answer, tokenizer)
    except KeyError as error:
        raise ValueError(
            f"--template {template} reads the field {error}, which the row does not have. It has: {', '.join(row)}."
        ) from error
    raise ValueError(
        f"--template {template} is unknown. Use one of {', '.join(TEMPLATES)}, or a text of your own with fields in "
        "braces and |> where the answer begins: 'Q: {question} A:|> {answer}'."
    )


def pad_rows(rows: list[dict[str, list[int]]]) -> dict[str, list[list[int]]]:
    """Rows as one batch, padded on the right. Labels of another length than the tokens are those of a decoder."""
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    batch = {}
    for key, filler in (("input_ids", 0), ("labels", IGNORED_LABEL), ("attention_mask", 0)):
        if key in rows[0]:
            width = max(len(row[key]) for row in rows)
            batch[key] = [row[key] + [filler] * (width - len(row[key])) for row in rows]
    return batch


def _encode_answer(prompt: str, answer: str, tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of a prompt and an answer, tokenized separately, as trainers do."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    if prompt_ids and prompt_ids[-1] == tokenizer.eos_token_id:
        prompt_ids = prompt_ids[:-1]
    answer_ids = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED_LABEL] * len(prompt_ids) + answer_ids}


def _encode_chat(messages: list[dict[str, Any]], tokenizer: Any) -> dict[str, list[int]]:
    """Tokens of a conversation. An answer is what the chat template adds for an assistant's message, without the
    opening of the turn (its generation prompt)."""
    messages = [_with_usual_names(message) for message in messages]
    input_ids = _render(messages, tokenizer)
    labels = [IGNORED_LABEL] * len(input_ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = _common(_render(messages[:index], tokenizer, opened=True), input_ids)
            end = _common(_render(messages[: index + 1], tokenizer), input_ids)
            labels[begin:end] = input_ids[begin:end]
    return {"input_ids": input_ids, "labels": labels}


def _encode_last_turns(
    prompt: list[dict[str, Any]], completion: list[dict[str, Any]], tokenizer: Any
) -> dict[str, list[int]]:
    """Tokens of a conversation whose last messages are the completion. All before these is prompt, earlier answers
    too."""
    input_ids = _render([*prompt, *completion], tokenizer)
    begin = _common(_render(prompt, tokenizer, opened=True), input_ids)
    return {"input_ids": input_ids, "labels": [IGNORED_LABEL] * begin + input_ids[begin:]}


def _render(messages: list[dict[str, Any]], tokenizer: Any, opened: bool = False) -> list[int]:
    """Tokens of messages by the chat template. `opened`: with the opening of an answer behind them."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _with_usual_names(message: dict[str, Any]) -> dict[str, Any]:
    """ShareGPT's from, value, human and gpt as role, content, user and assistant."""
    if "role" in message:
        return message
    roles = {"human": "user", "gpt": "assistant"}
    return {"role": roles.get(message["from"], message["from"]), "content": message["value"]}


def _common(one: list[int], other: list[int]) -> int:
    """The length of the common beginning of two lists."""
    length = 0
    for a, b in zip(one, other):
        if a != b:
            break
        length += 1
    return length
