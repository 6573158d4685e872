"""The tokens that an adapter edits in one call of a model.

This module puts together what the call says of its tokens (positions/batch.py), the rules of the adapter (positions/spec.py) and, within
`generate`, its prompts (generation.py). What it remembers of earlier batches is what a batch alone does not say. It knows nothing
of layers.

Dimensions: B rows of the batch, S tokens of a row, R rank.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..positions.batch import Batch, select_tokens
from ..positions.deferred_checks import Checks
from ..positions.selection import Selection
from ..positions.spec import Rules
from ..positions.subspaces import kept_directions
from .generation import Generation
from .transformers_api import Past, find_past


UNTOLD_EVALUATION = (
    "A batch without labels is evaluated after training on batches with them: all its tokens are taken for prompt, "
    "and the last of them are edited. If it holds answers, that is not what training edited. Set response_template in "
    "ReftConfig, or pass prompt_lengths, for both to agree."
)


@dataclass(frozen=True)
class Call:
    """A call of a model, or of its encoder.

    Args:
        model_name (`str`): The model's class, for messages.
        arguments (`dict`): Its arguments, by name, but for those that only ReFT reads.
        batch (`Batch`, *optional*): The tokens in them. None: there are none.
        prefix (`str`): What the names of its tokens begin with: `"decoder_"` in an encoder-decoder model.
        subspaces: What the caller says of subspaces, if anything.
        training (`bool`): Whether the model is in training mode.
        generation (`Generation`, *optional*): The `generate` that it belongs to.
        in_encoder (`bool`): Whether it is one of the encoder of an encoder-decoder model.
    """

    model_name: str
    arguments: dict[str, Any]
    batch: Batch | None
    prefix: str
    subspaces: Any
    training: bool
    generation: Generation | None
    in_encoder: bool


class Selector:
    """Finds the tokens that adapters edit in the calls of one model.

    Args:
        checks (`Checks`): Where conditions are noted that would have to be read from a device.
    """

    def __init__(self, checks: Checks) -> None:
        self._checks = checks
        self._saw_labels = False
        self._masks_number: bool | None = None

    def select(self, rules: Rules, call: Call) -> Selection | None:
        """The tokens that an adapter edits in a call. None: it is a decode step.

        Args:
            rules (`Rules`): How the adapter finds its tokens.
            call (`Call`): The call.

        Raises:
            ValueError: when the call does not say where its prompts are, or has none.
        """
        generation = call.generation
        if call.in_encoder:
            rules = replace(rules, reads_labels=False)
        elif not rules.spec.all_tokens and generation is not None and generation.decodes(call.arguments):
            return None
        if call.batch is None:
            raise ValueError(
                f"{rules} counts tokens, but the model was called without {call.prefix}input_ids [batch, tokens] or "
                f"{call.prefix}inputs_embeds. Pass one of them, or set positions='all', which works on any model."
            )
        batch = self._with_plain_mask(call.batch)
        training = call.training and generation is None
        selection = self._select(rules, batch, call, training)
        if selection is None or not rules.subspaces:
            return selection
        kept_R_of_tokens = _kept(rules, call, batch, training)
        return selection if kept_R_of_tokens is None else selection.in_directions(kept_R_of_tokens)

    def _select(self, rules: Rules, batch: Batch, call: Call, training: bool) -> Selection | None:
        if rules.spec.all_tokens:
            return Selection(torch.ones(batch.shape, dtype=torch.bool, device=batch.device))
        if call.in_encoder or (call.generation is None and batch.told == "intervention_mask"):
            return self._select_in_batch(rules, batch, training)  # whatever a cache may hold
        past = find_past(call.model_name, call.arguments)
        if call.generation is not None:
            return call.generation.select(rules, batch, past)
        read = 0 if past is None else _length(rules, past)
        if read == 0 or batch.told is not None:
            return self._select_in_batch(rules, batch, training, read)
        _refuse_several(batch, read)
        return None  # a decode step

    def _with_plain_mask(self, batch: Batch) -> Batch:
        """The batch, with a mask of integers as one of booleans where it does not number packed sequences.

        Whether it does would have to be read from the device. A collator that numbers them gives position ids too, and is read;
        without those, all batches of a model are taken to be of the kind of the first.
        """
        mask, numbers = batch.attention_mask, batch.position_ids is not None or batch.cu_seq_lens is not None
        if (
            numbers
            or not isinstance(mask, Tensor)
            or mask.dtype == torch.bool
            or not self._checks.are_deferred_on(mask.device)
        ):
            return batch
        numbered = mask.amax() > 1
        if self._masks_number is None:
            self._masks_number = bool(numbered)
        if self._masks_number:
            return batch
        self._checks.require(numbered[None], _refuse_late_numbers)
        return replace(batch, attention_mask=mask != 0)

    def _select_in_batch(self, rules: Rules, batch: Batch, training: bool, past: int = 0) -> Selection:
        """The tokens of a batch, or, where it continues a cache of `past` tokens and its prompts are told, of the rest."""
        if past > 0:
            batch = replace(batch, shape=(batch.shape[0], past + batch.shape[1]))
            batch = replace(batch, input_ids=None, position_ids=None, cu_seq_lens=None, labels=None)
        tokens = select_tokens(rules, batch, training, self._checks)
        if tokens.source == "labels":
            self._saw_labels |= training
        elif tokens.source == "all tokens" and rules.reads_labels and self._saw_labels:
            self._saw_labels = False  # say it once
            warnings.warn(UNTOLD_EVALUATION)
        return tokens.after(past, rules)


def _length(rules: Rules, past: Past) -> int:
    """How many tokens were read before a call outside `generate`."""
    if past.length is None:
        raise ValueError(
            f"{rules}: this model keeps a recurrent state ({past.argument}), which does not say how far the prompt "
            "has been read. Use generate, which says it, or set positions='all'."
        )
    return past.length


def _refuse_several(batch: Batch, past: int) -> None:
    """Outside `generate`, one token after a filled cache is a decode step. Several may be a part of a prompt."""
    if batch.shape[1] > 1:
        raise ValueError(
            f"A forward of {batch.shape[1]} tokens continues a cache of {past}, outside `generate`. Whether they "
            f"belong to the prompt can't be known. Pass prompt_lengths [{batch.shape[0]}], the length of each whole "
            "prompt."
        )


def _refuse_late_numbers(numbers: list[int]) -> ValueError | None:
    if not numbers[0]:
        return None
    return ValueError(
        "The attention_mask of a batch numbers packed sequences (it holds numbers above 1), and that of the model's "
        "first batch did not. On a GPU ReFT goes by the first. Pass position_ids [batch, tokens] that restart with "
        "each sequence, as axolotl's and transformers' packing collators do."
    )


def _kept(rules: Rules, call: Call, batch: Batch, training: bool) -> Tensor | None:
    """The directions that each token's example uses, [B · S, R]. None: all of them, where nothing is said."""
    groups, generation = dict(rules.subspaces), call.generation
    if call.subspaces is None:
        if training:
            raise ValueError(
                f"The adapter has subspaces ({', '.join(groups)}), and the training batch does not say which its "
                "examples use. Pass subspaces [batch] with it: numbers of groups, or names."
            )
        return None
    if generation is None:
        kept_QR = kept_directions(call.subspaces, groups, batch.sequences.count, batch.device)
        return batch.sequences.spread(kept_QR).flatten(0, 1)
    kept_QR = kept_directions(call.subspaces, groups, generation.rows, batch.device)
    return kept_QR.repeat_interleave(batch.shape[0] // generation.rows * batch.shape[1], dim=0)
