"""What the plugin relies on in axolotl that is private, that it wraps, or that axolotl calls by name.

This is the one list of it. A hook that axolotl no longer calls would be passed over in silence, so all are looked for once, before the
first ReFT adapter; a run with another adapter asks for nothing. Here too: the base model of a ReFT adapter is built as LoRA's is.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from peft_reft.tuner.interventions.formulas import INTERVENTIONS
from peft_reft.tuner.versions import gone, require


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Called by the plugin, or wrapped.
CALLED = (
    "axolotl.loaders.adapter:_get_peft_task_type",
    "axolotl.loaders.model:ModelLoader.load",
    "axolotl.loaders.tokenizer:load_tokenizer",
)
# Hooks that the plugin stands in for: axolotl declares what it calls.
HOOKS = (
    "add_callbacks_post_trainer",
    "get_adapter_capabilities",
    "get_input_args",
    "load_adapter",
    "pre_lora_load",
    "register",
)


@functools.cache
def check_axolotl() -> None:
    """Look for the pieces that the plugin relies on, once.

    Raises:
        RuntimeError: naming the piece that the installed axolotl lacks, and the versions known to work.
    """
    require("axolotl", *CALLED, *(f"axolotl.integrations.base:BasePlugin.{hook}" for hook in HOOKS))
    from axolotl.loaders.model import ModelLoader

    if "cfg" not in inspect.signature(ModelLoader).parameters:
        raise RuntimeError(gone("axolotl", "the argument cfg of axolotl.loaders.model.ModelLoader"))


def task_type(model: PreTrainedModel) -> Any:
    """PEFT's task type of a model, as axolotl gives it to LoRA."""
    from axolotl.loaders.adapter import _get_peft_task_type

    return _get_peft_task_type(model)


def tokenizer_of(cfg: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that axolotl makes of a YAML, with the tokens that it adds."""
    from axolotl.loaders.tokenizer import load_tokenizer

    return load_tokenizer(cfg)


def build_base_as_for_lora() -> None:
    """Have axolotl build the base model of a ReFT adapter as it builds LoRA's. Done once in a process.

    axolotl quantizes the base, and prepares a quantized one for training, for the adapter names lora and qlora only: with
    any other, `load_in_4bit: true` is dropped in silence. No hook of its plugins comes early enough to mend that. So
    ReFT goes by the name of its like from the start of `ModelLoader.load` to the hook `pre_lora_load` (`own_name_again`), and
    gets just what LoRA gets, in later versions too. Other adapters are not touched.
    """
    from axolotl.loaders.model import ModelLoader

    load = ModelLoader.load
    if hasattr(load, "_serves_reft"):
        return

    @functools.wraps(load)
    def load_by_name(loader: ModelLoader) -> Any:
        cfg = loader.cfg
        adapter = cfg.adapter
        if adapter not in INTERVENTIONS:
            return load(loader)
        cfg._reft_adapter = adapter
        cfg.adapter = "qlora" if cfg.load_in_4bit else "lora"
        try:
            loaded = load(loader)
            if cfg.adapter != adapter:  # LoRA itself was trained in ReFT's place
                raise RuntimeError(
                    gone("axolotl", f"ModelLoader.load's call of the hook pre_lora_load, for adapter: {adapter},")
                )
            return loaded
        finally:
            cfg.adapter = adapter

    load_by_name._serves_reft = True  # type: ignore[attr-defined]
    loading: Any = ModelLoader
    loading.load = load_by_name


def own_name_again(cfg: Any) -> None:
    """The base model is built: `adapter:` is what the YAML says, for the plugin to load it."""
    if cfg._reft_adapter:
        cfg.adapter = cfg._reft_adapter
