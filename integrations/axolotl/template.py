"""The response template of a YAML: the tokens with which the chat templates of its datasets open an answer.

This module knows axolotl's datasets by their keys. By the template the edit stays where it is whatever is trained: the
options that choose labels (`train_on_inputs`, and `LABEL_OPTIONS` of a dataset) move no token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft_reft.tuner.chat_template import FoundTemplate, search

from . import axolotl_api


# Options of a dataset of type: chat_template that put labels into prompts or leave some answers without any: key ->
# whether a value does. By labels alone, a prompt would end elsewhere. `split_thinking` and content in parts change the
# text of an answer, `drop_system_message` and `roles` that of a prompt, in training and inference alike.
LABEL_OPTIONS = {
    "roles_to_train": lambda roles: set(roles) - {"assistant", "gpt"},
    "train_on_eos": lambda which: which == "all",
    "train_on_eot": lambda which: which == "all",
    "message_field_training": bool,
    "message_field_training_detail": bool,
}


def has_chats_alone(cfg: Any) -> bool:
    """Whether all datasets of a YAML are conversations that a chat template renders."""
    datasets = list(getattr(cfg, "datasets", None) or ())
    return bool(datasets) and all(_is_chat(dataset) for dataset in datasets)


def names_template(keys: Mapping[str, Any]) -> bool:
    """Whether a YAML's conversations are rendered by another chat template than the tokenizer's own."""
    chats = [dataset for dataset in keys.get("datasets") or () if _is_chat(dataset)]
    names = {dataset.get("chat_template") or keys.get("chat_template") for dataset in chats}
    return bool(names - {None, "tokenizer_default"})


def chat_templates(cfg: Any, tokenizer: Any) -> dict[int, str]:
    """The chat template of each of a YAML's datasets that are conversations, by the dataset's number.

    Args:
        cfg (`Mapping`): axolotl's config, or the keys of a YAML.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer, whose own template some datasets use.
    """
    return {
        number: axolotl_api.chat_template_of(cfg, dataset, tokenizer)
        for number, dataset in enumerate(cfg.get("datasets") or ())
        if _is_chat(dataset)
    }


def find_template(cfg: Any) -> list[int] | None:
    """Find the response template of a YAML's datasets or, where none has a chat template, of its tokenizer.

    Args:
        cfg (`DictDefault`): axolotl's config.

    Returns:
        `list[int]`, *optional*: The token ids. None: there is none, and labels are right without.

    Raises:
        ValueError: when datasets open answers in different ways, and when there is no template and an option puts
            labels elsewhere than at answers.
    """
    tokenizer = axolotl_api.tokenizer_of(cfg)
    found: dict[str, FoundTemplate] = {}
    for number, chat_template in chat_templates(cfg, tokenizer).items():
        dataset = cfg.datasets[number]
        name = f"datasets[{number}] ({dataset.get('path')})"
        tokenizer.chat_template = chat_template
        found[name] = search(tokenizer)
        if found[name].ids is None:
            _refuse_label_options(cfg, dataset, name, found[name].reason)
    if not found:
        found["the tokenizer"] = search(tokenizer)
    templates = {tuple(one.ids): (name, one.text) for name, one in found.items() if one.ids is not None}
    if len(templates) > 1:
        raise ValueError(
            "The chat templates of this YAML open answers in different ways: "
            + ", ".join(f"{name} with {text!r}" for name, text in templates.values())
            + ". An adapter has one response template. Set one chat_template: for all datasets, or reft: "
            "response_template: to a text that stands before every answer of all of them."
        )
    if not templates and _needs_template(cfg):
        reasons = "; ".join(f"{name}: {one.reason}" for name, one in found.items())
        raise ValueError(f"{_needs_template(cfg)} No response template was found ({reasons}). {WAYS_OUT}")
    return list(next(iter(templates))) if templates else None


WAYS_OUT = (
    "Set reft: response_template: to the text that your answers begin after (for example '### Response:', or "
    "'<|im_start|>assistant\\n'), or reft: positions: all."
)


def _needs_template(cfg: Any) -> str:
    """Why labels tell nothing of prompts under a YAML. Empty: they do."""
    if cfg.train_on_inputs:
        return "train_on_inputs: true leaves no label masked, so labels do not say where prompts end."
    name = getattr(cfg.rl, "value", cfg.rl)
    if name:
        return f"rl: {name} gives the model no labels, so nothing says where prompts end."
    template = getattr(cfg.chat_template, "value", cfg.chat_template)
    if (
        cfg.processor_type
        and template not in (None, "tokenizer_default")
        and not cfg.role_boundaries
        and not axolotl_api.knows_role_boundaries(template, cfg.model_config_type)
    ):
        return (
            f"processor_type: with chat_template: {template}: axolotl knows no role boundaries of this template, and "
            "leaves every token a label, so nothing says where prompts end. role_boundaries: gives them."
        )
    return ""


def _is_chat(dataset: Any) -> bool:
    kind = dataset.get("type") if hasattr(dataset, "get") else getattr(dataset, "type", None)
    return isinstance(kind, str) and kind.startswith("chat_template")


def _refuse_label_options(cfg: Any, dataset: Any, name: str, reason: str) -> None:
    """Refuse options that choose labels, where nothing but labels tells the prompts."""
    given = {key: dataset.get(key) for key in LABEL_OPTIONS if dataset.get(key) is not None}
    options = [f"{key}: {value}" for key, value in given.items() if LABEL_OPTIONS[key](value)]
    if options:
        raise ValueError(
            f"{name} has {', '.join(options)}, which puts labels elsewhere than at all answers. ReFT edits tokens of "
            f"prompts, which labels alone would tell here: no response template was found ({reason}). Remove "
            f"{'it' if len(options) == 1 else 'them'}, or say where answers begin. {WAYS_OUT}"
        )
