"""Warnings about what batches say of their prompts: each is given once for a model.

A batch can be well formed and still make training, scoring and `generate` edit different tokens. This module looks for
the signs of that in masks of tokens, and names the setting that makes all of them agree. What a warning depends on may
be on a GPU; it is read as late as deferred_checks.py allows.

Dimensions: B rows of the batch, S tokens of a row.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from .deferred_checks import Checks
from .prompts import IGNORED_LABEL, Sequences, total_within


WAYS_OUT = (
    "Say it in one of these ways: labels with -100 at the prompt; prompt_lengths [batch], which "
    "peft_reft.PromptLengthsCollator(data_collator) adds from labels or a completion mask; response_template in "
    "ReftConfig, the text that answers begin after; or positions='all'"
)
# The ways of the library that a user is in, by its module: the first that is imported. axolotl imports TRL.
LIBRARY_WAYS = {
    "axolotl": (
        "In axolotl: datasets of type: chat_template, whose template is taken; or reft: {response_template: ...} or "
        "reft: {positions: all} in the YAML; for vision models, role_boundaries"
    ),
    "trl": (
        "In TRL: a dataset of prompt and completion; or assistant_only_loss=True in SFTConfig, where the chat "
        "template marks answers; or, for another tokenizer or chat template than the base model's, "
        "ReftConfig(response_template=peft_reft.find_response_template(tokenizer))"
    ),
}

UNTOLD = (
    "A forward without labels does not say where its prompts end, so all its tokens are taken for prompt, and the "
    "last of them are edited. If it holds answers, that is not what training and generate edit. Pass prompt_lengths "
    "[batch], or set response_template in ReftConfig, the text that answers begin after, and let each row hold it."
)
SEVERAL_ANSWERS = (
    "Labels tell several answers in one row, and no response_template tells where prompts end. Training edits "
    "{edited}, and generate takes a whole conversation for one prompt: for a later answer they edit different "
    "tokens. Set response_template in ReftConfig, the text that answers begin after, for both to agree."
)
DISAGREEING = (
    "{origin} put the end of a row's prompt at another token than the response template of the tokenizer, {template}, "
    "does. Training goes by {decides} there, and generate and scoring go by the template. To edit the end of all that "
    "stands before an answer, set response_template=None in ReftConfig; for each turn of a conversation, "
    "prompt_boundary='every'."
)
EMBEDDINGS = (
    "The response template is looked for in input_ids, and inputs_embeds come alone: all tokens of the prompts that "
    "labels do not tell are taken for prompt. Pass prompt_lengths [batch] where a prompt ends before its last token."
)


def ways_out(why_no_template: str = "") -> str:
    """How a batch can say where its prompts end, in the library that is in use.

    Args:
        why_no_template (`str`): Why no response template was found by itself. Empty: none was looked for.
    """
    library = next((ways for name, ways in LIBRARY_WAYS.items() if name in sys.modules), None)
    found_none = f"response_template='auto' found none: {why_no_template}" if why_no_template else None
    return ". ".join(part for part in (WAYS_OUT, library, found_none) if part)


class Notices:
    """The warnings about the batches of one model.

    Args:
        checks (`Checks`): Reads the numbers that a warning depends on.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._given: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {"_checks": self._checks, "_given": set()}

    def warn(self, text: str, if_any: Callable[[], Tensor] | None = None, key: str = "") -> None:
        """Give a warning, unless it was given before.

        Args:
            text (`str`): The warning.
            if_any (`Callable`, *optional*): Gives a mask of any shape: the warning is given where a value is True. Not
                called once the warning was given.
            key (`str`): What the warning is known by, where texts differ.
        """
        key = key or text
        if key in self._given:
            return
        if if_any is None:
            self._give(key, text)
        else:
            self._checks.require(if_any().any()[None], lambda read: self._give(key, text) if read[0] else None)

    def _give(self, key: str, text: str) -> None:
        if key not in self._given:
            self._given.add(key)
            warnings.warn(text, stacklevel=2)


def several_answers(sequences: Sequences, labels: Tensor, among_BS: Tensor | None = None) -> Tensor:
    """bool, [B, S]: the first tokens of answers after the first of their sequence, by labels.

    Args:
        sequences (`Sequences`): The sequences of the batch.
        labels (`torch.Tensor`): [B, S].
        among_BS (`torch.BoolTensor`, *optional*): [B, S], the sequences to look at. None: all.
    """
    answer_BS = sequences.real_BS & (labels != IGNORED_LABEL)
    before_BS = answer_BS.roll(1, dims=1).masked_fill(sequences.start_BS, False)
    begins_BS = answer_BS & ~before_BS
    later_BS = begins_BS & (total_within(begins_BS, sequences.packed_start_BS) > 1)
    return later_BS if among_BS is None else later_BS & among_BS
