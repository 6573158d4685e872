"""Names and behaviours of transformers that ReFT relies on: arguments, caches, `generate`, tokenizers, models.

This module holds everything that a release of transformers can rename. It knows nothing of adapters and layers. ReFT
would edit wrong tokens in silence if it took a call that continues a cache for a new prompt. So `find_past` recognises
a cache by its type, whatever the name of the argument; recurrent states and memories by their names; and raises an
error for any other argument that may carry the state of earlier calls. `RELIED_ON` lists the names whose loss would
raise no error by itself. `check_transformers` looks for them once, before the first adapter is made.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..positions.batch import PACKING
from ..positions.template import TextTemplate
from ..versions import gone, require, way_out


try:
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.activations import ACT2FN
    from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError(gone("transformers", f"what can't be imported ({error})")) from error

__all__ = ["ACT2FN", "AutoTokenizer", "Cache", "Conv1D", "bytes_to_unicode"]

RELIED_ON = (
    "transformers.cache_utils:Cache.get_seq_length",  # how many tokens a cache holds
    "transformers.cache_utils:DynamicLayer.crop",  # removes columns that were read for another prompt
    "transformers.cache_utils:Cache.is_linear",  # which of its layers hold recurrent states instead of tokens
    "transformers.generation.utils:GenerationMixin.generate",  # runs every forward of the prompt and of decoding
    "transformers.modeling_utils:PreTrainedModel.can_generate",  # whether labels are answers, without a task type
    "transformers.modeling_utils:PreTrainedModel.get_encoder",  # the encoder, whose tokens are not the decoder's
    "transformers.modeling_utils:PreTrainedModel.get_input_embeddings",
    "transformers.modeling_utils:PreTrainedModel.main_input_name",
    "transformers.configuration_utils:PreTrainedConfig.get_text_config",  # depth and width of the main stack
)
# Arguments of `generate` that decide which tokens are a prompt or padding. Each is a field of GenerationConfig.
GENERATION_SETTINGS = ("guidance_scale", "pad_token_id", "eos_token_id")


@functools.cache
def check_transformers() -> None:
    """Check, once in a process, that transformers has the names that ReFT relies on.

    Raises:
        RuntimeError: naming the piece that the installed transformers lacks, and the versions known to work.
    """
    require("transformers", *RELIED_ON)
    settings = vars(GenerationConfig())
    for name in GENERATION_SETTINGS:
        if name not in settings:
            raise RuntimeError(gone("transformers", f"GenerationConfig.{name}"))
    from transformers.utils.generic import TransformersKwargs

    if PACKING not in TransformersKwargs.__annotations__:
        raise RuntimeError(gone("transformers", f"the argument {PACKING} of models' forward"))


# -- calls ------------------------------------------------------------------------------------------------------------


def forward_parameters(module: nn.Module) -> tuple[str, ...]:
    """The names of the arguments of a module's forward, in the order in which positional arguments fill them."""
    return tuple(inspect.signature(module.forward).parameters)


def is_one_token(arguments: Mapping[str, Any]) -> bool:
    """Whether the `input_ids` of a forward, by name in `arguments`, are one token for each row: [B, 1]."""
    tokens = arguments.get("input_ids")
    return tokens is not None and tokens.shape[1] == 1


# -- the state of earlier calls ---------------------------------------------------------------------------------------

# Arguments that carry a cache of keys and values: "cache" since transformers 5.24, "past_key_values" before. Under
# these names a cache of a class that is not transformers' own is accepted, and counted by its `get_seq_length`.
CACHES = ("cache", "past_key_values")
# Arguments that carry a recurrent state or a memory, which does not say how many tokens it has read: those of Mamba
# and xLSTM before 5.24, of RWKV, XLNet and Reformer, and of a drafting model, which reads the keys and values of its
# target.
STATES = ("cache_params", "state", "mems", "past_buckets_states", "shared_kv_states")
# Arguments whose names sound like state, but that carry no tokens of the decoder: switches, outputs of another stack
# (an encoder, a vision tower, the audio stream of Voxtral), and the attention mask, which batch.py reads.
STATELESS = frozenset(
    {
        "attention_mask",
        "cross_attention_states",
        "encoder_cache",
        "encoder_hidden_states",
        "encoder_outputs",
        "encoder_past_key_values",
        "image_hidden_states",
        "mm_encoder_outputs",
        "output_hidden_states",
        "padding_cache",
        "use_cache",
        "use_mems",
    }
)
SOUNDS_LIKE_STATE = re.compile(
    r"(^|_)(cached?|caches|past|states?|stateful|mems?|memory|memories|history|recurrent|kv|kvs|buckets|seen)(_|$)"
)
PLAIN = (Tensor, bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


@dataclass(frozen=True)
class Past:
    """The state of earlier calls that a call of a model continues.

    Args:
        argument (`str`): The name of the argument that carries it.
        length (`int`, *optional*): The number of tokens that earlier calls have read. None: the state does not say it.
    """

    argument: str
    length: int | None


class UnknownState(ValueError):
    """Raised when an argument may carry the state of earlier calls, in a form that this module does not know."""


def find_past(model_name: str, arguments: Mapping[str, Any]) -> Past | None:
    """Find the state of earlier calls in the arguments of a call.

    Args:
        model_name (`str`): The class of the model, for messages.
        arguments (`Mapping[str, Any]`): The arguments of the call, by name.

    Returns:
        `Past`, *optional*: The state. None: no argument carries any.

    Raises:
        UnknownState: when an unknown argument may carry state, or when several arguments do.
        ValueError: when the call is one of continuous batching.
    """
    found: list[Past] = []
    for name, value in arguments.items():
        if value is not None and name not in STATELESS and (past := _past_in(model_name, name, value)) is not None:
            found.append(past)
    if len(found) > 1:
        names = " and ".join(past.argument for past in found)
        raise UnknownState(_unknown(model_name, f"arguments {names} both carry"))
    return found[0] if found else None


def _past_in(model_name: str, name: str, value: Any) -> Past | None:
    """The state of earlier calls in one argument. The errors are those of `find_past`."""
    if isinstance(value, Cache):
        decoder = getattr(value, "self_attention_cache", value)  # an EncoderDecoderCache holds two caches
        return Past(name, None if decoder.is_linear and all(decoder.is_linear) else int(decoder.get_seq_length()))
    if type(value).__name__ == "PagedAttentionCache":
        raise ValueError(
            "Continuous batching (generate_batch) mixes prompts and decode steps in one row, and does not say which "
            "token is which. Use generate, or set positions='all'."
        )
    if name in STATES:
        # PI0 has an argument `state`, too: a tensor, the state of a robot. RWKV's is a list.
        return None if name == "state" and isinstance(value, Tensor) else Past(name, None)
    if name in CACHES:
        # The form from before transformers had Cache: a tuple with the keys and values of each layer.
        if isinstance(value, (tuple, list)) and len(value) > 0:
            return Past(name, value[0][0].shape[-2])
        get_length = getattr(value, "get_seq_length", None)
        return Past(name, int(get_length()) if callable(get_length) else None)
    if may_carry_state(name, value):
        raise UnknownState(_unknown(model_name, f"argument {name} ({type(value).__name__}) may carry"))
    return None


def may_carry_state(name: str, value: Any) -> bool:
    """Whether an argument may carry the state of earlier calls: its name sounds like state, or its value is more than
    plain data. For arguments that are in none of `CACHES`, `STATES` and `STATELESS`."""
    if isinstance(value, (bool, int, float, str)):
        return False
    return SOUNDS_LIKE_STATE.search(name) is not None or not _is_plain(value)


def _is_plain(value: Any) -> bool:
    """Whether a value is a tensor, a number or text, or is made of those."""
    if isinstance(value, (tuple, list, set)):
        return all(map(_is_plain, value))
    return all(map(_is_plain, value.values())) if isinstance(value, dict) else isinstance(value, PLAIN)


def _unknown(model_name: str, carriers: str) -> str:
    return (
        f"{model_name}'s {carriers} what earlier calls have read, in a way that peft_reft does not know, so it can't "
        f"tell whether the tokens of this call are a prompt. {way_out('transformers')} Until then, name the tokens to "
        "edit of each call with intervention_mask [batch, tokens], or set positions='all'."
    )


def find_past_of_generate(model_name: str, kwargs: Mapping[str, Any]) -> Past | None:
    """Find the state of earlier calls in the keyword arguments of `generate`.

    Most arguments of `generate` are not passed on to the model, so an unknown argument is no error here. The forwards
    that `generate` makes are checked by `find_past`.

    Args:
        model_name (`str`): The class of the model, for messages.
        kwargs (`Mapping[str, Any]`): The keyword arguments.

    Returns:
        `Past`, *optional*: The state. None: no argument that is known to carry state is there.

    Raises:
        UnknownState: when several arguments carry state.
    """
    known = {name: value for name, value in kwargs.items() if name in (*CACHES, *STATES) or isinstance(value, Cache)}
    return find_past(model_name, known)


def crop_cache(cache: Cache, columns: int) -> bool:
    """Remove the last columns of a cache, so that they can be read again.

    Args:
        cache (`Cache`): The cache. Changed in place.
        columns (`int`): How many columns to remove.

    Returns:
        `bool`: Whether they were removed. False: a cache of this kind keeps a state, or a window, that has forgotten
            what was before, and it is as it was.
    """
    layers = list(getattr(cache, "layers", ()))
    # Of these types themselves: a subclass may have a window or a state. StaticLayer has no crop before 5.24.
    if not layers or not all(
        type(layer) in (DynamicLayer, StaticLayer) and hasattr(layer, "crop") for layer in layers
    ):
        return False
    length = int(cache.get_seq_length())
    for layer in layers:
        layer.crop(-columns)
    if int(cache.get_seq_length()) != length - columns:
        raise RuntimeError(gone("transformers", "a crop of negative numbers in the layers of a Cache"))
    return True


# -- generate ---------------------------------------------------------------------------------------------------------


def generation_setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """A setting of a `generate` with these keyword arguments. They come first, then the `generation_config` among them
    or, if there is none, the model's."""
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
    return kwargs.get(name, getattr(config, name, None))


def has_second_prompt(model: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether a `generate` also runs the model on a second prompt that it makes (classifier-free guidance)."""
    return generation_setting(model, kwargs, "guidance_scale") not in (None, 1, 1.0)


def main_input(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The input of a `generate` with these arguments: token ids [B, S], embeddings [B, S, D], or the input of an
    encoder, for example audio features. None: there is none."""
    names = ("inputs_embeds", "inputs", "input_ids", getattr(model, "main_input_name", "input_ids"))
    given = [kwargs[name] for name in names if kwargs.get(name) is not None] + list(args[:1])
    return given[0] if given else None


def inferred_mask(model: Any, input_ids: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """The attention mask [B, S], int64, that `generate` infers for prompts without one: 0 at pad tokens. If the pad
    token is also an end token, `generate` infers no padding."""
    pad, eos = (generation_setting(model, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or pad in end_ids(eos):
        return torch.ones_like(input_ids)
    return (input_ids != pad).long()


# -- tokenizers -------------------------------------------------------------------------------------------------------


def text_template(text: str, tokenizer: Any) -> TextTemplate:
    """Make the response template that finds a text in the tokens of a tokenizer.

    Args:
        text (`str`): The text.
        tokenizer (`transformers.PreTrainedTokenizerBase`): The tokenizer of the prompts.

    Raises:
        ValueError: when the tokenizer's tokens do not show their bytes, or when the tokenizer changes the text.
    """
    template = TextTemplate(text, _token_bytes(tokenizer))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not template.occurs_in(ids):
        raise ValueError(
            f"response_template={text!r} is not found in its own tokens: {type(tokenizer).__name__} changes the text. "
            f"Give the token ids that your prompts end with, for example response_template={ids}."
        )
    return template


def _token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes of each token, by its id.

    Raises:
        ValueError: when the tokenizer is neither of byte-level nor of SentencePiece kind.
    """
    kinds = _decoders(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    if "ByteLevel" in kinds:
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def read(token: str) -> bytes:
            return b"".join(bytes([byte_of[c]]) if c in byte_of else c.encode() for c in token)
    elif {"ByteFallback", "Metaspace", "Replace"} & kinds:

        def read(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes([int(token[3:5], 16)])
            return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
    else:
        raise ValueError(
            "response_template as text needs a tokenizer of byte-level or SentencePiece kind, and "
            f"{type(tokenizer).__name__} is neither. Give the token ids that your prompts end with, for example "
            "response_template=[32, 7, 13]."
        )
    return [
        added[index].encode() if index in added else read(token) if token is not None else b""
        for index, token in enumerate(tokens)
    ]


def _decoders(tokenizer: Any) -> set[str]:
    """The types of the decoder steps in a tokenizer's `tokenizer.json`. Empty for a tokenizer without one."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return set()
    decoder = json.loads(backend.to_str())["decoder"] or {}
    return {step["type"] for step in [decoder, *decoder.get("decoders", ())] if "type" in step}


# -- models -----------------------------------------------------------------------------------------------------------

# The attributes that hold a module's checkpoint function: of transformers' blocks, and of torch's wrapper. If a module
# checkpoints under another name, its recompute has no plan, and ReftLayer raises an error.
CHECKPOINT_FUNCTIONS = ("_gradient_checkpointing_func", "checkpoint_fn")


def end_ids(eos: Any) -> tuple[int, ...]:
    """An `eos_token_id` as a tuple: a config holds None, one id or several."""
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(int(index) for index in eos)


def eos_token_id(model: Any) -> Any:
    """The `eos_token_id` at which a model's `generate` stops: of its generation config or, without one, its config."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return getattr(getattr(model, "config", None), "eos_token_id", None) if eos is None else eos


def can_generate(model: Any) -> bool:
    """Whether a model generates text, so that its labels are answers. Models of other libraries are assumed to."""
    return bool(getattr(model, "can_generate", lambda: True)())


def text_config(model: nn.Module) -> Any:
    """The config of a transformers model or, if that has several parts, of its text part. None for other models."""
    get_text_config = getattr(getattr(model, "config", None), "get_text_config", None)
    return get_text_config() if get_text_config else None


def encoder_of(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model, None for other models."""
    takes_both = "decoder_input_ids" in forward_parameters(model)
    get_encoder: Any = getattr(model, "get_encoder", None)
    encoder = get_encoder() if takes_both and get_encoder is not None else None
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def decoder_of(model: nn.Module) -> nn.Module:
    """The text decoder of a model with several towers. The model itself where it has one tower only, or says none."""
    get_decoder: Any = getattr(model, "get_decoder", None)
    decoder = get_decoder() if get_decoder is not None else None
    # ModernBERT's decoder has a linear layer called `decoder`, which get_decoder returns.
    if not isinstance(decoder, nn.Module) or not any(isinstance(m, nn.ModuleList) for m in decoder.modules()):
        return model
    return decoder


def block_names(model: nn.Module) -> set[str]:
    """The class names of its blocks that a model lists in `_no_split_modules`. accelerate keeps each on one device."""
    return set(getattr(model, "_no_split_modules", None) or ())
