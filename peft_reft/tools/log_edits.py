"""`LogEdits`: a callback that logs, every N steps of a training, by how much the edits change hidden states.

Between these steps nothing is hooked, so they cost what they cost without the callback.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from .measure import MeasuredEdit, Measurement, measured


if TYPE_CHECKING:
    from transformers import Trainer


class LogEdits(TrainerCallback):
    """Logs, every N steps, the mean size of the edits of each layer, and the share of tokens that are edited.

    The size of an edit is ‖edit(h) − h‖ / ‖h‖, as in `explain_edits`. The numbers go where the Trainer's loss goes
    (`report_to`, `state.log_history`), in a row of their own:

    - `reft/edit_size`: the mean over all layers and edited tokens of the step's batches;
    - `reft/edit_size/<layer>`: of one layer;
    - `reft/edited_tokens`: edited tokens by all tokens, padding left out.

    Each process of a distributed run measures its own batches, and the Trainer reports those of the first.

    Args:
        every (`int`): N, in optimizer steps. The steps that are measured are N, 2N, ...

    Raises:
        ValueError: when `every` is not at least 1. When a training begins: when the model has no ReFT adapter, or the
            Trainer has a `train` of its own and was not given the callback in `callbacks=`.

    Example:

        ```py
        >>> from peft_reft.tools.log_edits import LogEdits

        >>> trainer = Trainer(model, args=args, train_dataset=data, callbacks=[LogEdits(every=50)])
        ```
    """

    def __init__(self, every: int) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(
                f"LogEdits(every={every!r}) is not possible. Allowed: a number of steps from 1, such as 50."
            )
        self.every = every
        self.trainer: Trainer | None = None  # trainers.py sets it: the Trainer that trains
        self._hooks = ExitStack()
        self._found: Measurement | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.stop()  # an earlier training may have ended with an error
        if self.trainer is None:
            raise ValueError("LogEdits has no Trainer to log to. Give it to the Trainer in callbacks=[LogEdits(...)].")
        with measured(model):  # raises where there is nothing to measure
            pass

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if (state.global_step + 1) % self.every == 0:
            self._found = self._hooks.enter_context(measured(model, with_gradients=True))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = self.stop()
        if found is not None and found.edits:
            assert self.trainer is not None
            from transformers import Trainer  # here: importing it imports trainers.py, which imports this module

            # Not trainer.log: TRL's adds to a row what it has gathered for its own next one, and forgets it.
            Trainer.log(self.trainer, _summary(found.edits))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop()

    def stop(self) -> Measurement | None:
        """Take the hooks of a measured step off the model, also where an error has ended the step."""
        found, self._found = self._found, None
        self._hooks.close()
        return found


def _summary(edits: list[MeasuredEdit]) -> dict[str, float]:
    """The numbers to log of the edits of a step."""
    by_layer: dict[str, list[MeasuredEdit]] = {}
    for edit in edits:
        by_layer.setdefault(edit.layer.name, []).append(edit)
    # All layers that edit read the same batches. Where adapters edit other tokens in other layers, the layer with the
    # most edited tokens counts.
    share = max(
        sum(edit.size_T.numel() for edit in own) / max(1, sum(edit.tokens for edit in own))
        for own in by_layer.values()
    )
    return {
        "reft/edit_size": _mean(edits),
        **{f"reft/edit_size/{name}": _mean(own) for name, own in by_layer.items()},
        "reft/edited_tokens": share,
    }


def _mean(edits: list[MeasuredEdit]) -> float:
    """The mean size over all tokens. 0 where there are none."""
    size_T = torch.cat([edit.size_T.cpu() for edit in edits])
    return float(size_T.mean()) if size_T.numel() else 0.0
