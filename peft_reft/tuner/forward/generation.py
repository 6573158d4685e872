"""The prompts of a running `generate`, and the part of their tokens that each of its forwards is fed.

A single forward does not show where the prompt ends: with `use_cache=False` each step is fed prompt and generated
tokens together, and a chunked prefill feeds the prompt to several forwards. So the prompts are the tokens that
`generate` was called with. The tokens to edit are found once in whole prompts, and each forward edits those among the
columns that it is fed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..positions.batch import Batch, SelectedTokens, select_tokens
from ..positions.selection import Selection
from ..positions.spec import Rules
from ..positions.unedited import UneditedRows
from .transformers_api import Past, find_past_of_generate, has_second_prompt, inferred_mask, is_one_token, main_input


@dataclass
class Generation:
    """A running `generate`.

    Args:
        given (`dict`): Its arguments that only ReFT reads: `prompt_lengths`, `subspaces`, ...
        rows (`int`): The number of prompts that it was called with.
        prompts (`Batch`, *optional*): The prompts. None while they are unknown: in an encoder-decoder model, the
            decoder's prompts are the tokens that its first forward is fed.
        skips_decoding (`bool`): Whether no adapter edits anything in a decode step.
        unedited (`UneditedRows`, *optional*): Counts the prompts without a token to edit.
        fed (`int`): The number of columns that earlier forwards were fed.
    """

    given: dict[str, Any]
    rows: int
    prompts: Batch | None = None
    skips_decoding: bool = False
    unedited: UneditedRows | None = None
    fed: int = 0
    _reached: int = 0  # the same, with the columns of the running forward
    _tokens: dict[Rules, SelectedTokens] = field(default_factory=dict)  # the tokens to edit in whole prompts

    def decodes(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward is certainly a decode step: the prompts have been fed, and it is fed one token a row.

        This does not read the cache, so it may be False for a decode step.

        Args:
            arguments (`dict`): The arguments of the forward, by name.
        """
        return self.prompts is not None and self.fed >= self.prompts.shape[1] and is_one_token(arguments)

    def advance(self) -> None:
        """Count the columns of the running forward as fed, when `select` has been called for all its adapters."""
        self.fed = self._reached

    def select(self, rules: Rules, batch: Batch, continued: Past | None) -> Selection | None:
        """The tokens that an adapter edits in a forward of this `generate`.

        Args:
            rules (`Rules`): The rules of the adapter.
            batch (`Batch`): The tokens that the forward is fed.
            continued (`Past`, *optional*): The cache or recurrent state that the forward continues. A recurrent state
                does not say how many columns it has read; then they are the columns that earlier forwards were fed.
                None: the forward continues nothing, and is fed all columns again.

        Returns:
            `Selection`, *optional*: The tokens. None: the forward is a decode step.

        Raises:
            ValueError: when the rows or columns of the forward can't be matched to the prompts.
        """
        if self.prompts is None:
            self.prompts = batch
        rows, width = self.prompts.shape
        if continued is None and batch.shape[1] < width:
            raise ValueError(
                f"{rules}: within a generate of prompts of {width} tokens the model is fed {batch.shape[1]}, and no "
                "argument of it says what was read before: which of the prompt's tokens they are can't be known. "
                "Leave out what splits the prompt, such as prefill_chunk_size, or set positions='all'."
            )
        past = 0 if continued is None else self.fed if continued.length is None else continued.length
        self._reached = max(self.fed, past + batch.shape[1])
        if past >= width:
            return None  # a decode step
        if batch.shape[0] % rows != 0:
            raise ValueError(
                f"generate was given {rows} prompts, but runs {batch.shape[0]} rows at once: ReFT can't tell whose."
            )
        repeats = batch.shape[0] // rows  # beams and returned sequences repeat each row
        return self.tokens(rules).in_columns(past, batch.shape[1], repeats, rules).to(batch.device)

    def tokens(self, rules: Rules) -> SelectedTokens:
        """The tokens that an adapter edits in the whole prompts, which are known."""
        if rules not in self._tokens:
            assert self.prompts is not None
            self._tokens[rules] = select_tokens(rules, self.prompts, False, self.unedited)
        return self._tokens[rules]


def given_prompts(model: Any, args: tuple, kwargs: dict[str, Any], given: dict[str, Any]) -> Batch:
    """The prompts of a `generate` with these arguments.

    Args:
        model: The base model.
        args (`tuple`): The positional arguments of `generate`.
        kwargs (`dict`): Its keyword arguments. If they have no attention mask, this function adds the one that
            `generate` would infer, so that ReFT and `generate` use the same mask.
        given (`dict`): Its arguments that only ReFT reads.

    Raises:
        ValueError: when `generate` was called without a prompt.
    """
    tokens = given_input(model, args, kwargs)
    input_ids = tokens if tokens.dim() == 2 else kwargs.get("input_ids")
    shape = (tokens.shape[0], tokens.shape[1])
    if input_ids is not None and input_ids.shape != shape:
        input_ids = None  # the prompts are embeddings, and these ids are not their tokens
    elif input_ids is tokens and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = inferred_mask(model, input_ids, kwargs)
    inputs = {"input_ids": input_ids, "inputs_embeds": tokens, "attention_mask": kwargs.get("attention_mask")}
    prompts = Batch.from_inputs({**inputs, **given})
    assert prompts is not None
    return prompts


def given_input(model: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The input of a `generate` with these arguments: token ids [B, S], embeddings [B, S, D], or an encoder's input.

    Raises:
        ValueError: when there is none.
    """
    tensor = main_input(model, args, kwargs)
    if tensor is None:
        raise ValueError("generate was given no prompt, but ReFT edits tokens of the prompt. Pass input_ids.")
    return tensor


def refuse_unknown_prompts(model: Any, kwargs: dict[str, Any]) -> Past | None:
    """Refuse arguments with which `generate` would feed the model tokens that ReFT can't match to the prompts.

    Args:
        model: The base model.
        kwargs (`dict`): The keyword arguments of `generate`.

    Returns:
        `Past`, *optional*: The cache that `generate` continues.

    Raises:
        ValueError: naming the argument.
    """
    if has_second_prompt(model, kwargs):
        raise ValueError(
            "guidance_scale runs the model on a second prompt within generate, and ReFT can't tell it from the first. "
            "Leave guidance_scale out, or set positions='all'."
        )
    continued = find_past_of_generate(type(model).__name__, kwargs)
    if continued is not None and continued.length is None:
        raise ValueError(
            f"{continued.argument} is a recurrent state of an earlier turn, which does not say how many tokens it has "
            "read. Give generate the whole conversation without it, or set positions='all'."
        )
    return continued
