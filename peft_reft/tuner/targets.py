"""Which modules of a model are edited, and how wide their output is.

This module reads the structure of a model and changes nothing in it. Any fault in a choice of modules raises an error
here, before the first module is wrapped.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .config import ReftConfig
from .forward.transformers_api import block_names, decoder_of, encoder_of, text_config
from .layouts import REFUSED, STACKS, WITHOUT_ROWS, Layout, layout_of
from .peft_api import BaseTunerLayer, NoMatchingModule, check_target_module_exists, get_pattern_key


@dataclass(frozen=True)
class Target:
    """A module to edit.

    Args:
        name (`str`): The name of the module in the model.
        width (`int`): D, the size of the last dimension of its output.
        rank (`int`): R, the rank of its edit.
        is_block (`bool`): Whether it is a block: its output is the hidden state of a layer of the model.
        layout (`Layout`, *optional*): How its output holds the tokens. None: [B, S, D].
    """

    name: str
    width: int
    rank: int
    is_block: bool
    layout: Layout | None = None


def find_targets(model: nn.Module, config: ReftConfig) -> dict[str, Target]:
    """Find the modules that `target_modules`, `exclude_modules` and `layers_to_transform` choose.

    Returns:
        `dict[str, Target]`: The modules to edit, by name, in the order of the model.

    Raises:
        ValueError: when no module matches, when a layer does not exist, when a module lies inside another that is
            edited, when a width is unknown, when a rank is above the width, when a pattern of `rank_pattern` matches
            no module, or when the adapter was saved for another width.
    """
    _refuse_without_rows(model, config)
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
    _refuse_unsupported(model, names)
    lists = _outermost_lists(model)
    targets = {name: target_of(model, config, name, lists) for name in names}
    _refuse_idle_ranks(config, targets)
    return targets


def target_of(
    model: nn.Module, config: ReftConfig, name: str, lists: dict[str, nn.ModuleList] | None = None
) -> Target:
    """Describe a module to edit.

    Args:
        model (`torch.nn.Module`): The model.
        config (`ReftConfig`): The configuration of the adapter.
        name (`str`): The name of the module.
        lists (`dict[str, torch.nn.ModuleList]`, *optional*): The outermost lists of modules of the model. None: they
            are searched for.

    Raises:
        ValueError: when its width is unknown, is below its rank, or is not the one that the adapter was saved for.
    """
    parent, _, index = name.rpartition(".")
    is_block = index.isdigit() and parent in (_outermost_lists(model) if lists is None else lists)
    is_block |= re.fullmatch(STACKS.get(_model_type(model), "(?!)"), name) is not None
    module = _unwrap(model.get_submodule(name))
    layout = layout_of(module, _around(model, name), text_config(model))
    width = _width(model, name, is_block) * (1 if layout is None else layout.streams)
    target = Target(name, width, config.rank_of(name), is_block, layout)
    _check_width(config, target)
    return target


def main_stack(model: nn.Module) -> list[str]:
    """Names of the blocks of the model's main stack, in order. An encoder-decoder model's main stack is its encoder's.

    This works for any transformers architecture: the main stack is the outermost list of modules whose length is the
    depth that the (text) config says. layouts.py names the architectures for which that is not so.

    Raises:
        ValueError: when there is no such list or more than one, or when its blocks can't be edited.
    """
    encoder = encoder_of(model)
    root = decoder_of(model) if encoder is None else encoder
    config = text_config(root) or text_config(model)
    if config is None:
        raise ValueError(
            f"{type(model).__name__} is no transformers model, so its blocks can't be found. Set target_modules to "
            "the modules to edit, for example target_modules=['mlp']."
        )
    model_type = config.model_type
    if (refusal := REFUSED.get(model_type)) is not None:
        raise ValueError(
            f"The blocks of {type(model).__name__} can't be edited, because {refusal.reason}. Set "
            f"target_modules={refusal.target_modules!r}."
        )
    if model_type in STACKS:
        return [name for name, _ in model.named_modules() if re.fullmatch(STACKS[model_type], name)]
    lists = _in_text_model(root, _outermost_lists(root), config)
    depths = _depths(config, has_decoder_only=encoder is None)
    stacks: list[str] = []
    for depth in depths.values():
        stacks = [name for name, module in lists.items() if len(module) == depth]
        # Two towers may have the same depth. transformers often names the class of one tower's blocks.
        if len(stacks) > 1:
            named = block_names(model)
            stacks = [name for name in stacks if type(_unwrap(lists[name][0])).__name__ in named] or stacks
        if stacks:
            break
    if len(stacks) != 1:
        full = {module: name for name, module in model.named_modules()}
        found = ", ".join(f"{full[module]} ({len(module)})" for module in lists.values()) or "none"
        wanted = " or ".join(f"{field}={depth}" for field, depth in depths.items())
        raise ValueError(
            f"The main stack of {type(model).__name__} can't be told: of its lists of modules ({found}), "
            f"{'several have' if stacks else 'none has'} {wanted} members. Set target_modules to the modules to edit, "
            f"for example a regex such as target_modules={_example(model, root, lists)!r}."
        )
    blocks = set(lists[stacks[0]])
    return [name for name, module in model.named_modules() if module in blocks]


def _in_text_model(root: nn.Module, lists: dict[str, nn.ModuleList], config: Any) -> dict[str, nn.ModuleList]:
    """The lists of modules around which the nearest config is the text config, not that of a vision tower. All lists
    where there is no such list."""

    def config_around(name: str) -> Any:
        configs = (getattr(module, "config", None) for module in _around(root, name))
        return next((own for own in configs if own is not None), None)

    own = {name: module for name, module in lists.items() if type(config_around(name)) is type(config)}
    return own or lists


def _depths(config: Any, has_decoder_only: bool) -> dict[str, int]:
    """The fields of a config that may say how many blocks the main stack has, the likeliest first. A class that has
    only the decoder of an encoder-decoder config (`BartForCausalLM`) is as deep as that decoder."""
    fields = ["num_hidden_layers", "num_layers"]  # LongCat-Flash counts two layers a block in the first
    if has_decoder_only:
        fields = ["decoder_layers", "num_decoder_layers", *fields]
    return {field: depth for field in fields if isinstance(depth := getattr(config, field, None), int)}


def _example(model: nn.Module, root: nn.Module, lists: dict[str, nn.ModuleList]) -> str:
    """A regex for the members of the longest list of modules: most often the blocks that the user means."""
    if not lists:
        return "model.layers.[0-9]+"
    longest = max(lists.values(), key=len)
    name = next(name for name, module in model.named_modules() if module is longest)
    return re.escape(name) + r"\.\d+"


def _outermost_lists(root: nn.Module) -> dict[str, nn.ModuleList]:
    """The lists of modules, by name, that lie in no other list. Their members are taken for blocks."""
    lists: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) > 0 and not nested:
            lists[name] = module
    return lists


def _hidden_size(model: nn.Module, name: str) -> int | None:
    """Width of the hidden states around a module: `hidden_size` of the nearest module above it that has a config.
    None: no module above it has one."""
    while name:
        name = name.rpartition(".")[0]
        hidden_size = getattr(text_config(model.get_submodule(name)), "hidden_size", None)
        if hidden_size is not None:
            return hidden_size
    return None


def _unwrap(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _matching_modules(model: nn.Module, config: ReftConfig) -> list[str]:
    """The modules that PEFT's rule for names and regexes matches. `_in_layers` applies `layers_to_transform`: PEFT's
    rule finds no index in the name of a block itself."""
    names_only = _NamesOnly(config.target_modules, config.exclude_modules, config.modules_to_save)
    return [name for name, _ in model.named_modules() if name and check_target_module_exists(names_only, name)]


@dataclass(frozen=True)
class _NamesOnly:
    """The fields of a config that PEFT's `check_target_module_exists` reads, without those about layers."""

    target_modules: list[str] | str | None
    exclude_modules: list[str] | str | None
    modules_to_save: list[str] | None
    target_parameters: None = None


def not_a_target(name: str, config: ReftConfig) -> Any:
    """PEFT's result for a module that is no target: None, or a marker that is false if `exclude_modules` has it."""
    # The regex (?!) matches no name.
    return check_target_module_exists(_NamesOnly("(?!)", config.exclude_modules, None), name)


def _in_layers(names: list[str], config: ReftConfig) -> list[str]:
    """The modules that lie in `layers_to_transform`.

    Raises:
        ValueError: when no module lies in one of these layers.
    """
    given = config.layers_to_transform
    assert given is not None
    wanted = [given] if isinstance(given, int) else given
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


def _model_type(model: nn.Module) -> str:
    """The `model_type` of a transformers model's (text) config. Empty for other models."""
    return getattr(text_config(model), "model_type", None) or ""


def _refuse_without_rows(model: nn.Module, config: ReftConfig) -> None:
    """Raise a ValueError when positions count tokens in a model whose inputs do not have the rows of its states."""
    reason = WITHOUT_ROWS.get(_model_type(model))
    if reason is not None and config.positions != "all":
        raise ValueError(
            f"positions={config.positions!r} counts tokens of rows, and {type(model).__name__}'s hidden states have "
            f"other rows than its input: {reason}. Set positions='all'."
        )


def _around(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules that a module lies in, the nearest first. The model itself is the last."""
    found = []
    while name:
        name = name.rpartition(".")[0]
        found.append(model.get_submodule(name))
    return found


def _refuse_unsupported(model: nn.Module, names: list[str]) -> None:
    """Raise a ValueError when a module to edit lies where layouts.py says that no edit is possible."""
    refusal = REFUSED.get(_model_type(model))
    for name in names if refusal and refusal.refused else ():
        assert refusal is not None and refusal.refused is not None
        if re.fullmatch(refusal.refused, name):
            raise ValueError(
                f"target_modules matches {name!r}, which {type(model).__name__} can't have edited, because "
                f"{refusal.reason}. Set target_modules={refusal.target_modules!r}."
            )


def _refuse_nesting(model: nn.Module, names: list[str]) -> None:
    """Raise a ValueError when a module to edit lies inside another, or inside a layer of an adapter on the model."""
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
    """D, the size of the last dimension of a module's output.

    Raises:
        ValueError: when neither the module nor a config above it says it.
    """
    module = _unwrap(model.get_submodule(name))
    hidden_size = _hidden_size(model, name)
    if is_block and hidden_size is not None:
        return hidden_size
    while isinstance(module, nn.Sequential) and len(module) > 0:
        module = module[-1]
    # Linear layers, quantized or not; transformers' Conv1D, which GPT-2 uses; embeddings.
    for attribute in ("out_features", "nf", "embedding_dim"):
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
    return hidden_size  # attention, feed-forward and other parts of a block return hidden states of the model's width


def _refuse_idle_ranks(config: ReftConfig, targets: dict[str, Target]) -> None:
    """Raise a ValueError when a pattern of `rank_pattern` decides the rank of no module to edit."""
    used = {get_pattern_key(list(config.rank_pattern), name) for name in targets}
    for pattern, rank in config.rank_pattern.items():
        if pattern not in used:
            raise ValueError(
                f"rank_pattern={{{pattern!r}: {rank}}} decides for none of the modules to edit, of which the first is "
                f"{next(iter(targets))!r}. Write the end of a module's name, as in {{'layers.0': 16}}, or a regex for "
                "it."
            )


def _check_width(config: ReftConfig, target: Target) -> None:
    """Raise a ValueError when a target's width is not the saved adapter's, or is below its rank."""
    if config.asked_width not in (None, target.width):
        raise ValueError(
            f"width={config.asked_width}: this adapter was made for modules of width {config.width}, but "
            f"{target.name!r} of this base model has width {target.width}. Load it on the base model that it was "
            "trained on" + (f" ({config.base_model_name_or_path})." if config.base_model_name_or_path else ".")
        )
    if target.rank > target.width:
        raise ValueError(
            f"r={target.rank} is above the width {target.width} of {target.name!r}: a rank is at most the width of "
            f"the edited module. Choose r <= {target.width} (4 to 32 is usual), or a lower rank for this module alone "
            "by rank_pattern."
        )
