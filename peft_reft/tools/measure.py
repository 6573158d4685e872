"""How much edits change hidden states, measured while a model runs.

Hooks on the edited modules and on the ReftLayers around them see the states before and after an edit, whatever the
edit, its strength and the number of adapters. They are there inside the context alone: a forward outside costs what it
did. Compiled models run uncompiled inside it. explain_edits.py and log_edits.py say what is done with the numbers.

Dimensions: B rows of the batch, S tokens of a row, F = B · S tokens of the flattened batch, T edited tokens, D width
of the hidden state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..tuner.forward.context import ForwardContext
from ..tuner.forward.transformers_api import forward_parameters
from ..tuner.interventions.apply import Job
from ..tuner.layer import ReftLayer
from ..tuner.positions.batch import Batch


@dataclass(frozen=True)
class MeasuredEdit:
    """The edits of one layer in one forward.

    Args:
        layer (`ReftLayer`): The layer.
        row_T, column_T (`torch.LongTensor`): [T], where the edited tokens lie in the batch. Padding is left out.
        size_T (`torch.FloatTensor`): [T], ‖edit(h) − h‖ / ‖h‖, in float32.
        tokens (`int`): How many tokens of the batch are no padding.
    """

    layer: ReftLayer
    row_T: Tensor
    column_T: Tensor
    size_T: Tensor
    tokens: int


class Measurement:
    """The edits of the forwards inside `measured`.

    Args:
        context (`ForwardContext`): The context of the model.
        with_gradients (`bool`): Whether forwards without gradients are passed over, such as those of a reference
            model in preference training.

    Attributes:
        edits (`list[MeasuredEdit]`): In the order in which the layers ran.
    """

    def __init__(self, context: ForwardContext, with_gradients: bool) -> None:
        self.edits: list[MeasuredEdit] = []
        self._has_encoder = context.has_encoder
        self._with_gradients = with_gradients
        self._arguments: dict[str, Any] = {}
        self._passed_over = False
        self._before: dict[str, tuple[Tensor, Tensor]] = {}  # layer name -> the edited tokens [F], and their states

    def note_call(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Runs before the model does."""
        self._arguments = {**dict(zip(forward_parameters(model), args)), **kwargs}
        # Asked here: reentrant checkpointing runs the layers of a forward with gradients without them.
        self._passed_over = self._with_gradients and not torch.is_grad_enabled()

    @torch.no_grad()
    def note_before(self, layer: ReftLayer, output: Any) -> None:
        """Runs when the wrapped module of a layer has run, before the edit."""
        call = layer.state.call
        if self._passed_over or call.in_use is None:  # in_use is None when backward runs a checkpointed layer again
            return
        jobs = (call.jobs or {}).get(layer.name)
        if jobs:
            h = _states(layer, output, jobs)
            edited_F = self._edited(layer, jobs, h.shape[:-1])
            # A copy: the edit may be made in place.
            self._before[layer.name] = edited_F, h.reshape(-1, h.shape[-1])[edited_F]

    @torch.no_grad()
    def note_after(self, layer: ReftLayer, output: Any) -> None:
        """Runs when a layer has run."""
        before = self._before.pop(layer.name, None)
        if before is None:
            return
        edited_F, h_TD = before
        h = _states(layer, output, (layer.state.call.jobs or {})[layer.name])
        h_TD, edited_TD = h_TD.float(), h.reshape(-1, h.shape[-1])[edited_F].float()
        size_T = (edited_TD - h_TD).norm(dim=-1) / h_TD.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        real_BS = self._real(layer, edited_F.numel())
        width, tokens = (h.shape[-2], edited_F.numel()) if real_BS is None else (real_BS.shape[1], real_BS.sum())
        index_T = edited_F.nonzero().flatten()
        self.edits.append(MeasuredEdit(layer, index_T // width, index_T % width, size_T, int(tokens)))

    def _edited(self, layer: ReftLayer, jobs: Sequence[Job], shape: torch.Size) -> Tensor:
        """bool [F]: the tokens that any of the jobs edits, without padding."""
        device = next(iter(layer.reft_R.values())).device
        edited = torch.zeros(shape, dtype=torch.bool, device=device)
        for job in jobs:
            if job.selection is not None:
                edited |= job.selection.edited_BS.to(device).view(shape)
            elif job.examples is not None:
                edited[job.examples(shape[0], device)] = True
            else:
                edited[...] = True
        real_BS = self._real(layer, edited.numel())
        return edited.flatten() if real_BS is None else edited.flatten() & real_BS.to(device).flatten()

    def _real(self, layer: ReftLayer, count: int) -> Tensor | None:
        """bool [B, S]: the tokens of the call that are no padding. None where a layer does not have a state for each
        token, and where an adapter that edits all tokens runs under a mask that does not show padding."""
        prefix = "decoder_" if self._has_encoder and not layer.in_encoder else ""
        try:
            batch = Batch.from_inputs(self._arguments, prefix)
            real_BS = None if batch is None else batch.sequences.real_BS
        except ValueError:
            return None
        return real_BS if real_BS is not None and real_BS.numel() == count else None


@contextmanager
def measured(model: nn.Module, with_gradients: bool = False) -> Iterator[Measurement]:
    """Measure the edits of the forwards inside this context.

    Args:
        model (`torch.nn.Module`): A model with ReFT adapters.
        with_gradients (`bool`): Whether forwards without gradients are passed over.

    Raises:
        ValueError: when the model has no ReFT adapter.
    """
    context = ForwardContext.of(model)
    if context is None:
        raise ValueError(f"{type(model).__name__} has no ReFT adapter, so there are no edits to measure.")
    found = Measurement(context, with_gradients)
    base = next(module for module in model.modules() if vars(module).get(ForwardContext.ATTRIBUTE) is context)
    with ExitStack() as handles:
        # torch.compile takes no notice of hooks that come after a compilation.
        handles.enter_context(torch.compiler.set_stance("force_eager"))
        handles.enter_context(base.register_forward_pre_hook(found.note_call, with_kwargs=True))
        for layer in (module for module in base.modules() if isinstance(module, ReftLayer)):

            def before(module: nn.Module, args: Any, output: Any, layer: ReftLayer = layer) -> None:
                found.note_before(layer, output)

            def after(layer: Any, args: Any, output: Any) -> None:
                found.note_after(layer, output)

            handles.enter_context(layer.base_layer.register_forward_hook(before))
            handles.enter_context(layer.register_forward_hook(after))
        yield found


def _states(layer: ReftLayer, output: Any, jobs: Sequence[Job]) -> Tensor:
    """The hidden states in the output of a layer, [B, S, D] unless the layer lays out its tokens in another way."""
    h = output[0] if isinstance(output, (tuple, list)) else output
    if layer.layout is None:
        return h
    selection = jobs[0].selection
    return layer.layout.tokens(h, None if selection is None else selection.edited_BS.shape[1]).flatten(2)
