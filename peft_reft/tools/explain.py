"""Seeing which tokens are edited: `explain_positions`, for a batch before or after training."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from ..tuner.config import ReftConfig
from ..tuner.forward.context import ForwardContext
from ..tuner.positions.batch import Batch, select_tokens
from ..tuner.positions.prompts import IGNORED_LABEL
from ..tuner.positions.spec import Rules


STYLES = {"F": "bold green", "L": "bold magenta", "prompt": "", "answer": "dim"}
SOURCES = {
    "all tokens": "all of it is prompt, for nothing says otherwise",
    "intervention_mask": "the tokens are told by intervention_mask",
}
READ = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "cu_seq_lens_q",
    "labels",
    "prompt_lengths",
    "intervention_mask",
)
LEGEND = "F[ ] first token  L[ ] last token  » an answer begins  « a prompt begins again"


@dataclass(frozen=True)
class ExplainedSequence:
    """One sequence of a batch, and what is edited in it.

    Args:
        row (`int`): Its row in the batch.
        begin (`int`): The column of its first token.
        ids (`list[int]`): Its tokens, padding left out.
        tokens (`list[str]`): Their texts.
        first, last (`list[int]`): Places in `ids` that are edited as first and as last tokens. Of `positions="all"`, all are
            in `first`.
        prompt (`list[int]`): Places in `ids` that belong to a prompt.
        trained (`list[int]`): Places in `ids` that have a label.
        source (`str`): What said where the prompt is: `"labels"`, `"response_template"`, `"prompt_lengths"`,
            `"intervention_mask"`, or `"all tokens"`.
    """

    row: int
    begin: int
    ids: list[int]
    tokens: list[str]
    first: list[int]
    last: list[int]
    prompt: list[int]
    trained: list[int]
    source: str

    @property
    def warnings(self) -> list[str]:
        """What looks wrong."""
        found = []
        if not self.first and not self.last:
            found.append("no token is edited")
        # Where prompts are masked, a token that is learnt belongs to an answer.
        if 0 not in self.trained and (answers := sorted({*self.first, *self.last} & {*self.trained})):
            found.append(f"edited tokens are part of an answer, which generation would not edit: {answers}")
        return found

    def __rich__(self) -> Text:
        """Tokens as F[...] and L[...] where they are edited, and bars where an answer begins and ends."""
        text = Text(f"row {self.row}, tokens {self.begin} to {self.begin + len(self.ids) - 1}; ", style="bold")
        text.append(SOURCES.get(self.source, f"the prompt is told by {self.source}") + "\n  ", style="not bold")
        was_prompt = True
        for place, token in enumerate(self.tokens):
            is_prompt = place in self.prompt or self.source == "intervention_mask"
            if is_prompt != was_prompt:
                text.append("«" if is_prompt else "»", style="bold yellow")
            was_prompt = is_prompt
            shown = token.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
            mark = "F" if place in self.first else "L" if place in self.last else None
            style = "prompt" if is_prompt else "answer"
            text.append(f"{mark}[{shown}]" if mark else shown, style=STYLES[mark or style])
        for warning in self.warnings:
            text.append(f"\n  Warning: {warning}", style="bold red")
        return text


def explain_positions(
    model_or_config: nn.Module | ReftConfig,
    tokenizer: Any,
    batch: Mapping[str, Any],
    *,
    file: TextIO | None = None,
    quiet: bool = False,
) -> list[ExplainedSequence]:
    """Print each sequence of a batch with its edited tokens marked, and return the same as data.

    Args:
        model_or_config (`torch.nn.Module` or `ReftConfig`): A model with a ReFT adapter, whose active one is taken, or the
            config of one that is still to be made.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer that made the batch.
        batch (`Mapping`): What the model would be given: `input_ids` [B, S], and what else there is of `attention_mask`,
            `labels`, `position_ids`, `prompt_lengths`, ... as tensors or lists.
        file (`TextIO`, *optional*): Where to print. Coloured where it is a terminal. None: standard output.
        quiet (`bool`): Whether not to print.

    Returns:
        `list[ExplainedSequence]`: The sequences, in the order of the batch, packed rows split.

    Raises:
        ValueError: when the batch does not say where its prompts are, as training would.
    """
    config, rules = _config_and_rules(model_or_config, tokenizer)
    tensors = {
        key: value.detach().cpu() if isinstance(value, Tensor) else torch.tensor(value)
        for key, value in batch.items()
        if key in READ and value is not None
    }
    if "input_ids" not in tensors:
        raise ValueError(
            f"explain_positions shows tokens by their ids, and the batch has no input_ids: {sorted(batch)}."
        )
    if not rules.reads_labels:
        tensors.pop("labels", None)
    given = Batch.from_inputs(tensors)
    assert given is not None
    explained = _explain(rules, given, tokenizer)
    if not quiet:
        console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True, markup=False)
        console.print(f"positions={config.positions!r}. {LEGEND}")
        for sequence in explained:
            console.print(sequence)
    return explained


def _config_and_rules(model_or_config: Any, tokenizer: Any) -> tuple[ReftConfig, Rules]:
    if isinstance(model_or_config, ReftConfig):
        config = model_or_config
        rules = config.rules(lambda: tokenizer, tokenizer.eos_token_id, can_generate=True)
        encodes = config.task_type == "SEQ_2_SEQ_LM"
    else:
        context = ForwardContext.of(model_or_config)
        layers: list[Any] = [] if context is None else context.layers
        active = [name for layer in layers for name in layer.active_adapters if name in layer.reft_config]
        if context is None or not active:
            raise ValueError(
                f"{type(model_or_config).__name__} has no active ReFT adapter. Add one, or pass a ReftConfig."
            )
        config = next(layer.reft_config[active[0]] for layer in layers if active[0] in layer.reft_config)
        rules, encodes = context.rules[active[0]], context.has_encoder
    # Of an encoder-decoder model, what is shown is what the encoder is given.
    return config, replace(rules, reads_labels=False) if encodes else rules


def _explain(rules: Rules, batch: Batch, tokenizer: Any) -> list[ExplainedSequence]:
    sequences = batch.sequences
    if rules.spec.all_tokens:
        first_BS, last_BS = sequences.real_BS, torch.zeros_like(sequences.real_BS)
        prompt_BS, source = sequences.real_BS, "all tokens"
    else:
        selected = select_tokens(rules, batch, training=False)
        first_BS, last_BS, source = selected.first_BS, selected.last_BS, selected.origin
        prompt_BS = sequences.real_BS if selected.prompt_BS is None else selected.prompt_BS
    trained_BS = torch.zeros_like(prompt_BS) if batch.labels is None else batch.labels != IGNORED_LABEL
    explained = []
    number_BS = (sequences.start_BS & sequences.real_BS).cumsum(dim=1)
    assert batch.input_ids is not None
    for row in range(batch.shape[0]):
        for number in range(1, int(number_BS[row].max()) + 1):
            columns = (sequences.real_BS[row] & (number_BS[row] == number)).nonzero().flatten()

            def places(mask_BS: Tensor, row: int = row, columns: Tensor = columns) -> list[int]:
                return mask_BS[row, columns].nonzero().flatten().tolist()

            ids = batch.input_ids[row, columns].tolist()
            explained.append(
                ExplainedSequence(
                    row=row,
                    begin=int(columns[0]),
                    ids=ids,
                    tokens=[tokenizer.decode([index]) if index >= 0 else f"<{index}>" for index in ids],
                    first=places(first_BS),
                    last=places(last_BS),
                    prompt=places(prompt_BS),
                    trained=places(trained_BS),
                    source=source,
                )
            )
    return explained
