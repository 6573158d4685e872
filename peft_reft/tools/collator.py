"""Data collators: one tells the model where prompts end, one keeps the columns that only ReFT reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tuner.positions.batch import REFT_ARGUMENTS, Batch
from ..tuner.positions.prompts import IGNORED_LABEL, by_labels, total_within
from ..tuner.positions.subspaces import mask_of_names


class _Wrapper:
    """A wrapped data collator, whose attributes can be read from the wrapper."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # unpickling asks for attributes before this one is set
            raise AttributeError(name)
        return getattr(self.collator, name)


class PromptLengthsCollator(_Wrapper):
    """Wraps a data collator, and adds `prompt_lengths` to each of its batches.

    Trainers that learn from preferences, TRL's DPOTrainer and KTOTrainer among them, pass the model no labels, but
    pass on every key of a batch that they do not know themselves. `prompt_lengths` [B] (int64), the number of tokens
    before the first answer, comes from `completion_mask` or else `labels`, both [B, S]. Packed rows give one length
    for each sequence.

    Args:
        collator (`Callable`): The collator to wrap. Its attributes can be read from the wrapper.

    Example:

        ```py
        >>> trainer = DPOTrainer(model, args=args, train_dataset=data, peft_config=ReftConfig(task_type="CAUSAL_LM"))
        >>> trainer.data_collator = PromptLengthsCollator(trainer.data_collator)
        >>> trainer.train()
        ```
    """

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.collator(*args, **kwargs)
        if "prompt_lengths" not in batch:
            batch["prompt_lengths"] = prompt_lengths(batch)
        return batch


class ColumnsCollator(_Wrapper):
    """Wraps a data collator, and takes the columns past it that only ReFT reads: `prompt_lengths`,
    `intervention_mask` and `subspaces`, which other collators drop or can't turn into tensors.

    transformers' Trainer, and trainers that derive from it, wrap their collator by themselves. Use this in a
    DataLoader of your own.

    Args:
        collator (`Callable`): The collator to wrap. Its attributes can be read from the wrapper. Rows without such
            columns are given to it as they are.
        subspaces (`Sequence[str]`, *optional*): The names of the adapter's subspaces. With them names in the column
            become a tensor [batch, subspaces] of 0 and 1, else they stay names.
        by_completion (`str`, *optional*): `"keep_start"` or `"keep_end"`: the `completion_mask` of rows with labels
            gives their `prompt_lengths`, and goes no further. The text says which part of a row that was cut off was
            kept; its mask may be as long as it was. None: the column is not read.

    Raises:
        ValueError: when a row's `intervention_mask` has another length than its tokens in the batch.
    """

    def __init__(
        self, collator: Any, subspaces: Sequence[str] | None = None, by_completion: str | None = None
    ) -> None:
        super().__init__(collator)
        self.subspaces = subspaces
        self.by_completion = by_completion

    def __call__(self, features: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(features, list) or not all(isinstance(row, Mapping) for row in features):
            return self.collator(features, *args, **kwargs)
        if self.by_completion:
            features = [_told_by_completion(row, self.by_completion) for row in features]
        columns = {
            name: [row[name] for row in features]
            for name in REFT_ARGUMENTS
            if features and all(row.get(name) is not None for row in features)
        }
        if not columns:
            return self.collator(features, *args, **kwargs)
        rows = [{key: value for key, value in row.items() if key not in columns} for row in features]
        batch = self.collator(rows, *args, **kwargs)
        for name, values in columns.items():
            if name == "intervention_mask":
                batch[name] = _aligned(values, batch)
            elif name == "subspaces" and any(isinstance(value, str) for value in values):
                batch[name] = values if self.subspaces is None else mask_of_names(values, list(self.subspaces))
            else:
                tensors = [torch.as_tensor(value) for value in values]
                # A column of prompt_lengths may hold the lengths of a packed row's sequences.
                flat = name == "prompt_lengths" and tensors[0].dim() > 0
                batch[name] = torch.cat(tensors) if flat else torch.stack(tensors)
        return batch


def _told_by_completion(row: Mapping[str, Any], kept: str) -> Mapping[str, Any]:
    """A row with `prompt_lengths`, the number of tokens before its completion, in place of `completion_mask`."""
    if "completion_mask" not in row or "labels" not in row or "prompt_lengths" in row:
        return row
    length = len(row["input_ids"])
    mask = list(row["completion_mask"])
    mask = mask[-length:] if kept == "keep_end" else mask[:length]
    told = {key: value for key, value in row.items() if key != "completion_mask"}
    return {**told, "prompt_lengths": mask.index(1) if 1 in mask else len(mask)}


def _aligned(values: list[Any], batch: Mapping[str, Any]) -> Tensor:
    """The masks of the rows at the columns of their tokens in a batch, [B, S]. Padding gets 0."""
    masks = [torch.as_tensor(value) for value in values]
    ids = batch["input_ids"]
    real_BS = batch["attention_mask"] != 0 if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)
    lengths = real_BS.sum(dim=1).tolist()
    given = [len(mask) for mask in masks]
    if given != lengths and not (len(lengths) == 1 and sum(given) == lengths[0]):
        raise ValueError(
            f"The rows of a batch have intervention_mask of {given} entries, and {lengths} tokens. Give each row one "
            "entry for each of its tokens, cut off where the row is cut off."
        )
    aligned_BS = torch.zeros(real_BS.shape, dtype=masks[0].dtype)
    aligned_BS[real_BS] = torch.cat(masks)
    return aligned_BS


def prompt_lengths(batch: Mapping[str, Any]) -> Tensor:
    """The number of prompt tokens of each sequence of a batch.

    Args:
        batch (`Mapping`): `completion_mask` or `labels`, both [B, S], and, where it has them, `attention_mask`,
            `position_ids` and `cu_seq_lens_q`. A sequence without an answer is all prompt.

    Returns:
        `torch.Tensor`: int64, [B], or [N] for packed rows that hold N sequences, in their order.

    Raises:
        ValueError: when the batch has neither `completion_mask` nor `labels`.
    """
    if "completion_mask" in batch:
        labels = torch.where(batch["completion_mask"].bool(), 0, IGNORED_LABEL)
    elif "labels" in batch and batch["labels"].dim() == 2:
        labels = batch["labels"]
    else:
        raise ValueError(
            f"The batch has keys {sorted(batch)}, and neither completion_mask [batch, tokens] nor labels [batch, "
            "tokens], from which PromptLengthsCollator finds the prompts. Add prompt_lengths [batch] in your own "
            "collator, or set response_template in ReftConfig, the text that answers begin after."
        )
    tokens = Batch.from_inputs({**batch, "labels": labels})
    assert tokens is not None
    sequences = tokens.sequences
    prompt_BS = by_labels(sequences, labels, every=False).prompt_BS
    if not sequences.packed:
        return prompt_BS.sum(dim=1)
    return total_within(prompt_BS, sequences.start_BS)[sequences.start_BS & sequences.real_BS]
