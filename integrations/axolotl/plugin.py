"""The axolotl plugin: declares the adapters, and loads them as axolotl loads LoRA."""

from __future__ import annotations

import functools
from typing import Any

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders.adapter import _get_peft_task_type
from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from peft_reft import ReftConfig
from peft_reft.interventions import INTERVENTIONS

from .args import is_reft, meaningless_keys, reft_config


LOG = get_logger(__name__)


class ReftPlugin(BasePlugin):
    """Makes `adapter: loreft` (noreft, direft, nodireft, consreft, lobireft) work wherever `adapter: lora` does."""

    def get_input_args(self) -> str:
        return "peft_reft.integrations.axolotl.ReftArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in INTERVENTIONS]

    def register(self, cfg: DictDefault) -> None:
        """Take out the LoRA keys that say nothing to ReFT, and name them."""
        _build_base_as_for_lora()
        if not is_reft(cfg.get("adapter")):
            return
        ignored = meaningless_keys(cfg)
        if ignored:
            LOG.warning("adapter: %s has no use for these LoRA keys, ignored: %s", cfg["adapter"], ", ".join(ignored))
        for key in ignored:
            del cfg[key]

    def pre_lora_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """The base model is built: go by the adapter's own name again, for it to be loaded by this plugin."""
        if cfg._reft_adapter:
            cfg.adapter = cfg._reft_adapter

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if not is_reft(cfg.adapter):
            return None
        config = reft_config(cfg, _get_peft_task_type(model))
        if config_only:
            return None, config
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            _check_saved(PeftConfig.from_pretrained(cfg.lora_model_dir), config, cfg)
            if cfg.lora_on_cpu:
                options |= {"max_memory": {"cpu": "256GiB"}, "device_map": {"": "cpu"}}
            model = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            model = get_peft_model(model, config, **options)
        model.print_trainable_parameters()
        return model, config


def _build_base_as_for_lora() -> None:
    """Have axolotl build the base model of a ReFT adapter as it builds LoRA's.

    axolotl quantizes the base, and prepares a quantized one for training, for the adapter names lora and qlora only: with
    any other, `load_in_4bit: true` is dropped in silence. No hook of its plugins comes early enough to mend that. So
    ReFT goes by the name of its like from the start of `ModelLoader.load` to `pre_lora_load`, and gets just what LoRA
    gets, in later versions too. Done once, when the plugin is registered; other adapters are not touched.
    """
    load = ModelLoader.load
    if hasattr(load, "_serves_reft"):
        return

    @functools.wraps(load)
    def load_by_name(loader: ModelLoader) -> Any:
        cfg = loader.cfg
        adapter = cfg.adapter
        if not is_reft(adapter):
            return load(loader)
        cfg._reft_adapter = adapter
        cfg.adapter = "qlora" if cfg.load_in_4bit else "lora"
        try:
            return load(loader)
        finally:
            cfg.adapter = adapter

    load_by_name._serves_reft = True  # type: ignore[attr-defined]
    ModelLoader.load = load_by_name  # type: ignore[method-assign]


def _check_saved(saved: PeftConfig, asked: ReftConfig, cfg: DictDefault) -> None:
    """A saved adapter brings its own settings: refuse one of another kind, and say where it differs from the YAML."""
    if not isinstance(saved, ReftConfig) or saved.intervention != asked.intervention:
        kind = saved.intervention if isinstance(saved, ReftConfig) else saved.peft_type.value.lower()
        raise ValueError(
            f"lora_model_dir: {cfg.lora_model_dir} holds an adapter of kind {kind}, but adapter: {cfg.adapter} asks for "
            f"another. Set adapter: {kind}, or point lora_model_dir to a {cfg.adapter} adapter."
        )
    fields = (
        "r",
        "positions",
        "share_weights",
        "dropout",
        "act_fn",
        "add_bias",
        "target_modules",
        "layers_to_transform",
    )
    differing = [
        f"{name} ({getattr(asked, name)!r} in the YAML)"
        for name in fields
        if getattr(saved, name) != getattr(asked, name)
    ]
    if differing:
        LOG.warning(
            "The adapter in %s keeps its own settings, not the YAML's: %s", cfg.lora_model_dir, ", ".join(differing)
        )
