"""The tokens that an adapter edits in one call of a model.

This module combines the tokens in the arguments of the call (positions/batch.py), the rules of the adapter
(positions/spec.py) and, within `generate`, its prompts (generation.py). It remembers what a batch alone does not show:
whether attention masks number packed sequences, and which warnings were given. It knows nothing of layers.

Dimensions: B rows of the batch, S tokens of a row, F tokens of the flattened batch, B · S, N sequences of the batch,
R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..positions.batch import Batch, SelectedTokens, select_tokens
from ..positions.notices import Notices
from ..positions.selection import Selection
from ..positions.spec import Rules
from ..positions.subspaces import used_directions
from ..positions.unedited import UneditedRows
from .generation import Generation
from .transformers_api import Past, find_past


@dataclass(frozen=True)
class Call:
    """A call of a model, or of its encoder.

    Args:
        model_name (`str`): The class of the model, for messages.
        arguments (`dict`): The arguments of the call, by name, without those that only ReFT reads.
        batch (`Batch`, *optional*): The tokens in the arguments. None: there are none.
        prefix (`str`): The prefix of the names of its tokens: `"decoder_"` for the decoder of an encoder-decoder
            model.
        subspaces: The argument `subspaces` of the caller. None: the caller did not pass it.
        training (`bool`): Whether the model is in training mode.
        generation (`Generation`, *optional*): The running `generate` that makes the call.
        in_encoder (`bool`): Whether the encoder of an encoder-decoder model is called.
        edits (`dict[Rules, SelectedTokens]`): Takes the tokens that are edited in a call outside `generate`, which a
            cache that the call fills is known by later (reuse.py).
    """

    model_name: str
    arguments: dict[str, Any]
    batch: Batch | None
    prefix: str
    subspaces: Any
    training: bool
    generation: Generation | None
    in_encoder: bool
    edits: dict[Rules, SelectedTokens] = field(default_factory=dict)


class Selector:
    """Finds the tokens that adapters edit in the calls of one model.

    Args:
        rows (`UneditedRows`): Counts the rows without a token to edit. Its `checks` take the conditions on batches
            whose values are on a device, and read them later.
    """

    def __init__(self, rows: UneditedRows) -> None:
        self._rows, self._checks = rows, rows.checks
        self._notices = Notices(rows.checks)
        self._masks_number_sequences: bool | None = None  # None: no mask of integers has been seen yet

    def select(self, rules: Rules, call: Call) -> Selection | None:
        """The tokens that an adapter edits in a call.

        Args:
            rules (`Rules`): How the adapter finds its tokens.
            call (`Call`): The call.

        Returns:
            `Selection`, *optional*: The tokens. None: the call is a decode step, in which the adapter edits nothing.

        Raises:
            UnknownState: when an argument may carry the state of earlier calls, in a form unknown to ReFT.
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
        used_FR = _used_directions(rules, call, batch, training)
        return selection if used_FR is None else selection.in_directions(used_FR)

    def _select(self, rules: Rules, batch: Batch, call: Call, training: bool) -> Selection | None:
        if rules.spec.all_tokens:
            return Selection(torch.ones(batch.shape, dtype=torch.bool, device=batch.device))
        if call.in_encoder or (call.generation is None and batch.given_by_caller == "intervention_mask"):
            # An encoder has no cache, and an intervention_mask names tokens of this very call: no cache is read.
            return self._select_in_batch(rules, batch, call, training)
        past = find_past(call.model_name, call.arguments)
        if call.generation is not None:
            return call.generation.select(rules, batch, past)
        read = 0 if past is None else _length(rules, past)
        if read == 0 or batch.given_by_caller is not None:
            is_part = past is not None or call.arguments.get("use_cache") is True
            return self._select_in_batch(rules, batch, call, training, read, is_part)
        _refuse_several_tokens(batch, read)
        return None  # a decode step

    def _with_plain_mask(self, batch: Batch) -> Batch:
        """The batch, with an attention mask of integers cast to bool, unless its integers number packed sequences.

        Whether they do is a value on the device, and reading it would wait for the device. A collator that numbers
        packed sequences also gives position ids; a batch with those is returned as it is. Among batches without them,
        all of a model are assumed to be of the kind of the first, whose mask is read. A later check raises an error
        where one is not.
        """
        mask, is_packed = batch.attention_mask, batch.position_ids is not None or batch.cu_seq_lens is not None
        if (
            is_packed
            or not isinstance(mask, Tensor)
            or mask.dtype == torch.bool
            or not self._checks.are_deferred_on(mask.device)
        ):
            return batch
        numbered = mask.amax() > 1
        if self._masks_number_sequences is None:
            self._masks_number_sequences = bool(numbered)
        if self._masks_number_sequences:
            return batch
        self._checks.require(numbered[None], _refuse_late_numbers)
        return replace(batch, attention_mask=mask != 0)

    def _select_in_batch(
        self, rules: Rules, batch: Batch, call: Call, training: bool, past: int = 0, is_part: bool = False
    ) -> Selection:
        """The tokens that an adapter edits in a batch.

        Where the batch continues a cache of `past` tokens, the caller has given the length of each whole prompt, and
        the tokens after the first `past` are returned. Where it may be followed by the rest of its prompts (`is_part`,
        the caller asks for a cache), a longer prompt than the batch goes on in a later call. Else lengths end with the
        batch.
        """
        width = past + batch.shape[1]
        later = 0  # tokens of the longest prompt that later calls will be fed
        if is_part and batch.prompt_lengths is not None and not training:
            later = max(0, int(batch.prompt_lengths.max()) - width)
        if past + later > 0:
            batch = _whole(batch, width + later, later)
        tokens = select_tokens(rules, batch, training, self._rows, self._notices)
        if later:
            tokens = replace(tokens, first_BS=tokens.first_BS[:, :width], last_BS=tokens.last_BS[:, :width])
        if not call.in_encoder and call.generation is None:
            call.edits[rules] = tokens
        return tokens.after(past, rules)


def _whole(batch: Batch, width: int, later: int) -> Batch:
    """The batch of whole prompts of which a call is fed a part: prompt_lengths and attention_mask are about the whole,
    the tensors that are left out about the part.

    Args:
        batch (`Batch`): The part.
        width (`int`): The number of columns of the whole.
        later (`int`): How many of them later calls are fed. The attention mask may lack these.
    """
    mask = batch.attention_mask
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] == width - later:
        mask = nn.functional.pad(mask, (0, later), value=1)
    shape = (batch.shape[0], width)
    batch = replace(batch, shape=shape, attention_mask=mask, labels=None)
    return replace(batch, input_ids=None, position_ids=None, cu_seq_lens=None)


def _length(rules: Rules, past: Past) -> int:
    """The number of tokens that were read before a call outside `generate`.

    Raises:
        ValueError: when the model keeps a recurrent state, which does not say it.
    """
    if past.length is None:
        raise ValueError(
            f"{rules}: this model keeps a recurrent state ({past.argument}), which does not say how far the prompt "
            "has been read. Use generate, which says it, or set positions='all'."
        )
    return past.length


def _refuse_several_tokens(batch: Batch, past: int) -> None:
    """Raise a ValueError for several tokens after a filled cache, outside `generate`: they may be a part of a prompt.
    One token is a decode step."""
    if batch.shape[1] > 1:
        raise ValueError(
            f"A forward of {batch.shape[1]} tokens continues a cache of {past}, outside `generate`. Whether they "
            f"belong to the prompt can't be known. Pass prompt_lengths [{batch.shape[0]}], the length of each whole "
            "prompt."
        )


def _refuse_late_numbers(numbered: list[int]) -> ValueError | None:
    """The error for a batch whose attention mask numbers packed sequences, where the first batch's did not."""
    if not numbered[0]:
        return None
    return ValueError(
        "The attention_mask of a batch numbers packed sequences (it holds numbers above 1), and that of the model's "
        "first batch did not. On a GPU ReFT goes by the first. Pass position_ids [batch, tokens] that restart with "
        "each sequence, as axolotl's and transformers' packing collators do."
    )


def _used_directions(rules: Rules, call: Call, batch: Batch, training: bool) -> Tensor | None:
    """The directions that each token's example uses, [F, R]. None: all of them, where the caller names no subspaces.

    Raises:
        ValueError: when a training batch names no subspaces, or a subspace is unknown.
    """
    sizes, generation = dict(rules.subspaces), call.generation
    if call.subspaces is None:
        if training:
            raise ValueError(
                f"The adapter has subspaces ({', '.join(sizes)}), and the training batch does not say which its "
                "examples use. Pass subspaces [batch] with it: numbers of groups, or names. transformers' Trainer "
                "passes on a dataset's column of that name; where rows go through a collator of your own, wrap it in "
                "peft_reft.ColumnsCollator(collator)."
            )
        return None
    if generation is None:
        used_NR = used_directions(call.subspaces, sizes, batch.sequences.count, batch.device)
        return batch.sequences.spread(used_NR).flatten(0, 1)
    used_NR = used_directions(call.subspaces, sizes, generation.rows, batch.device)
    return used_NR.repeat_interleave(batch.shape[0] // generation.rows * batch.shape[1], dim=0)
