"""A data collator that tells the model where prompts end, for trainers that don't pass it labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..tuner.positions.batch import Batch
from ..tuner.positions.prompts import IGNORED_LABEL, by_labels, total_within


class PromptLengthsCollator:
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

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = self.collator(*args, **kwargs)
        if "prompt_lengths" not in batch:
            batch["prompt_lengths"] = prompt_lengths(batch)
        return batch

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # unpickling asks for attributes before this one is set
            raise AttributeError(name)
        return getattr(self.collator, name)


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
