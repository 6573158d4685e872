"""What a ReFT adapter needs of transformers' Trainer, given to every Trainer whose model has one.

Trainer, and TRL's and axolotl's, which derive from it, drop dataset columns that the base model's forward does not
name, and have no entry point for plugins. So `serve_trainers` wraps three methods of Trainer, once in a process. A
Trainer gets a callback that logs the rows without a token to edit at the end of each epoch, dataset columns that
only ReFT reads (`REFT_ARGUMENTS`) reach the model, the response template that an adapter asks for is found by the
Trainer's tokenizer, and the model cards that Trainers write over PEFT's say how to load the adapter. A Trainer whose
model has no ReFT adapter stays as it is.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..tuner.card import CARD, introduce
from ..tuner.config import ReftConfig
from ..tuner.forward.context import ForwardContext
from ..tuner.positions.batch import REFT_ARGUMENTS
from ..tuner.positions.unedited import counted
from ..tuner.rules import use_tokenizer
from ..tuner.versions import require
from .collator import ColumnsCollator
from .log_edits import LogEdits


LOG = logging.getLogger(__name__)
# The methods of Trainer that drop columns, from a dataset and from the rows that a collator is given.
DROPPING = ("_remove_unused_columns", "_get_collator_with_removed_columns")


class UneditedRowsCallback(TrainerCallback):
    """Logs, at the end of each epoch, how many rows had no token to edit, where there were any.

    The text goes to the logger `peft_reft.tools.trainers`, the numbers (`reft_rows`, `reft_rows_unedited`) to the
    Trainer's `state.log_history`. Each process of a distributed run counts its own rows.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        context = ForwardContext.of(model)
        if context is not None:
            context.state.unedited.restart()

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        context = ForwardContext.of(model)
        for rules, counts in () if context is None else context.state.unedited.take_trained():
            where = f" in process {args.process_index}" if args.world_size > 1 else ""
            LOG.warning(
                "%s: %s had no token to edit up to epoch %.2f%s, since the count before (%s of them with a prompt of "
                "one token). They were passed over.",
                *(rules, counted(counts), state.epoch or 0, where, f"{counts.short:,}"),
            )
            numbers = {"reft_rows": counts.rows, "reft_rows_unedited": counts.unedited}
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})


def serve_trainers() -> None:
    """Wrap the methods of Trainer, once in a process. Importing peft_reft calls this."""
    if hasattr(Trainer.__init__, "_serves_reft"):
        return
    Trainer.__init__ = _serving(Trainer.__init__)  # type: ignore[method-assign]
    Trainer.train = _logging_edits(Trainer.train)  # type: ignore[method-assign]
    for name in DROPPING:
        if hasattr(Trainer, name):
            setattr(Trainer, name, _keeping_columns(getattr(Trainer, name)))


def _serving(init: Any) -> Any:
    @functools.wraps(init)
    def make(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        context = ForwardContext.of(trainer.model) if trainer.model is not None else None
        if context is not None:
            require("transformers", *(f"transformers.trainer:Trainer.{name}" for name in DROPPING))
            trainer.add_callback(UneditedRowsCallback)
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, LogEdits) and callback.trainer is None:
                    callback.trainer = trainer
            if getattr(trainer, "processing_class", None) is not None:
                use_tokenizer(trainer.model, trainer.processing_class)
            subspaces = {rules.subspaces for rules in context.rules.values() if rules.subspaces}
            names = [name for name, _ in next(iter(subspaces))] if len(subspaces) == 1 else None
            kept = getattr(trainer.args, "truncation_mode", "keep_start") if _by_completion(context) else None
            trainer.data_collator = ColumnsCollator(trainer.data_collator, names, kept)
            trainer.create_model_card = _introducing(trainer)  # type: ignore[method-assign]

    make._serves_reft = True  # type: ignore[attr-defined]
    return make


def _logging_edits(train: Any) -> Any:
    """`Trainer.train`, which is the Trainer that its LogEdits log to, and takes their hooks off where it fails."""

    @functools.wraps(train)
    def run(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        own = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LogEdits)]
        for callback in own:
            callback.trainer = trainer
        try:
            return train(trainer, *args, **kwargs)
        finally:
            for callback in own:
                callback.stop()

    return run


def _introducing(trainer: Any) -> Any:
    """The Trainer's `create_model_card`, which introduces the trained adapter, too. At each checkpoint TRL writes a
    card for the folder above it."""
    create = trainer.create_model_card

    @functools.wraps(create)
    def create_model_card(*args: Any, **kwargs: Any) -> None:
        create(*args, **kwargs)
        configs = getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).values()
        config = next((config for config in configs if isinstance(config, ReftConfig)), None)
        folder = Path(trainer.args.output_dir)
        if config is None or not trainer.is_world_process_zero() or not (folder / CARD).exists():
            return
        if (folder / CONFIG_NAME).exists():
            introduce(folder, config, trainer.hub_model_id)
        else:  # TRL writes the card just before the checkpoint
            checkpoint = f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
            introduce(folder, config, trainer.hub_model_id or checkpoint, folder / checkpoint)

    return create_model_card


def _by_completion(context: ForwardContext) -> bool:
    """Whether a completion mask gives the prompts: labels would, and a template does not. TRL drops the mask from rows
    that it trains on all tokens of (`completion_only_loss=False`), whose labels then mark no prompt."""
    return all(
        (rules.template is None or rules.template_optional)
        and rules.reads_labels
        and not rules.every
        and not rules.spec.all_tokens
        for rules in context.rules.values()
    )


def _keeping_columns(method: Any) -> Any:
    @functools.wraps(method)
    def keep(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        context = ForwardContext.of(trainer.model) if trainer.args.remove_unused_columns else None
        if context is not None:
            trainer._set_signature_columns_if_needed()
            kept = trainer._signature_columns
            read = [*REFT_ARGUMENTS, *(["completion_mask"] if _by_completion(context) else [])]
            trainer._signature_columns = [*kept, *(name for name in read if name not in kept)]
        return method(trainer, *args, **kwargs)

    return keep
