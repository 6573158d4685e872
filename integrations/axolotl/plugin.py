"""The axolotl plugin: declares the adapters, and loads them as axolotl loads LoRA.

axolotl 0.21 and newer import this module in every run, whatever the adapter. Unless that is a ReFT adapter, the plugin
does nothing and imports nothing of axolotl's loaders.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, cast

from axolotl.integrations.base import AdapterCapabilities, BasePlugin, PluginManager
from axolotl.utils.logging import get_logger
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from peft_reft import PromptLengthsCollator, ReftConfig, explain_positions
from peft_reft.tuner.chat_template import AUTO
from peft_reft.tuner.config import own_fields
from peft_reft.tuner.forward.transformers_api import text_template
from peft_reft.tuner.interventions.formulas import INTERVENTIONS

from . import axolotl_api
from .keys import meaningless_keys, reft_config
from .template import find_template
from .validation import TOLD_BY_COLLATOR, about_learning_rate, about_weight_decay, is_reft, own_name


if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

# A logger below axolotl's own takes its level, so that infos are shown. Of other loggers only warnings are.
LOG = get_logger("axolotl.integrations.reft")


class ReftPlugin(BasePlugin):
    """Makes `adapter: loreft` (noreft, direft, nodireft, consreft, lobireft) work wherever `adapter: lora` does."""

    def get_input_args(self) -> str | None:
        return "peft_reft.integrations.axolotl.ReftArgs" if self._is_first() else None

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=name) for name in (*INTERVENTIONS, "reft")]

    def register(self, cfg: DictDefault) -> None:
        """Remove the LoRA keys that have no meaning for ReFT, and name them in a warning."""
        adapter = own_name(cfg.get("adapter"))
        if not is_reft(adapter):
            return
        cfg["adapter"] = adapter
        axolotl_api.check_axolotl()
        axolotl_api.build_base_as_for_lora()
        ignored = meaningless_keys(cfg)
        if ignored:
            LOG.warning("adapter: %s has no use for these LoRA keys, ignored: %s", cfg["adapter"], ", ".join(ignored))
        for key in ignored:
            del cfg[key]
        remark = about_learning_rate(cfg)
        if remark is not None:
            level, line = remark
            getattr(LOG, level)(line)
        decays = about_weight_decay(cfg)
        if decays is not None:
            LOG.warning(decays)

    def pre_lora_load(self, cfg: DictDefault, model: PreTrainedModel) -> None:
        """Set `adapter:` back to the YAML's value, once the base model is built as LoRA's is."""
        axolotl_api.own_name_again(cfg)

    def add_callbacks_post_trainer(self, cfg: DictDefault, trainer: Any) -> list:
        """For trainers that pass no labels, have the collator add `prompt_lengths`. Log edited tokens, and the sizes
        of edits, if asked to."""
        if is_reft(cfg.adapter) and self._is_first():
            config = reft_config(cfg)
            if cfg.unfrozen_parameters:
                # axolotl freezes what the patterns do not match once the adapter is loaded: the adapter's weights too.
                trainer.model.set_adapter(trainer.model.active_adapter)
                LOG.warning("unfrozen_parameters: the weights of adapter: %s are trained beside them", cfg.adapter)
            untold = config.response_template in (None, AUTO) and not config.spec.all_tokens
            if untold and cfg.rl in TOLD_BY_COLLATOR:
                trainer.data_collator = PromptLengthsCollator(trainer.data_collator)
            if cfg.debug or (cfg.reft or {}).get("debug"):
                _show_positions(trainer)
            every = (cfg.reft or {}).get("log_edits")
            if every:
                from peft_reft.tools.log_edits import LogEdits  # imports transformers' callbacks

                return [LogEdits(every)]
        return []

    def load_datasets(self, cfg: DictDefault, preprocess: bool = False) -> None:
        """Look for the response template before datasets and the base model are loaded, so that a YAML whose datasets
        do not say where answers begin is refused early."""
        if is_reft(cfg.adapter) and self._is_first():
            _settle_template(reft_config(cfg), cfg)

    def load_adapter(
        self, model: PreTrainedModel, cfg: DictDefault, inference: bool = False, config_only: bool = False
    ) -> tuple[PeftModel | None, PeftConfig] | None:
        if not is_reft(cfg.adapter):
            return None
        config = reft_config(cfg, axolotl_api.task_type(model))
        asked = config.response_template
        if asked == AUTO and not inference:
            _settle_template(config, cfg)
        elif isinstance(asked, str) and asked != AUTO:
            _check_template(asked, config, cfg)
        if cfg.seed is not None and not cfg.lora_model_dir:
            # As axolotl 0.21 does for LoRA: the start of the adapter depends on the seed alone, not on earlier draws.
            set_seed(cfg.seed)
        if config_only:
            return None, config
        options: dict[str, Any] = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            unset = {"response_template"} if asked == AUTO else set()
            _check_saved(PeftConfig.from_pretrained(cfg.lora_model_dir), config, cfg, unset)
            if cfg.lora_on_cpu:
                options |= {"max_memory": {"cpu": "256GiB"}, "device_map": {"": "cpu"}}
            adapted = PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference, **options)
        else:
            adapted = cast(PeftModel, get_peft_model(model, config, **options))
        adapted.print_trainable_parameters()
        return adapted, config

    def _is_first(self) -> bool:
        """Whether this is the first ReftPlugin. A YAML may name the plugin that axolotl has found by itself: then
        there are two, and the second does nothing."""
        plugins = PluginManager.get_instance().plugins.values()
        return next((plugin for plugin in plugins if isinstance(plugin, ReftPlugin)), self) is self


def _show_positions(trainer: Any) -> None:
    """Log the edited tokens of the first training batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    shown = io.StringIO()
    explain_positions(trainer.model, trainer.processing_class, batch, file=shown)
    LOG.info("debug: the tokens that ReFT edits in a training batch\n%s", shown.getvalue())


def _settle_template(config: ReftConfig, cfg: DictDefault) -> None:
    """Fill in the response template of the YAML's chat templates, where it sets none itself. Trainers whose collator
    tells the prompts need none."""
    if config.response_template != AUTO or config.spec.all_tokens:
        return
    if cfg.rl in TOLD_BY_COLLATOR or config.task_type not in (None, "CAUSAL_LM"):
        config.note_template(None)
        return
    ids = find_template(cfg)
    config.note_template(ids)
    if ids is not None:
        LOG.info("reft: response_template: %s, with which the chat template opens answers", ids)


def _check_template(text: str, config: ReftConfig, cfg: DictDefault) -> None:
    """Refuse a template with tokens that the YAML adds to the tokenizer: a saved adapter finds its template by the
    tokenizer that its config names, which lacks them."""
    ids = axolotl_api.tokenizer_of(cfg)(text, add_special_tokens=False)["input_ids"]
    saved = text_template(text, AutoTokenizer.from_pretrained(config.tokenizer_name_or_path or cfg.base_model))
    if not saved.occurs_in(ids):
        raise ValueError(
            f"reft: response_template: {text!r} holds tokens that this YAML adds to the tokenizer, so an adapter "
            "would not find it with the base model's. Give it as the token ids of your tokenizer: response_template: "
            f"{ids}."
        )


# Of a saved adapter: fields that are compared before, or that say nothing of what it edits.
NOT_COMPARED = {"intervention", "init_weights", "tokenizer_name_or_path", "width", "response_template_optional"}


def _check_saved(saved: PeftConfig, asked: ReftConfig, cfg: DictDefault, unset: set[str]) -> None:
    """Refuse a saved adapter with another edit, and warn of other settings that differ: the adapter keeps its own.
    Fields that the YAML leaves `unset` are not compared."""
    if not isinstance(saved, ReftConfig) or saved.intervention != asked.intervention:
        kind = (
            saved.intervention
            if isinstance(saved, ReftConfig)
            else str(getattr(saved.peft_type, "value", saved.peft_type)).lower()
        )
        raise ValueError(
            f"lora_model_dir: {cfg.lora_model_dir} holds an adapter of kind {kind}, but adapter: {cfg.adapter} asks "
            f"for another. Set adapter: {kind}, or point lora_model_dir to a {cfg.adapter} adapter."
        )
    differing = [
        f"{name} ({getattr(asked, name)!r} in the YAML)"
        for name in own_fields()
        if name not in NOT_COMPARED | unset
        and getattr(asked, name) is not None
        and getattr(saved, name) != getattr(asked, name)
    ]
    if differing:
        LOG.warning(
            "The adapter in %s keeps its own settings, not the YAML's: %s", cfg.lora_model_dir, ", ".join(differing)
        )
