"""The decoder layers of a model in vLLM: which modules they are, and what they return.

vLLM's decoder layers return hidden states in one of three ways. In most families the block's output is the sum of a
pair, hidden + residual, that the next norm adds up. In some it is the pair's first element, and in some the layer
returns a tensor alone. `find_layout` tells which, from the layer's code and a probe of the model's norm.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn


Layout = Literal["sum", "first", "alone"]


def find_blocks(model: nn.Module, count: int) -> tuple[str, dict[str, nn.Module]]:
    """The decoder layers of a model, by their names in it.

    Args:
        model (`torch.nn.Module`): The model, as vLLM loaded it. With pipeline parallelism the layers of other ranks
            are placeholders.
        count (`int`): The number of layers, of all ranks.

    Returns:
        `tuple[str, dict[str, torch.nn.Module]]`: The name of the module that owns the layers, and the layers.

    Raises:
        ValueError: when there is not exactly one list of as many layers.
    """
    found = {
        f"{name}.{attribute}".lstrip("."): (name, child)
        for name, module in model.named_modules()
        if hasattr(module, "start_layer") and hasattr(module, "end_layer")
        for attribute, child in module.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == count
    }
    if len(found) != 1:
        raise ValueError(
            f"ReFT adapters are not supported on {type(model).__name__}: {len(found)} lists of {count} decoder layers "
            f"were found in it ({', '.join(found) or 'none'}), and one was expected."
        )
    ((name, (owner, layers)),) = found.items()
    return owner, {f"{name}.{index}": layer for index, layer in enumerate(layers)}


def find_layout(owner: nn.Module, block: nn.Module) -> Layout:
    """What a decoder layer returns.

    Args:
        owner (`torch.nn.Module`): The module that calls the layers and the final norm.
        block (`torch.nn.Module`): A decoder layer.

    Raises:
        ValueError: when it is neither of the three known layouts.
    """
    returned = _returned(type(block).forward)
    if returned == {1}:
        return "alone"
    if returned != {2}:
        raise _unknown(block, f"its forward returns {_in_words(returned)}")
    norm = getattr(owner, "norm", None) or getattr(owner, "final_layernorm", None) or getattr(owner, "ln_f", None)
    weight = getattr(norm, "weight", None)
    if norm is None or not isinstance(weight, Tensor):
        raise _unknown(block, f"{type(owner).__name__} has no final norm that tells how the pair is added up")
    generator = torch.Generator().manual_seed(0)
    shape = (2, weight.numel())
    a, b = (torch.randn(shape, generator=generator).to(weight.device, weight.dtype) for _ in range(2))
    code = inspect.getsource(type(owner).forward)
    attribute = next(name for name, child in owner.named_children() if child is norm)
    if f"self.{attribute}(hidden_states, residual)" not in code:
        raise _unknown(block, f"{type(owner).__name__}.forward does not pass the pair to its final norm")
    with torch.inference_mode():
        of_pair, of_sum, of_first = (
            _first(norm(x.clone(), y.clone())).float() for x, y in ((a, b), (a + b, b * 0), (a, b * 0))
        )
    # Of random states, the wrong reading is off by about its own size, and the right one by rounding: 1 % in bfloat16.
    is_sum, is_first = ((of_pair - read).norm() < 0.05 * of_pair.norm() for read in (of_sum, of_first))
    if is_sum == is_first:
        raise _unknown(block, "its final norm neither adds up the pair nor reads its first element alone")
    return "sum" if is_sum else "first"


def _unknown(block: nn.Module, why: str) -> ValueError:
    return ValueError(
        f"ReFT adapters are not supported on {type(block).__name__}: what it returns is unknown, for {why}."
    )


def _in_words(returned: set[int | None]) -> str:
    return " or ".join("something unknown" if n is None else f"{n} values" for n in sorted(returned, key=str))


def _first(returned: Any) -> Tensor:
    return returned[0] if isinstance(returned, tuple) else returned


def _returned(forward: Callable) -> set[int | None]:
    """How many values each `return` of a forward has. None: more or others than names of variables."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return {None}
    counts: set[int | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Return):
            if isinstance(node.value, ast.Tuple) and all(isinstance(e, ast.Name) for e in node.value.elts):
                counts.add(len(node.value.elts))
            else:
                is_tensor = isinstance(node.value, ast.Name) and node.value.id == "hidden_states"
                counts.add(1 if is_tensor else None)
    return counts
