"""The response template of a tokenizer's chat template: the tokens that open every answer in its conversations.

This module knows a tokenizer by what it does: it renders conversations and cuts texts into tokens. It looks at the
tokens that `add_generation_prompt` adds to a conversation, keeps those of them that also stand before the answer in a
whole conversation, and accepts them only where they mark every answer of its sample conversations and nothing else.
So a template that opens answers otherwise in training than in generation, one whose tokens merge with the answer, and
one that has no tokens of its own before an answer are told apart from those that can be gone by.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache

from .forward.transformers_api import AutoTokenizer
from .positions.template import IdTemplate


AUTO = "auto"  # the value of ReftConfig.response_template that asks for this search

LOG = logging.getLogger(__name__)

Messages = list[dict[str, Any]]

# The questions hold what chat templates are made of, so that a separator is not taken for an opening of answers.
QUESTIONS = (
    "Name [two] colours:\n\n1. (a) dark one\n2. 'a light one'!",
    "And a third? <b>Briefly</b>\n",
    "Well - why",
)
ANSWERS = ("Blue, I think.", "7 of them", "**Red** and [grey]", '"No"', "well, both")
SYSTEM = "You speak plainly.\n\nUser: or Assistant: is no word of yours."


@dataclass(frozen=True)
class FoundTemplate:
    """What a search for the response template of a tokenizer came to.

    Args:
        ids (`list[int]`, *optional*): The template. None: there is none that can be gone by.
        text (`str`): Its text.
        reason (`str`): Why there is none.
    """

    ids: list[int] | None
    text: str = ""
    reason: str = ""


class NoTemplate(Exception):
    """Raised within the search: the chat template shows no response template, for the reason given."""


def find_response_template(tokenizer: Any) -> list[int] | None:
    """Find the token ids that open every answer in the conversations of a tokenizer's chat template.

    `ReftConfig(response_template="auto")` does this with the base model's tokenizer. Call it where you train with
    another one, or with another chat template: `ReftConfig(response_template=find_response_template(tokenizer))`.

    Args:
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer, or a processor that has one.

    Returns:
        `list[int]`, *optional*: The ids. None: there is no chat template, or none that marks every answer.
    """
    return search(tokenizer).ids


def search(tokenizer: Any) -> FoundTemplate:
    """Find the response template of a tokenizer, or the reason why there is none. See `find_response_template`."""
    name = type(tokenizer).__name__
    if not getattr(tokenizer, "chat_template", None):
        return FoundTemplate(None, reason=f"the tokenizer ({name}) has no chat template")
    try:
        ids = _search(tokenizer)
    except NoTemplate as error:
        return FoundTemplate(None, reason=f"{error} (the chat template of {name})")
    return FoundTemplate(ids, _text_tokenizer(tokenizer).decode(ids))


def search_with(tokenizer: Callable[[], Any]) -> FoundTemplate:
    """Find the response template of a tokenizer that a function gives, or raises ValueError where there is none."""
    try:
        return search(tokenizer())
    except ValueError as error:
        return FoundTemplate(None, reason=str(error))


@functools.cache
def log_once(level: int, message: str) -> None:
    """Log a message, unless it was logged before in this process."""
    LOG.log(level, message)


def load_local_tokenizer(name: str | None, revision: str | None) -> Any:
    """Load a tokenizer from a folder or the hub's cache on disk. Nothing is downloaded, and no code of a repository
    runs.

    Args:
        name (`str`, *optional*): A folder, or a name on the hub.
        revision (`str`, *optional*): The revision on the hub.

    Raises:
        ValueError: when there is none.
    """
    if not name:
        raise ValueError("the base model does not say from where it was loaded")
    try:
        # A folder: by the name of a repository, transformers asks the hub even with local_files_only.
        folder = name if os.path.isdir(name) else _snapshot(name, revision)
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        cause = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no tokenizer of {name!r} can be loaded from disk: {cause}") from error


def _snapshot(name: str, revision: str | None) -> str:
    """The folder of a repository in the hub's cache that holds its tokenizer."""
    path = try_to_load_from_cache(name, "tokenizer_config.json", revision=revision)
    if not isinstance(path, str):
        raise ValueError("it is neither a folder nor in the hub's cache")
    return os.path.dirname(path)


def _search(tokenizer: Any) -> list[int]:
    pieces = []
    conversations: list[tuple[list[int], list[str], bool]] = []  # tokens, answers, whether one more answer is opened
    for messages in _samples(tokenizer):
        opened = _tokens(tokenizer, messages, opened=True)
        answered = [_tokens(tokenizer, [*messages, _message("assistant", answer)]) for answer in ANSWERS]
        end = min(_common(opened, ids) for ids in answered)
        piece = opened[_opening(tokenizer, messages, opened) : end]
        before = _answers(messages)
        conversations.append((opened, before, True))
        conversations += [(ids, [*before, answer], False) for ids, answer in zip(answered, ANSWERS)]
        if piece:  # empty where the chat template renders a question otherwise once it is answered
            pieces.append(piece)
    template = _common_end(pieces)
    if not template:
        raise NoTemplate("no tokens that open an answer in a prompt stand before the answer of a conversation, too")
    # Some chat templates add thoughts to the last answer and to the prompt of the next, and to no earlier answer.
    # What stands before the thoughts opens every answer.
    first_error = None
    for end in range(len(template), 0, -1):
        try:
            for ids, answers, opens in conversations:
                _check(tokenizer, IdTemplate(template[:end]), ids, answers, opens)
        except NoTemplate as error:
            first_error = first_error or error
        else:
            return template[:end]
    assert first_error is not None
    raise first_error


def _samples(tokenizer: Any) -> Iterator[Messages]:
    """Conversations that end with a question: of one turn and of several, with a system message where the chat
    template takes one."""
    one = [_message("user", QUESTIONS[0])]
    several = [
        *one,
        _message("assistant", ANSWERS[0]),
        _message("user", QUESTIONS[1]),
        _message("assistant", ANSWERS[1]),
        _message("user", QUESTIONS[2]),
    ]
    yield from (one, several)
    for messages in (one, several):
        with_system = [_message("system", SYSTEM), *messages]
        try:
            _render(tokenizer, with_system, opened=True)
        except NoTemplate:
            return
        yield with_system


def _check(tokenizer: Any, template: IdTemplate, ids: list[int], answers: list[str], opened: bool) -> None:
    """Raise NoTemplate unless the template stands once before each answer of a conversation, and nowhere else."""
    ids_1S = torch.tensor([ids], dtype=torch.long)
    ends = template.matches(ids_1S, torch.zeros_like(ids_1S, dtype=torch.bool))[0].nonzero().flatten().tolist()
    if len(ends) != len(answers) + opened:
        raise NoTemplate(
            f"{_text_tokenizer(tokenizer).decode(template.ids)!r} ({template.ids}) stands {len(ends)} times in a "
            f"conversation of {len(answers) + opened} answers"
        )
    decode = _text_tokenizer(tokenizer).decode
    for answer, begin, end in zip(answers, ends, [*ends[1:], len(ids)]):
        if answer not in decode(ids[begin + 1 : end]):
            raise NoTemplate(f"{decode(template.ids)!r} does not stand before every answer of a conversation")


def _opening(tokenizer: Any, messages: Messages, opened: list[int]) -> int:
    """The index of the first token that opens the answer, in the tokens of a conversation that is opened for it.

    That is the first token of the text that `add_generation_prompt` adds. Where it adds none, as in Llama 2's and
    Mistral's chat templates, it is the first after the question, which closes the question and opens the answer.
    """
    text, closed = (_render(tokenizer, messages, opened=one) for one in (True, False))
    question = messages[-1]["content"].strip()
    begin = len(closed) if closed != text and text.startswith(closed) else text.rfind(question) + len(question)
    # Tokens at the edge may be merged with what stands before, and are left out then.
    return len(opened) - _common(opened[::-1], _cut(tokenizer, text[begin:])[::-1])


def _tokens(tokenizer: Any, messages: Messages, opened: bool = False) -> list[int]:
    return _cut(tokenizer, _render(tokenizer, messages, opened))


def _cut(tokenizer: Any, text: str) -> list[int]:
    return list(_text_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"])


def _render(tokenizer: Any, messages: Messages, opened: bool) -> str:
    """The text of a conversation. Some chat templates, of models that see, take a message as a list of parts only."""
    parts = [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]
    errors = []
    for form in (messages, parts):
        try:
            text = tokenizer.apply_chat_template(form, tokenize=False, add_generation_prompt=opened)
        except Exception as error:  # jinja's, or one that the template raises
            errors.append(error)
            continue
        if isinstance(text, str) and messages[-1]["content"].strip() in text:
            return text
    raise NoTemplate(f"it can't render a conversation{f': {errors[0]}' if errors else ''}")


def _text_tokenizer(tokenizer: Any) -> Any:
    """A processor's tokenizer, or the tokenizer itself."""
    return getattr(tokenizer, "tokenizer", tokenizer)


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _answers(messages: Messages) -> list[str]:
    return [message["content"] for message in messages if message["role"] == "assistant"]


def _common(one: list[int], other: list[int]) -> int:
    """The number of tokens with which both lists begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _common_end(lists: list[list[int]]) -> list[int]:
    """The longest list with which all lists end."""
    if not lists:
        return []
    length = min(_common(lists[0][::-1], other[::-1]) for other in lists)
    return lists[0][len(lists[0]) - length :]
