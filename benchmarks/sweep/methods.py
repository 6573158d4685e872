"""Puts a method on a model: an intervention of ReFT, LoRA, the classifier alone, or every weight."""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, get_peft_model

from peft_reft import ReftConfig

from .settings import Run


def apply_method(run: Run, model: Any, task_type: str) -> Any:
    """The model with the trained weights of a run's method, and nothing else to train.

    Args:
        run (`Run`): The settings.
        model (`PreTrainedModel`): The base.
        task_type (`str`): PEFT's. With `"SEQ_CLS"` the classifier is trained too, with every method.
    """
    if run.method == "full":
        return model
    if run.method in ("head", "base"):
        model.base_model.requires_grad_(False)
        return model
    indices = layer_indices(run.layers, model.config.num_hidden_layers)
    if run.method == "lora":
        config = LoraConfig(
            r=run.rank,
            lora_alpha=2 * run.rank,
            lora_dropout=run.dropout,
            # The usual choices: q and v of an encoder, every linear layer of a language model.
            target_modules=["query", "value"] if task_type == "SEQ_CLS" else "all-linear",
            layers_to_transform=indices,
            task_type=task_type,
        )
        return get_peft_model(model, config)
    edit = ReftConfig(
        r=run.rank,
        intervention=run.method,
        positions=run.positions,
        share_weights=run.share_weights,
        dropout=run.dropout,
        init_weights="pyreft" if run.init == "pyreft" else True,
        layers_to_transform=indices,
        response_template=None,  # the sweep says of each batch where its prompts are
        task_type=task_type,
    )
    return get_peft_model(model, edit)


def layer_indices(text: str, count: int) -> list[int] | None:
    """The indices of the layers that a text names, of `count` layers.

    `"all"`: every layer (None). `"every 3rd"`: the third, the sixth and so on. `"lower half"`, `"upper half"`.
    `"first"`, `"middle"`, `"last"`: one layer.

    Raises:
        ValueError: for any other text.
    """
    if text == "all":
        return None
    one = {"first": 0, "middle": count // 2, "last": count - 1}
    if text in one:
        return [one[text]]
    if text in ("lower half", "upper half"):
        return list(range(count // 2)) if text == "lower half" else list(range(count // 2, count))
    match = re.fullmatch(r"every (\d+)(?:nd|rd|th)", text)
    if match is None:
        raise ValueError(f"layers={text!r}: write all, every 3rd, lower half, upper half, first, middle or last.")
    step = int(match[1])
    return list(range(step - 1, count, step))


def count_trained(model: Any) -> int:
    """The number of trained weights, without a classifier, which every method trains."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not {"classifier", "score"} & set(name.split("."))
    )
