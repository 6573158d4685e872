"""pyvene's names for places in a model <-> names of modules. pyreft is built on pyvene.

A place is where an intervention edits. pyvene names it in one of two ways: by a path in the model that ends in
`.output` (`model.layers[8].mlp.output`), or, for architectures that pyvene knows, by a component of a layer
(`block_output` of layer 8). A PEFT adapter edits outputs of modules, so the tables here have only the components that
are the whole output of one: no inputs of modules, no single heads, no parts of fused projections.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


_LLAMA = {
    "block_output": "",
    "mlp_output": "mlp",
    "attention_output": "self_attn",
    "query_output": "self_attn.q_proj",
    "key_output": "self_attn.k_proj",
    "value_output": "self_attn.v_proj",
}
_GPT2 = {"block_output": "", "mlp_output": "mlp", "attention_output": "attn.resid_dropout"}
_GPT_NEO = {"block_output": "", "mlp_output": "mlp", "attention_output": "attn"}
_GPT_NEOX = {"block_output": "", "mlp_output": "mlp", "attention_output": "attention"}
_ESM = {
    "block_output": "",
    "mlp_output": "output",
    "attention_output": "attention",
    "query_output": "attention.self.query",
    "key_output": "attention.self.key",
    "value_output": "attention.self.value",
}

# Class of the base model -> name of its list of blocks, and pyvene's components -> names of modules in a block. These
# are the classes that pyvene 0.1.8 has a table for.
ARCHITECTURES: dict[str, tuple[str, dict[str, str]]] = {
    "GPT2Model": ("h", _GPT2),
    "GPT2LMHeadModel": ("transformer.h", _GPT2),
    "GPT2ForSequenceClassification": ("transformer.h", _GPT2),
    "GPTNeoModel": ("h", _GPT_NEO),
    "GPTNeoForCausalLM": ("transformer.h", _GPT_NEO),
    "GPTNeoXModel": ("layers", _GPT_NEOX),
    "GPTNeoXForCausalLM": ("gpt_neox.layers", _GPT_NEOX),
    "EsmModel": ("encoder.layer", _ESM),
    "EsmForMaskedLM": ("esm.encoder.layer", _ESM),
    **{f"{name}Model": ("layers", _LLAMA) for name in ("Llama", "Mistral", "Gemma", "Gemma2", "Olmo", "Qwen2")},
    **{
        f"{name}ForCausalLM": ("model.layers", _LLAMA)
        for name in ("Llama", "Mistral", "Gemma", "Gemma2", "Olmo", "Qwen2")
    },
    **{f"{name}ForSequenceClassification": ("model.layers", _LLAMA) for name in ("Llama", "Gemma", "Qwen2")},
}

_KEY = re.compile(
    r"(?:layer_(?P<layer>.+?)_)?comp_(?P<component>.+)_unit_(?P<unit>.+)_nunit_(?P<count>.+)#(?P<turn>\d+)"
)


@dataclass(frozen=True)
class Place:
    """The place of one intervention, as pyvene names it.

    Args:
        component (`str`): A component of a layer, or a path.
        layer (`int`, *optional*): The layer of a component. None for a path.
        unit (`str`): pyvene's unit. Only `"pos"`, states at positions, can be converted.
        count (`str`): pyvene's number of units. It has no effect on edits at positions.
        turn (`int`): The number of the intervention among those at the same place, from 0.
        squeezed (`bool`): Whether the component is a path whose dots have become underscores, as in names of files.
    """

    component: str
    layer: int | None = None
    unit: str = "pos"
    count: str = "1"
    turn: int = 0
    squeezed: bool = False

    @classmethod
    def parse(cls, key: str) -> Place:
        """Read pyvene's key of an intervention, as it stands in the name of a file of pyreft.

        Raises:
            ValueError: when the text is no such key, naming the file.
        """
        match = _KEY.fullmatch(key)
        if match is None or not (match["layer"] is None or match["layer"].isdigit()):
            raise ValueError(f"intkey_{key}.bin: the name does not say a place in a model as pyreft writes it.")
        layer = None if match["layer"] is None else int(match["layer"])
        return cls(match["component"], layer, match["unit"], match["count"], int(match["turn"]), layer is None)

    @property
    def key(self) -> str:
        """pyvene's key of the intervention."""
        unit = self.unit.replace(".", "_")
        where = f"comp_{self.component.replace('.', '_')}"
        if "." not in self.component and not self.squeezed:
            where = f"layer_{self.layer}_{where}"
        return f"{where}_unit_{unit}_nunit_{self.count}#{self.turn}"

    def module(self, model_class: str, modules: Iterable[str]) -> str:
        """The name of the module whose output is edited at this place.

        Args:
            model_class (`str`): Class of the base model.
            modules (`Iterable[str]`): Names of its modules.

        Raises:
            ValueError: when the place is not the output of a module of that model, naming the component.
        """
        if self.unit != "pos":
            raise ValueError(
                f"unit={self.unit!r} of {self.component!r}: only states at positions (unit='pos') can be edited by a "
                "PEFT adapter, not single heads or time steps."
            )
        if self.squeezed or "." in self.component:
            return self._module_of_path(model_class, modules)
        if model_class not in ARCHITECTURES:
            raise ValueError(
                f"component={self.component!r} of layer {self.layer}: which module that is in a {model_class} is not "
                f"known. Known are {', '.join(ARCHITECTURES)}; for others pyreft takes paths such as "
                "'model.layers[8].output'. If the base model was loaded as another class in training, say for which "
                "task: task_type='SEQ_CLS'."
            )
        blocks, parts = ARCHITECTURES[model_class]
        if self.component not in parts:
            raise ValueError(
                f"component={self.component!r} of layer {self.layer} is the whole output of no module of a "
                f"{model_class}, and a PEFT adapter edits outputs of modules. What can be converted: "
                f"{', '.join(parts)}, and paths that end in '.output'. (The block_input of layer n is the "
                "block_output of layer n − 1.)"
            )
        name = f"{blocks}.{self.layer}.{parts[self.component]}".rstrip(".")
        return _existing(name, f"component={self.component!r} of layer {self.layer}", model_class, modules)

    def _module_of_path(self, model_class: str, modules: Iterable[str]) -> str:
        """The module of a place that is named by a path."""
        dot = "_" if self.squeezed else "."
        path, _, side = self.component.rpartition(dot)
        if side != "output":
            raise ValueError(
                f"component={self.component!r} is the {side or 'nothing'} of a module, and a PEFT adapter edits "
                "outputs of modules: only paths that end in '.output' can be converted."
            )
        if not self.squeezed:
            name = re.sub(r"\[(\d+)\]", r".\1", path)
            return _existing(name, f"component={self.component!r}", model_class, modules)
        # Only a file's name is known, where underscores may stand for dots: compare the squeezed path of each module.
        fitting = [name for name in modules if name and path in (_squeeze(path_of(name)), _squeeze(name))]
        if len(fitting) != 1:
            raise ValueError(
                f"intkey_{self.key}.bin: the name fits {' and '.join(map(repr, fitting)) or 'no module'} of a "
                f"{model_class}. Put the config.json that pyreft's `save` writes beside it, which has the path in "
                "full."
            )
        return fitting[0]


def place_of(module: str, model_class: str) -> Place:
    """The place of a module's output: a component, where pyvene has a table for the class, else a path.

    Args:
        module (`str`): Name of the module.
        model_class (`str`): Class of the base model.
    """
    blocks, parts = ARCHITECTURES.get(model_class, ("", {}))
    match = re.fullmatch(rf"{re.escape(blocks)}\.(\d+)(?:\.(.+))?", module) if blocks else None
    if match is not None:
        for component, part in parts.items():
            if part == (match[2] or ""):
                return Place(component, int(match[1]))
    return Place(f"{path_of(module)}.output")


def path_of(module: str) -> str:
    """The path of a module as pyvene writes it: `model.layers[8]` for `model.layers.8`."""
    return re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", module)


def _squeeze(path: str) -> str:
    """A path as pyvene writes it in the name of a file."""
    return path.replace(".", "_")


def _existing(name: str, what: str, model_class: str, modules: Iterable[str]) -> str:
    """The name, if the base model has a module of it."""
    if name not in set(modules):
        raise ValueError(
            f"{what}: the base model, a {model_class}, has no module {name!r}. Give the base model that the "
            "checkpoint was trained on (base_model), and its task if it was loaded for one (task_type='SEQ_CLS')."
        )
    return name
