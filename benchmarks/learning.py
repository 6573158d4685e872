"""Compares learning with R kept orthonormal in two ways, on the same data, in the same order, from the same start.

Ours: R itself is the parameter, and a retraction makes its rows orthonormal again after each step. The other is
pyreft's: torch's Householder parametrization (`torch.nn.utils.parametrizations.orthogonal`), where the optimizer steps
a free parameter. Both start at the base model, from the same R and W.

Dimensions: G sets of weights (first and last tokens), R rank, D width.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal
from transformers import AutoModelForCausalLM, AutoTokenizer


IGNORED = -100


class HouseholderEdit(nn.Module):
    """A plain LoReFT around a block: first and last tokens have weights of their own."""

    def __init__(self, block: nn.Module, R_GRD: Tensor, tokens: int) -> None:
        super().__init__()
        self.block, self.tokens = block, tokens
        self.columns: list[list[list[int]]] = []  # for each row: those of its first tokens, those of its last
        groups, rank, width = R_GRD.shape
        self.rotate = nn.ModuleList()
        self.source = nn.ModuleList()
        for R_RD in R_GRD:
            rotate, source = nn.Linear(width, rank, bias=False), nn.Linear(width, rank)
            orthogonal(rotate, orthogonal_map="householder")
            rotate.weight = R_RD.clone()
            with torch.no_grad():
                source.weight.copy_(R_RD)
                source.bias.zero_()
            self.rotate.append(rotate)
            self.source.append(source)

    @property
    def R_GRD(self) -> Tensor:
        """R of both sets [G, r, D], which the parametrization computes."""
        return torch.stack([cast(Tensor, rotate.weight) for rotate in self.rotate])

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        h = self.block(*args, **kwargs).clone()
        for row, sides in enumerate(self.columns):
            for g, columns in enumerate(sides):
                own, R = h[row, columns], self.rotate[g].weight
                h[row, columns] = own + (self.source[g](own) - own @ R.mT) @ R
        return h


def read_rows(files: list[Path], count: int, seed: int) -> list[dict[str, str]]:
    """`count` examples of LLM-Adapters' files, shuffled, the same number of each file."""
    chosen = []
    for file in files:
        rows = json.loads(file.read_text())
        random.Random(seed).shuffle(rows)
        chosen += rows[: count // len(files)]
    random.Random(seed).shuffle(chosen)
    return chosen


def encode(rows: list[dict[str, str]], tokenizer: Any) -> dict[str, Tensor]:
    """A batch [B, S], padded on the right, with labels at the answers."""
    encoded = []
    for row in rows:
        prompt = tokenizer(f"{row['instruction']}\n\n### Response:\n")["input_ids"]
        answer = tokenizer(row["output"])["input_ids"] + [tokenizer.eos_token_id]
        encoded.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    width = max(len(ids) for ids, _ in encoded)

    def padded(values: list[int], filler: int) -> list[int]:
        return values + [filler] * (width - len(values))

    return {
        "input_ids": torch.tensor([padded(ids, 0) for ids, _ in encoded]),
        "attention_mask": torch.tensor([padded([1] * len(ids), 0) for ids, _ in encoded]),
        "labels": torch.tensor([padded(labels, IGNORED) for _, labels in encoded]),
    }


def columns_to_edit(batch: dict[str, Tensor], tokens: int) -> list[list[list[int]]]:
    """For each row, the columns of its prompt's first and last tokens. The prompts are long enough for both."""
    found = []
    for row in batch["labels"]:
        length = int((row != IGNORED).int().argmax())
        found.append([list(range(tokens)), list(range(length - tokens, length))])
    return found


def train(
    way: str,
    base: str,
    files: list[Path],
    *,
    seed: int,
    examples: int,
    rank: int,
    rate: float,
    tokens: int,
    batch: int,
) -> dict[str, Any]:
    """Train one epoch.

    Args:
        way (`str`): `"ours"` or `"householder"`.
        base (`str`): A folder or hub name of a causal language model.
        files (`list[Path]`): Examples, as LLM-Adapters has them.
        seed (`int`): Seed of the start and of the data's order.
        examples (`int`): How many examples.
        rank (`int`): r.
        rate (`float`): The learning rate.
        tokens (`int`): How many first and how many last tokens are edited.
        batch (`int`): Rows of a batch.

    Returns:
        `dict`: `losses` of all steps; `off`, the largest entry of |R Rᵀ − I| at the end; `trained`, the number of
            parameters.
    """
    from peft import get_peft_model

    import peft_reft

    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).requires_grad_(False)
    torch.manual_seed(seed)
    config = peft_reft.ReftConfig(r=rank, positions=f"f{tokens}+l{tokens}", task_type="CAUSAL_LM")
    ours: Any = get_peft_model(model, config).train()
    layers = ours.get_base_model().model.layers
    edits: list[HouseholderEdit] = []
    if way == "householder":
        starts = [layer.reft_R["default"].detach().clone() for layer in layers]
        model = ours.unload()
        for index, R in enumerate(starts):
            model.model.layers[index] = edit = HouseholderEdit(model.model.layers[index], R, tokens)
            edits.append(edit)
    run = ours if way == "ours" else model
    trained = [parameter for parameter in run.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=True)
    rows = read_rows(files, examples, seed)
    losses = []
    for start in range(0, len(rows) - batch + 1, batch):
        inputs = encode(rows[start : start + batch], tokenizer)
        for edit in edits:
            edit.columns = columns_to_edit(inputs, tokens)
        loss = run(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    if way == "ours":
        ours.state_dict()  # saving makes R orthonormal after the last step
        trained_R = [layer.reft_R["default"] for layer in layers]
    else:
        trained_R = [edit.R_GRD for edit in edits]
    off = max((R @ R.mT - torch.eye(rank)).abs().max().item() for R in trained_R)
    return {"losses": losses, "off": off, "trained": sum(parameter.numel() for parameter in trained)}
