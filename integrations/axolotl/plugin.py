"""The axolotl plugin: declares the adapters, and loads them as axolotl loads LoRA."""

from __future__ import annotations

import functools
import io
from typing import Any, cast

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.loaders import load_tokenizer
from axolotl.loaders.adapter import _get_peft_task_type
from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

from peft_reft import PromptLengthsCollator, ReftConfig, explain_positions
from peft_reft.interventions import INTERVENTIONS
from peft_reft.templates import TextTemplate

from .args import is_reft, meaningless_keys, reft_config


# A name below axolotl's own, for its log level to hold: other libraries' are shown from warnings up.
LOG = get_logger("axolotl.integrations.reft")


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

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Any) -> list:
        """The trainer is there, with its data: tell it where prompts end, and, asked to, show it."""
        if is_reft(cfg.adapter):
            config = reft_config(cfg)
            if cfg.rl and config.response_template is None and not config.spec.all_tokens:
                trainer.data_collator = PromptLengthsCollator(trainer.data_collator)
            if cfg.debug or (cfg.reft or {}).get("debug"):
                _show_positions(trainer)
        return []

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if not is_reft(cfg.adapter):
            return None
        config = reft_config(cfg, _get_peft_task_type(model))
        if isinstance(config.response_template, str):
            _check_template(config.response_template, config, cfg)
        if config_only:
            return None, config
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            _check_saved(PeftConfig.from_pretrained(cfg.lora_model_dir), config, cfg)
            if cfg.lora_on_cpu:
                options |= {"max_memory": {"cpu": "256GiB"}, "device_map": {"": "cpu"}}
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            adapted = cast(PeftModel, get_peft_model(model, config, **options))
        adapted.print_trainable_parameters()
        return adapted, config


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
    loading: Any = ModelLoader
    loading.load = load_by_name


def _show_positions(trainer: Any) -> None:
    """Log the edited tokens of the first training batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    shown = io.StringIO()
    explain_positions(trainer.model, trainer.processing_class, batch, file=shown)
    LOG.info("debug: the tokens that ReFT edits in a training batch\n%s", shown.getvalue())


def _check_template(text: str, config: ReftConfig, cfg: DictDefault) -> None:
    """An adapter finds its template by the tokenizer that its config names. axolotl may have added tokens to it."""
    ids = load_tokenizer(cfg)(text, add_special_tokens=False)["input_ids"]
    saved = TextTemplate(text, AutoTokenizer.from_pretrained(config.tokenizer_name_or_path or cfg.base_model))
    if not saved.occurs_in(ids):
        raise ValueError(
            f"reft: response_template: {text!r} holds tokens that this YAML adds to the tokenizer, so an adapter would not find "
            f"it with the base model's. Give it as the token ids of your tokenizer: response_template: {ids}."
        )


def _check_saved(saved: PeftConfig, asked: ReftConfig, cfg: DictDefault) -> None:
    """A saved adapter brings its own settings: refuse one of another kind, and say where it differs from the YAML."""
    if not isinstance(saved, ReftConfig) or saved.intervention != asked.intervention:
        kind = (
            saved.intervention
            if isinstance(saved, ReftConfig)
            else str(getattr(saved.peft_type, "value", saved.peft_type)).lower()
        )
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
        "rank_pattern",
        "layers_to_transform",
        "response_template",
        "prompt_boundary",
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
