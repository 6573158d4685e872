#!/usr/bin/env python3
"""Counts the calls between files of peft_reft in a forward, a `generate`, an optimizer step and a state_dict.

    python scripts/trace_calls.py
    python scripts/trace_calls.py --layers 4 --pairs 5
    python scripts/trace_calls.py --json outputs/calls.json

A small Llama with random weights has one LoReFT adapter (f7+l7, rank 4) on every layer. Each operation runs once to
warm up, and once while Python reports every call of a Python function. A call is "crossing" when a function of one
file under peft_reft/ calls a function of another directly. Calls that come by way of torch, PEFT or transformers (a
module's `forward`, a hook) are "entered". Calls within a file are "within". A generator counts once, at its first
item.

A "training forward" follows an optimizer step, as in training, so it also makes every R orthonormal again; "forward
again" follows another forward.

Files are identified by their paths, so the script works with any layout of the package.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import peft_reft
from peft_reft import ReftConfig


PACKAGE = Path(peft_reft.__file__).parent


@dataclass
class Calls:
    """The calls of one operation.

    Args:
        pairs: (file of the caller, file of the called function) to the number of calls.
        entered: File to the number of calls of its functions from outside peft_reft.
        within: Number of calls between functions of the same file.
    """

    pairs: Counter[tuple[str, str]] = field(default_factory=Counter)
    entered: Counter[str] = field(default_factory=Counter)
    within: int = 0

    @property
    def crossing(self) -> int:
        """Number of calls from one file into another."""
        return sum(self.pairs.values())


@contextmanager
def watched() -> Iterator[Calls]:
    """Count the calls of Python functions within, in this thread."""
    calls = Calls()
    names: dict[str, str | None] = {}
    generators: set[FrameType] = set()  # those counted already: Python reports each item of a generator as a call
    inside = str(PACKAGE) + os.sep

    def file_of(frame: FrameType | None) -> str | None:
        """The path, under the package, of a frame's code. None for code elsewhere."""
        path = frame.f_code.co_filename if frame is not None else ""
        if path not in names:
            names[path] = path.removeprefix(inside) if path.startswith(inside) else None
        return names[path]

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or (called := file_of(frame)) is None:
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:
            if frame in generators:
                return
            generators.add(frame)
        caller = file_of(frame.f_back)
        if caller is None:
            calls.entered[called] += 1
        elif caller == called:
            calls.within += 1
        else:
            calls.pairs[caller, called] += 1

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def count(layers: int) -> dict[str, Calls]:
    """The calls of each operation, the second time that it runs."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=layers, max_position_embeddings=128))
    config = ReftConfig(task_type="CAUSAL_LM", r=4, positions="f7+l7", init_weights="pyreft")
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    ids = torch.randint(3, 97, (2, 40))
    labels = ids.clone()
    labels[:, :30] = -100
    mask = torch.ones_like(ids)

    def forward() -> None:
        model.train()
        model(input_ids=ids, attention_mask=mask, labels=labels)

    def prefill() -> None:
        model.eval()
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask)

    def generate() -> None:
        model.eval()
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False)

    def backward() -> None:
        model.train()
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()

    def stepped() -> None:
        backward()
        optimizer.step()

    # Operation -> (the operation that is counted, the one that runs right before it).
    todo: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "training forward": (forward, stepped),
        "forward again": (forward, forward),
        "prefill": (prefill, stepped),
        "generate, 8 tokens": (generate, stepped),
        "optimizer step": (optimizer.step, backward),
        "state_dict": (model.state_dict, stepped),
    }
    found = {}
    for name, (operation, before) in todo.items():
        before()
        operation()
        before()
        with watched() as calls:
            operation()
        found[name] = calls
    return found


def table(found: dict[str, Calls], pairs: int) -> str:
    """The totals, and for each operation the pairs of files with the most calls."""
    lines = [f"{'operation':<20} {'crossing':>9} {'entered':>9} {'within':>9}"]
    lines += [f"{n:<20} {c.crossing:>9} {sum(c.entered.values()):>9} {c.within:>9}" for n, c in found.items()]
    for name, calls in found.items():
        lines += ["", f"{name}: {calls.crossing} calls that cross a file"]
        most = calls.pairs.most_common(pairs or None)
        lines += [f"  {number:>6}  {caller} -> {called}" for (caller, called), number in most]
        rest = calls.crossing - sum(number for _, number in most)
        lines += [f"  {rest:>6}  between {len(calls.pairs) - len(most)} other pairs"] if rest else []
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32, help="of the Llama (default: 32)")
    parser.add_argument(
        "--pairs", type=int, default=0, help="pairs of files to list, the most called first (default: all)"
    )
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    options = parser.parse_args()
    found = count(options.layers)
    python = ".".join(map(str, sys.version_info[:3]))
    print(f"peft-reft {version('peft-reft')}, {options.layers} layers, Python {python}, torch {torch.__version__}\n")
    print(table(found, options.pairs))
    if options.json:
        written = {
            name: {**asdict(calls), "pairs": {" -> ".join(pair): number for pair, number in calls.pairs.items()}}
            for name, calls in found.items()
        }
        options.json.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
