"""`explain_positions`: shows which tokens of a batch an adapter edits, before or after training."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor, nn

from ..tuner.config import ReftConfig
from ..tuner.forward.context import ForwardContext
from ..tuner.positions.batch import Batch, select_tokens
from ..tuner.positions.prompts import IGNORED_LABEL, TEMPLATE_OR_LABELS
from ..tuner.positions.spec import Rules


if TYPE_CHECKING:
    from rich.text import Text


STYLES = {"F": "bold green", "L": "bold magenta", "prompt": "", "answer": "dim"}
# What the heading of a sequence says, by `ExplainedSequence.source`.
SOURCES = {
    "all tokens": "all of it is prompt, for nothing says otherwise",
    "intervention_mask": "the tokens are told by intervention_mask",
}
# The arguments of a forward that tokens are selected by. The rest of a batch is not looked at.
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
    """One sequence of a batch and its edited tokens.

    Args:
        row (`int`): Its row in the batch.
        begin (`int`): The column of its first token.
        ids (`list[int]`): Its tokens, padding left out.
        tokens (`list[str]`): Their texts.
        first, last (`list[int]`): Indices into `ids` of the tokens that are edited as first and as last tokens. With
            `positions="all"`, all are in `first`.
        prompt (`list[int]`): Indices into `ids` of the tokens that belong to a prompt.
        trained (`list[int]`): Indices into `ids` of the tokens that have a label.
        source (`str`): Where the prompt was read from: `"labels"`, `"response_template"`, `"prompt_lengths"`,
            `"intervention_mask"`, or `"all tokens"` where nothing marks it.
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
        """Sentences about edits that are probably not what the user wants."""
        found = []
        if not self.first and not self.last:
            short = len(self.prompt) == 1 and self.source != "intervention_mask"
            why = ", for a prompt of one token has none for both first and last tokens" if short else ""
            found.append(f"no token is edited{why}")
        # With a label on the first token, prompts are trained too. Else each token with a label is an answer's.
        if 0 not in self.trained and (answers := sorted({*self.first, *self.last} & {*self.trained})):
            found.append(f"edited tokens are part of an answer, which generation would not edit: {answers}")
        return found

    def __rich__(self) -> Text:
        """The text that `explain_positions` prints: edited tokens as F[...] and L[...], » and « around answers."""
        from rich.text import (
            Text,
        )  # here and below: an import of PEFT imports this module, and few processes show tokens

        text = Text(f"row {self.row}, tokens {self.begin} to {self.begin + len(self.ids) - 1}; ", style="bold")
        text.append(SOURCES.get(self.source, f"the prompt is told by {self.source}") + "\n  ", style="not bold")
        was_prompt = True
        for index, token in enumerate(self.tokens):
            is_prompt = index in self.prompt or self.source == "intervention_mask"
            if is_prompt != was_prompt:
                text.append("«" if is_prompt else "»", style="bold yellow")
            was_prompt = is_prompt
            shown = token.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
            mark = "F" if index in self.first else "L" if index in self.last else None
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
        model_or_config (`torch.nn.Module` or `ReftConfig`): A model, whose active ReFT adapter is explained, or the
            config of an adapter that is still to be made.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer that made the batch.
        batch (`Mapping`): The arguments of the model's forward, as tensors or lists: `input_ids` [B, S], and, where
            the batch has them, `attention_mask`, `position_ids`, `labels` and `intervention_mask` [B, S],
            `prompt_lengths` [B] and `cu_seq_lens_q`.
        file (`TextIO`, *optional*): The file to print to, in colour if it is a terminal. None: standard output.
        quiet (`bool`): Whether to print nothing.

    Returns:
        `list[ExplainedSequence]`: The sequences, in the order of the batch, packed rows split.

    Raises:
        ValueError: when the batch has no `input_ids`, when the model has no active ReFT adapter, or as a
            forward would: when labels, lengths or masks do not fit the batch.
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
        from rich.console import Console

        console = Console(file=file or sys.stdout, highlight=False, soft_wrap=True, markup=False)
        console.print(f"positions={config.positions!r}. {LEGEND}")
        for sequence in explained:
            console.print(sequence)
        unedited = sum(not sequence.first and not sequence.last for sequence in explained)
        if unedited:
            console.print(
                f"{unedited} of {len(explained)} sequences have no token that is edited. Training passes such rows "
                "over, and is an error where its first batches have no others.",
                style="bold red",
            )
    return explained


def _config_and_rules(model_or_config: Any, tokenizer: Any) -> tuple[ReftConfig, Rules]:
    """The config of the adapter that is explained, and the rules by which it selects tokens."""
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
    # Of an encoder-decoder model the encoder's tokens are shown, and `labels` are the decoder's.
    return config, replace(rules, reads_labels=False) if encodes else rules


def _explain(rules: Rules, batch: Batch, tokenizer: Any) -> list[ExplainedSequence]:
    """The sequences of a batch. Dimensions: B rows of the batch, S tokens of a row."""
    sequences = batch.sequences
    if rules.spec.all_tokens:
        first_BS, last_BS = sequences.real_BS, torch.zeros_like(sequences.real_BS)
        prompt_BS, source = sequences.real_BS, "all tokens"
    else:
        selected = select_tokens(rules, batch, training=False)
        first_BS, last_BS, source = selected.first_BS, selected.last_BS, selected.origin
        prompt_BS = sequences.real_BS if selected.prompt_BS is None else selected.prompt_BS
    ends_BS = torch.zeros_like(prompt_BS)
    if source == TEMPLATE_OR_LABELS and rules.template is not None and batch.input_ids is not None:
        ends_BS = rules.template.matches(batch.input_ids, sequences.start_BS) & prompt_BS
    trained_BS = torch.zeros_like(prompt_BS) if batch.labels is None else batch.labels != IGNORED_LABEL
    explained = []
    # The number of each token's sequence in its row, from 1.
    number_BS = (sequences.start_BS & sequences.real_BS).cumsum(dim=1)
    assert batch.input_ids is not None
    for row in range(batch.shape[0]):
        for number in range(1, int(number_BS[row].max()) + 1):
            columns = (sequences.real_BS[row] & (number_BS[row] == number)).nonzero().flatten()

            def indices(mask_BS: Tensor, row: int = row, columns: Tensor = columns) -> list[int]:
                return mask_BS[row, columns].nonzero().flatten().tolist()

            ids = batch.input_ids[row, columns].tolist()
            own = source
            if source == TEMPLATE_OR_LABELS:
                own = "response_template" if indices(ends_BS) else "labels"
            explained.append(
                ExplainedSequence(
                    row=row,
                    begin=int(columns[0]),
                    ids=ids,
                    tokens=[tokenizer.decode([index]) if index >= 0 else f"<{index}>" for index in ids],
                    first=indices(first_BS),
                    last=indices(last_BS),
                    prompt=indices(prompt_BS),
                    trained=indices(trained_BS),
                    source=own,
                )
            )
    return explained
