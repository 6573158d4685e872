"""The rules by which the adapters of a model find their tokens, with what their configs ask to be found.

This module knows where a model's tokenizer is. chat_template.py looks for the response template in it.
"""

from __future__ import annotations

import logging
from typing import Any

from .chat_template import AUTO, load_local_tokenizer, log_once
from .config import ReftConfig
from .forward.context import ForwardContext
from .forward.transformers_api import AutoTokenizer, can_generate, encoder_of, eos_token_id
from .positions.spec import Rules
from .positions.template import IdTemplate


def rules_of(model: Any, config: ReftConfig) -> Rules:
    """The rules by which an adapter finds its tokens in the calls of a model. Fills in what the config asks to be
    found, and logs it.

    Raises:
        ValueError: when the response template is text and the tokenizer can't be loaded, or does not keep the text.
    """
    name = config.tokenizer_name_or_path or getattr(model, "name_or_path", None)

    def tokenizer() -> Any:
        if config.asked_template == AUTO:
            if encoder_of(model) is not None:
                raise ValueError("the model has an encoder, and its prompts are not a conversation's")
            own = config.tokenizer_name_or_path is None
            return load_local_tokenizer(name, config.revision if own else None)
        try:
            return AutoTokenizer.from_pretrained(name)
        except Exception as error:
            raise ValueError(
                f"response_template={config.response_template!r} is text, which needs a tokenizer, and none could be "
                f"loaded from {name!r}: {error} Set tokenizer_name_or_path in ReftConfig, or give the template's "
                "token ids."
            ) from error

    rules = config.rules(tokenizer, eos_token_id(model), can_generate(model))
    if config.asked_template == AUTO:
        _note_template(config, rules, name)
    return rules


def _note_template(config: ReftConfig, rules: Rules, name: str | None) -> None:
    """Fill in what was found for `response_template="auto"`, and log it.

    Args:
        config (`ReftConfig`): The config of the adapter.
        rules (`Rules`): Its rules, with what was found.
        name (`str`, *optional*): The tokenizer that it was found by.
    """
    found = rules.template
    config.note_template(found.ids if isinstance(found, IdTemplate) else None)
    if found is not None:
        log_once(
            logging.WARNING,
            f"response_template='auto': the answers of a conversation begin after the tokens {found}, by the chat "
            f"template of {name}. The adapter's config keeps them. Where a sequence has none, labels tell its prompt.",
        )
    elif rules.why_no_template:
        log_once(logging.INFO, f"response_template='auto' found none: {rules.why_no_template}.")


def use_tokenizer(model: Any, tokenizer: Any) -> None:
    """Find the response template of adapters that ask for one (`"auto"`) by the tokenizer that they are trained with,
    which need not be the base model's.

    Args:
        model (`torch.nn.Module`): The model with the adapters. Nothing is done to others.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer, or a processor that has one. Without a
            response template it changes nothing.
    """
    context = ForwardContext.of(model)
    configs = getattr(model, "peft_config", None)
    if context is None or not isinstance(configs, dict):
        return
    for name, before in context.rules.items():
        config = configs.get(name)
        if not isinstance(config, ReftConfig) or config.asked_template != AUTO or context.has_encoder:
            continue
        rules = config.rules(lambda: tokenizer, before.end_ids, before.reads_labels)
        if rules.template is None:
            if before.template is None:
                context.rules[name] = rules  # which say why
        elif str(rules.template) != str(before.template):
            context.rules[name] = rules
            _note_template(config, rules, getattr(tokenizer, "name_or_path", None) or type(tokenizer).__name__)
