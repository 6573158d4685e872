"""How the output of a module holds the hidden states of the tokens, where that is not [B, S, D].

This module knows the blocks of transformers whose output is laid out in another way, by the names of their classes:
sizes do not tell, because B, S and the number of streams can be equal. Everything else is taken for [B, S, D], which
forward/probe.py confirms. It also knows the architectures whose blocks main_stack of targets.py can't find by
structure, or that can't be edited.

Dimensions: B rows of the batch, S tokens of a row, D width of the hidden state, N streams a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Where the hidden states of the tokens lie in a module's output.

    Args:
        kind (`str`): A key of `VIEWS`, or `"padded"`.
        number (`int`): The index of the active stream for `"active stream"`, the number of tokens that the model puts
            before the caller's for `"prefix"`, N for the kinds that edit all streams.
    """

    kind: str
    number: int

    def tokens(self, state: Tensor, count: int | None) -> Tensor:
        """The hidden states as a view [B, S, D] or [B, S, N, D] of the output, through which it can be edited.

        Args:
            state (`torch.Tensor`): The output.
            count (`int`, *optional*): S. None: all states of the output are edited.
        """
        if self.kind == "padded":  # [B, S + P, D]: the model makes S a multiple of a length by tokens of its own
            return state if count is None else state[:, :count]
        return VIEWS[self.kind](state, self.number)

    @property
    def streams(self) -> int:
        """How many times the hidden size of the model is the width of the edit."""
        return self.number if self.kind in ("streams", "wide", "predicting streams") else 1


VIEWS: dict[str, Callable[[Tensor, int], Tensor]] = {
    # [N, B, S, D]. The block reads one stream, the active one, and predicts the others from it.
    "active stream": lambda state, index: state[index],
    # [B, S, N, D]. The block reads a learned mixture of all streams: none is more than another, so all are edited.
    "streams": lambda state, _: state,
    # [B, S, N · D]: the same, and already flat.
    "wide": lambda state, _: state,
    # [B, N · S, D]: the tokens of one stream, then those of the next, each of which predicts a token further on.
    "predicting streams": lambda state, streams: state.unflatten(1, (streams, -1)).transpose(1, 2),
    # [S, B, D].
    "tokens first": lambda state, _: state.transpose(0, 1),
    # [B, D, S], for convolutions.
    "tokens last": lambda state, _: state.transpose(1, 2),
    # [B, P + S, D] in a call that reads a prompt, [B, S, D] in a decode step.
    "prefix": lambda state, length: state[:, length:] if state.shape[1] > length else state,
}

# Class of a block -> the kind of its layout, and the field of its model's config that holds the number.
BLOCKS = {
    "Gemma3nTextDecoderLayer": ("active stream", "altup_active_idx"),
    "DeepseekV4DecoderLayer": ("streams", "hc_mult"),
    "Glm5NextTextDecoderLayer": ("streams", "hc_mult"),
    "HYV4DecoderLayer": ("streams", "hc_mult"),
    "HYV4VLDecoderLayer": ("streams", "hc_mult"),
    "ProphetNetDecoderLayer": ("predicting streams", "ngram"),
    "Qwen4ExpTextDecoderLayer": ("wide", "hc_count"),
}
# Class of a module in which every output has this layout -> the same two.
AROUND: dict[str, tuple[str, str | None]] = {
    "XLNetModel": ("tokens first", None),
    "CpmAntEncoder": ("prefix", "prompt_length"),
    "BigBirdModel": ("padded", None),
    "BigBirdPegasusEncoder": ("padded", None),
    "LEDEncoder": ("padded", None),
    "LongformerModel": ("padded", None),
    "ReformerModel": ("padded", None),
    "SqueezeBertEncoder": ("tokens last", None),
}


def layout_of(module: nn.Module, around: list[nn.Module], config: Any) -> Layout | None:
    """The layout of a module's output. None: [B, S, D].

    Args:
        module (`torch.nn.Module`): The module.
        around (`list[torch.nn.Module]`): The modules that it lies in.
        config (`PreTrainedConfig`): The text config of the model, None for a model of another library.
    """
    found: tuple[str, str | None] | None = BLOCKS.get(type(module).__name__)
    if found is None:
        found = next((AROUND[type(outer).__name__] for outer in around if type(outer).__name__ in AROUND), None)
    if found is None:
        return None
    kind, field = found
    number = 0 if field is None else int(getattr(config, field))
    return Layout(kind, number + 1 if kind == "predicting streams" else number)  # `ngram` does not count the first


# -- architectures whose blocks can't be found by structure -----------------------------------------------------------

# model_type of the (text) config -> a regex for the modules that are its blocks. XLM has no module for a block: its
# last norm is the end of one. SqueezeBERT's blocks return dictionaries; their last module is edited instead. The
# blocks of ALBERT and HRM run several times in a forward, and are edited each time.
STACKS = {
    "albert": r".*\balbert_layers\.\d+",
    "flaubert": r".*\blayer_norm2\.\d+",
    "hrm_text": r".*\b[HL]_module\.layers\.\d+",
    "squeezebert": r".*\bencoder\.layers\.\d+\.output",
    "xlm": r".*\blayer_norm2\.\d+",
}


@dataclass(frozen=True)
class Refusal:
    """Why the blocks of an architecture are not edited, and what can be edited instead.

    Args:
        reason (`str`): What is in the way, to follow "because".
        target_modules (`str`): A regex that works.
        refused (`str`): A regex for the modules that may not be chosen either.
    """

    reason: str
    target_modules: str
    refused: str | None = None


# model_type of the (text) config -> its refusal.
REFUSED = {
    "blt": Refusal(
        "the main ones work on patches of several tokens",
        r".*\blocal_decoder\.layers\.\d+",
        r".*\b(global_transformer|patcher)\..*",
    ),
    "canine": Refusal(
        "the main ones have one state for several characters",
        r".*\b(initial|final)_char_encoder\.layer\.\d+",
        r".*\bcanine\.encoder\..*",
    ),
    "reformer": Refusal(
        "its backward computes the inputs of reversible blocks from their outputs, which an edit would falsify",
        r".*\bembeddings",
        r".*\bencoder\.layers\..*|.*\bencoder\.layers",
    ),
    "funnel": Refusal(
        "its blocks after the first have fewer states than tokens: they pool neighbouring tokens",
        r".*\bencoder\.blocks\.0\.\d+",
    ),
}

# model_type of configs of models whose rows of input_ids are not the rows of their hidden states.
WITHOUT_ROWS = {
    "musicgen_decoder": "the codebooks of one example are rows of input_ids",
    "musicgen_melody_decoder": "the codebooks of one example are rows of input_ids",
}
