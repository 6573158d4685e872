"""The prompts of a running `generate`, and those of their tokens that one forward in it is fed.

A forward alone cannot tell the prompt while generating: with `use_cache=False` every step is a full pass, and a chunked
prefill is several. So the prompt is what `generate` was given. Its columns are numbered once, and every forward edits
those of them that it is fed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..positions.batch import Batch, SelectedTokens, select_tokens
from ..positions.selection import Selection
from ..positions.spec import Rules
from .transformers_api import Past, find_past_of_generate, has_second_prompt, inferred_mask, is_one_token, main_input


@dataclass
class Generation:
    """A running `generate`.

    Args:
        told (`dict`): What it was told of its prompts besides the tokens: `prompt_lengths`, `subspaces`, ...
        rows (`int`): How many prompts it was given.
        prompts (`Batch`, *optional*): The tokens that it was given, None while they are not known: a decoder's prompt,
            in an encoder-decoder model, is what its first forward is fed.
        skips_decoding (`bool`): Whether no adapter edits anything in a decode step.
    """

    told: dict[str, Any]
    rows: int
    prompts: Batch | None = None
    skips_decoding: bool = False
    fed: int = 0  # columns that earlier forwards were fed
    _reached: int = 0
    _tokens: dict[Rules, SelectedTokens] = field(default_factory=dict)

    def decodes(self, arguments: dict[str, Any]) -> bool:
        """Whether a forward is a decode step, as far as can be told without asking the cache."""
        return self.prompts is not None and self.fed >= self.prompts.shape[1] and is_one_token(arguments)

    def advance(self) -> None:
        """A forward has found the tokens of all its adapters."""
        self.fed = self._reached

    def select(self, rules: Rules, batch: Batch, continued: Past | None) -> Selection | None:
        """The tokens that an adapter edits in a forward.

        Args:
            rules (`Rules`): Those of the adapter.
            batch (`Batch`): What the forward is fed: the columns that follow those which it continues.
            continued (`Past`, *optional*): What it continues. A recurrent state does not say how many columns those are: all that
                earlier forwards were fed. None: nothing, and then it is fed all columns again.

        Raises:
            ValueError: when the forward has rows or columns that can't be traced to a prompt.
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
        if rules not in self._tokens:
            self._tokens[rules] = select_tokens(rules, self.prompts, training=False)
        repeats = batch.shape[0] // rows  # beams and returned sequences repeat each row
        return self._tokens[rules].in_columns(past, batch.shape[1], repeats, rules).to(batch.device)


def given_prompts(model: Any, args: tuple, kwargs: dict[str, Any], told: dict[str, Any]) -> Batch:
    """The prompts that a `generate` with these arguments is given.

    Fills in an attention mask where there is none, as `generate` itself would, so that both go by the same one.
    """
    tokens = given_input(model, args, kwargs)
    input_ids = tokens if tokens.dim() == 2 else kwargs.get("input_ids")
    shape = (tokens.shape[0], tokens.shape[1])
    if input_ids is not None and input_ids.shape != shape:
        input_ids = None  # embeddings alone
    elif input_ids is tokens and kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = inferred_mask(model, input_ids, kwargs)
    return Batch(
        shape,
        tokens.device,
        input_ids=input_ids,
        attention_mask=kwargs.get("attention_mask"),
        prompt_lengths=told.get("prompt_lengths"),
        intervention_mask=told.get("intervention_mask"),
    )


def given_input(model: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a `generate` with these arguments is given.

    Raises:
        ValueError: when it is given nothing.
    """
    given = main_input(model, args, kwargs)
    if given is None:
        raise ValueError("generate was given no prompt, but ReFT edits tokens of the prompt. Pass input_ids.")
    return given


def refuse_unknown_prompts(model: Any, kwargs: dict[str, Any]) -> None:
    """Ways to generate that feed the model tokens whose place in the prompt can't be told.

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
