"""Which modules of a model are edited, and how wide their output is.

This module reads the structure of a model and changes nothing in it. Everything that can be wrong with a choice of
modules is found here, before the first module is wrapped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import ReftConfig
from .forward.transformers_api import block_names, encoder_of, text_config
from .peft_api import BaseTunerLayer, NoMatchingModule, check_target_module_exists, get_pattern_key


@dataclass(frozen=True)
class Target:
    """A module to edit.

    Args:
        name (`str`): Its name in the model.
        width (`int`): Size of the last dimension of its output.
        rank (`int`): Rank of its edit.
        is_block (`bool`): Whether it is a block of the main stack, whose output is the hidden state of a layer.
    """

    name: str
    width: int
    rank: int
    is_block: bool


def find_targets(model: nn.Module, config: ReftConfig) -> dict[str, Target]:
    """Resolve `target_modules`, `exclude_modules` and `layers_to_transform` to modules, by name.

    Raises:
        ValueError: when nothing matches, when a layer does not exist, when a width can't be told, when the rank is
            above the width or the adapter was saved for another width.
    """
    stack = main_stack(model) if config.target_modules is None else None
    names = list(stack) if stack else _matching_modules(model, config)
    if stack and config.exclude_modules:
        names = [name for name in names if not_a_target(name, config) is None]
    if config.layers_to_transform is not None:
        names = _in_layers(names, config)
    if not names:
        raise NoMatchingModule(
            f"Target modules {config.target_modules} not found in the base model: with "
            f"exclude_modules={config.exclude_modules!r} they match no module of {type(model).__name__}. Name modules "
            "that `model.named_modules()` lists, or leave target_modules out to edit the blocks of the main stack."
        )
    _refuse_nesting(model, names)
    stacks = _stacks(model)
    targets = {name: target_of(model, config, name, stacks) for name in names}
    _refuse_idle_ranks(config, targets)
    return targets


def target_of(
    model: nn.Module, config: ReftConfig, name: str, stacks: dict[str, nn.ModuleList] | None = None
) -> Target:
    """A module as a target. `stacks` are the lists of blocks of the model, where they are known.

    Raises:
        ValueError: when its width can't be told, is below its rank, or is not the one that the adapter was saved for.
    """
    stack, _, index = name.rpartition(".")
    is_block = index.isdigit() and stack in (_stacks(model) if stacks is None else stacks)
    target = Target(name, _width(model, name, is_block), config.rank_of(name), is_block)
    _check_width(config, target)
    return target


def main_stack(model: nn.Module) -> list[str]:
    """Names of the blocks of the model's main stack, in order. Of an encoder-decoder model, those of its encoder.

    Found by structure, for any transformers architecture: the outermost list of modules that is as long as the
    (text) config says that the model is deep.

    Raises:
        ValueError: when there is no such list or more than one.
    """
    encoder = encoder_of(model)
    root = model if encoder is None else encoder
    config = text_config(root) or text_config(model)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} is no transformers model, so its blocks can't be found. Set target_modules to "
            "the modules to edit, for example target_modules=['mlp']."
        )
    depth = getattr(config, "num_hidden_layers", None)
    lists = _stacks(root)
    stacks = [name for name, module in lists.items() if len(module) == depth]
    if len(stacks) > 1:  # a text and a vision tower of the same depth: transformers may name the block of one of them
        named = block_names(model)
        stacks = [name for name in stacks if type(_unwrap(lists[name][0])).__name__ in named] or stacks
    if len(stacks) != 1:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists.items()) or "none"
        raise ValueError(
            f"The main stack of {type(model).__name__} can't be told: of its lists of modules ({found}), "
            f"{'several have' if stacks else 'none has'} num_hidden_layers={depth} members. Set target_modules to the "
            "modules to edit, for example a regex such as target_modules='model.layers.[0-9]+'."
        )
    blocks = set(lists[stacks[0]])
    return [name for name, module in model.named_modules() if module in blocks]


def _stacks(root: nn.Module) -> dict[str, nn.ModuleList]:
    """The outermost lists of modules: the members of a long one are blocks."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not nested:
            lists[name] = module
    return lists


def _hidden_size(model: nn.Module, name: str) -> int | None:
    """Width of the hidden states around a module: that of the nearest part of the model with a config of its own."""
    while name:
        name = name.rpartition(".")[0]
        hidden_size = getattr(text_config(model.get_submodule(name)), "hidden_size", None)
        if hidden_size is not None:
            return hidden_size
    return None


def _unwrap(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _matching_modules(model: nn.Module, config: ReftConfig) -> list[str]:
    """The modules that PEFT's own rule for names and regexes matches. Layers are left to `_in_layers`, which can also
    count blocks."""
    unlayered = _NamesOnly(config.target_modules, config.exclude_modules, config.modules_to_save)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(unlayered, name)]


@dataclass(frozen=True)
class _NamesOnly:
    """The part of a config that PEFT's rule for names reads."""

    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    modules_to_save: list[str] | None
    target_parameters: None = None


def not_a_target(name: str, config: ReftConfig) -> Any:
    """False, or, for a name in `exclude_modules`, the false value with which PEFT marks it."""
    return check_target_module_exists(_NamesOnly("(?!)", config.exclude_modules, None), name)


def _in_layers(names: list[str], config: ReftConfig) -> list[str]:
    """Keep the modules in `layers_to_transform`, every one of which must exist."""
    wanted = config.layers_to_transform
    assert isinstance(wanted, list)
    patterns = config.layers_pattern or [r"[^.]+"]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    index_of: dict[str, int] = {}
    for name in names:
        for pattern in patterns:
            match = re.match(rf"(?:.*?\.)?(?:{pattern})\.(\d+)(?:\.|$)", name)
            if match:
                index_of[name] = int(match[1])
                break
    missing = sorted(set(wanted) - set(index_of.values()))
    if missing:
        have = sorted(set(index_of.values()))
        raise ValueError(
            f"layers_to_transform={wanted} asks for layers that don't exist: {missing}. The modules to edit lie in "
            "layers "
            + (
                f"{have[0]} to {have[-1]}."
                if have
                else f"without an index (layers_pattern={config.layers_pattern!r})."
            )
            + " Give indices of those layers, or leave layers_to_transform out to edit all."
        )
    return [name for name in names if index_of.get(name) in wanted]


def _refuse_nesting(model: nn.Module, names: list[str]) -> None:
    modules = dict(model.named_modules())
    wrapped = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
    for name in names:
        for other in [*wrapped, *names]:
            if name.startswith(f"{other}."):
                name = name.replace(".base_layer", "")
                raise ValueError(
                    f"target_modules matches {name!r}, which lies inside {other!r}, itself edited. Edit one or the "
                    "other: narrow target_modules, or give the adapters the same target_modules."
                )


def _width(model: nn.Module, name: str, is_block: bool) -> int:
    """Size of the last dimension of a module's output."""
    module = _unwrap(model.get_submodule(name))
    hidden_size = _hidden_size(model, name)
    if is_block and hidden_size is not None:
        return hidden_size
    while isinstance(module, nn.Sequential) and len(module) > 0:
        module = module[-1]
    for attribute in ("out_features", "nf", "embedding_dim"):  # linear layers, quantized or not; GPT-2's; embeddings
        if isinstance(width := getattr(module, attribute, None), int):
            return width
    weight = getattr(module, "weight", None)
    if weight is not None and weight.dim() == 1:  # norms
        return weight.shape[0]
    if hidden_size is None:
        raise ValueError(
            f"The width of the output of {name!r} ({type(module).__name__}) can't be told. Choose in target_modules a "
            "module that says it, such as a linear layer, a norm or an embedding."
        )
    return hidden_size  # attention, feed-forward and other parts of a block return to the width of the stream


def _refuse_idle_ranks(config: ReftConfig, targets: dict[str, Target]) -> None:
    used = {get_pattern_key(list(config.rank_pattern), name) for name in targets}
    for pattern, rank in config.rank_pattern.items():
        if pattern not in used:
            raise ValueError(
                f"rank_pattern={{{pattern!r}: {rank}}} decides for none of the modules to edit, of which the first is "
                f"{next(iter(targets))!r}. Write the end of a module's name, as in {{'layers.0': 16}}, or a regex for "
                "it."
            )


def _check_width(config: ReftConfig, target: Target) -> None:
    if config.asked_width not in (None, target.width):
        raise ValueError(
            f"width={config.asked_width}: this adapter was made for modules of width {config.width}, but "
            f"{target.name!r} of this base model has width {target.width}. Load it on the base model that it was "
            "trained on"
            + (f" ({config.base_model_name_or_path})." if config.base_model_name_or_path else ".")
        )
    if target.rank > target.width:
        raise ValueError(
            f"r={target.rank} is above the width {target.width} of {target.name!r}: a rank is at most the width of "
            f"the edited module. Choose r <= {target.width} (4 to 32 is usual), or a lower rank for this module alone "
            "by rank_pattern."
        )
