"""Every piece of axolotl that the plugin relies on and that is private, wrapped, or a hook that axolotl calls by name.

If axolotl dropped a hook, the plugin would stop working without an error. So all pieces are looked for once, before
the first ReFT adapter of a process. A run with another adapter checks nothing. This module also makes axolotl build
the base model of a ReFT adapter as it builds LoRA's.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from peft_reft.tuner.interventions.formulas import INTERVENTIONS
from peft_reft.tuner.versions import gone, require


if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Functions that the plugin calls or wraps.
CALLED = (
    "axolotl.loaders.adapter:_get_peft_task_type",
    "axolotl.loaders.model:ModelLoader.load",
    "axolotl.loaders.tokenizer:load_tokenizer",
    "axolotl.model_support:get_model_support",
    "axolotl.model_support:resolve_model_support",
    "axolotl.utils.chat_templates:get_chat_template_from_config",
)
# Hooks of axolotl that the plugin overrides. axolotl declares each hook that it calls on BasePlugin.
HOOKS = (
    "add_callbacks_post_trainer",
    "get_adapter_capabilities",
    "get_input_args",
    "load_adapter",
    "load_datasets",
    "pre_lora_load",
    "register",
)


# Where axolotl's validation reads FSDP's version -> whether FSDP1 is what it means where a YAML gives none.
READS_FSDP_VERSION = {
    "OptimizationValidationMixin._resolve_fsdp_version": True,  # 0.19
    "OptimizationValidationMixin.check_fsdp_version": False,  # 0.21, which has FSDP2 alone
}
# Chat templates whose strategies, in axolotl.processing_strategies, build role boundaries. Strategies of other
# templates are chosen by the processor's class, or mask padding and images only.
ROLES_OF_TEMPLATES = {
    "gemma3",
    "gemma3n",
    "gemma4",
    "gemma4_unified",
    "llama3_2_vision",
    "llama4",
    "mistral_v7_tekken",
    "pixtral",
    "qwen2_vl",
    "qwen3_5",
}


@functools.cache
def check_axolotl() -> None:
    """Check once that axolotl has the pieces that the plugin relies on.

    Raises:
        RuntimeError: naming the piece that the installed axolotl lacks, and the versions known to work.
    """
    require("axolotl", *CALLED, *(f"axolotl.integrations.base:BasePlugin.{hook}" for hook in HOOKS))
    from axolotl.loaders.model import ModelLoader

    has_fsdp1()
    if "cfg" not in inspect.signature(ModelLoader).parameters:
        raise RuntimeError(gone("axolotl", "the argument cfg of axolotl.loaders.model.ModelLoader"))


def task_type(model: PreTrainedModel) -> Any:
    """PEFT's task type of a model, the one that axolotl gives LoRA."""
    from axolotl.loaders.adapter import _get_peft_task_type

    return _get_peft_task_type(model)


def tokenizer_of(cfg: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that axolotl makes for a YAML, with the tokens that the YAML adds."""
    from axolotl.loaders.tokenizer import load_tokenizer

    return load_tokenizer(cfg)


def chat_template_of(cfg: Any, dataset: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template by which axolotl renders a dataset of type: chat_template."""
    from axolotl.utils.chat_templates import get_chat_template_from_config

    return get_chat_template_from_config(cfg=cfg, ds_cfg=dataset, tokenizer=tokenizer)


def has_fsdp1() -> bool:
    """Whether `fsdp_config:` without a version means FSDP1.

    Raises:
        RuntimeError: when the installed axolotl reads the version nowhere that is known here.
    """
    from axolotl.utils.schemas import validation

    for path, means_fsdp1 in READS_FSDP_VERSION.items():
        mixin, method = path.split(".")
        if hasattr(getattr(validation, mixin, None), method):
            return means_fsdp1
    raise RuntimeError(gone("axolotl", f"axolotl.utils.schemas.validation.{next(reversed(READS_FSDP_VERSION))}"))


def knows_role_boundaries(chat_template: str, model_type: str | None) -> bool:
    """Whether axolotl masks labels by roles in a batch with images, for a chat template that it has by name."""
    from axolotl.model_support import get_model_support, resolve_model_support

    support = resolve_model_support(get_model_support(model_type) or get_model_support(chat_template))
    registered = support is not None and support.strategies.processing_strategy_cls is not None
    return registered or chat_template in ROLES_OF_TEMPLATES


def build_base_as_for_lora() -> None:
    """Have axolotl build the base model of a ReFT adapter as it builds LoRA's. Done once in a process.

    axolotl quantizes a base, and prepares a quantized one for training, only if `adapter:` is lora or qlora. With any
    other name, it drops `load_in_4bit: true` in silence, and no hook of a plugin comes early enough to mend that. So
    `adapter:` is set to lora or qlora from the start of `ModelLoader.load` to the hook `pre_lora_load`, where
    `own_name_again` sets it back: ReFT gets what LoRA gets, in later versions of axolotl too. Other adapters are not
    touched.
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
            if cfg.adapter != adapter:  # pre_lora_load was not called, so axolotl has put LoRA on the base
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
    """Set `adapter:` back to what the YAML says, once the base model is built. The plugin then loads the adapter."""
    if cfg._reft_adapter:
        cfg.adapter = cfg._reft_adapter
