"""What an example YAML of axolotl needs to be trained on a CPU: a tiny base model of its architecture, a tokenizer
with its special tokens and a chat template, and a few rows in the columns that its datasets read.

No hub is asked, so the architecture of a base model is known by its name (`ARCHITECTURES`), and for a chat template
that only the hub's tokenizer has, one of axolotl's stands in (`STAND_INS`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers as t
from models import tokenizer
from transformers.models.auto import modeling_auto
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from zoo import tiny_config


VOCAB, POSITIONS = 768, 1024


class NotBuilt(Exception):
    """Raised where there is no tiny counterpart of what a YAML names, for the reason given."""


# A regex of a base model's name -> its model_type in transformers. The first that matches counts.
ARCHITECTURES = {
    r"Qwen/Qwen-7B|replit|K2-Horizon|Nemotron-Labs-Diffusion": "the model's code is in its repository",
    r"GPTQ": "weights of GPTQ need a GPU",
    r"Llama-4": "llama4",
    r"Llama-3.2-11B-Vision": "mllama",
    r"llava|pixtral": "llava",
    r"Voxtral": "voxtral",
    r"Ministral-3-|Mistral-Small-3\.1|Mistral-Medium-3|Shieldstral|Magistral-Small-2509|Mistral-Small-4": "mistral3",
    r"Ministral-8B": "ministral",
    r"Mixtral": "mixtral",
    r"M(ag)?istral|Devstral": "mistral",
    r"falcon-7b": "falcon",
    r"Falcon-H1": "falcon_h1",
    r"gemma-7b": "gemma",
    r"gemma-2-": "gemma2",
    r"gemma-3-(1b|270m)": "gemma3_text",
    r"gemma-3-4b": "gemma3",
    r"gemma-3n": "gemma3n",
    r"gemma-4-12B": "gemma4_unified",
    r"[Gg]emma-4": "gemma4",
    r"gpt-j": "gptj",
    r"pythia": "gpt_neox",
    r"Cerebras": "gpt2",
    r"dbrx": "dbrx",
    r"DeepSeek-V2": "deepseek_v2",
    r"DeepSeek-V4": "deepseek_v4",
    r"Jamba": "jamba",
    r"Qwen1.5-MoE": "qwen2_moe",
    r"Qwen2-VL": "qwen2_vl",
    r"Qwen2.5-VL": "qwen2_5_vl",
    r"Qwen3-30B": "qwen3_moe",
    r"Qwen3-Next": "qwen3_next",
    r"Qwen3\.[56]-(35B|122B)|Nex-N2": "qwen3_5_moe",
    r"Qwen3\.(5|8-27B)": "qwen3_5",
    r"Qwen3.8-Flash-Next": "qwen4_exp",
    r"Qwen3|Plano": "qwen3",
    r"Qwen2|DeepCoder|cogito.*qwen|MiMo": "qwen2",
    r"stablelm": "stablelm",
    r"starcoder2": "starcoder2",
    r"Beam|beam": "beam",
    r"command-r7b": "cohere2",
    r"North-Micro": "cohere_compass",
    r"AFM": "arcee",
    r"Trinity": "afmoe",
    r"Apertus": "apertus",
    r"LFM2-8B": "lfm2_moe",
    r"LFM2-VL": "lfm2_vl",
    r"GLM-4-32B": "glm4",
    r"GLM-4.5-Air": "glm4_moe",
    r"GLM-4.6V": "glm46v",
    r"GLM-4.7-Flash": "glm4_moe_lite",
    r"GLM-5.3": "glm5_next",
    r"GLM-5.2": "glm_moe_dsa",
    r"gpt-oss": "gpt_oss",
    r"Hunyuan": "hunyuan_v1_dense",
    r"InternVL": "internvl",
    r"Kimi-Linear": "kimi_linear",
    r"Ling-3": "bailing_hybrid",
    r"MiniMax-M2": "minimax_m2",
    r"Muse-Glimmer": "muse_glimmer",
    r"Nemotron-Mini": "nemotron",
    r"NVIDIA-Nemotron-3": "nemotron_h",
    r"Olmo-3": "olmo3",
    r"PaddleOCR": "paddleocr_vl",
    r"[Pp]hi-3": "phi3",
    r"phi-1": "phi",
    r"Seed-OSS": "seed_oss",
    r"SmolVLM": "smolvlm",
    r"[Ll]lama|Yi-34B|xgen|MiniCPM5": "llama",
}
# The beginning of a model_type -> the chat template of axolotl that stands in for that of the hub's tokenizer.
STAND_INS = {
    "llama": "llama3",
    "qwen3": "qwen3",
    "qwen": "qwen_25",
    "mi": "mistral_v7_tekken",
    "gemma4": "gemma4",
    "gemma3": "gemma3",
    "gemma": "gemma",
    "phi3": "phi_3",
    "falcon_h1": "falcon_h1",
    "jamba": "jamba",
    "cohere": "command_a",
    "deepseek": "deepseek_v3",
}
# Tokens that processors look for, by the names that most have, and by the attributes of their tokenizers.
PARTS = ["<image>", "<video>", "<|image|>", "<|video|>", "<|audio|>", "<|image_pad|>", "<|video_pad|>"]
NAMED_PARTS = {
    "image_token": "<image>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "boa_token": "<boa>",
    "eoa_token": "<eoa>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
}
# What the defaults of the configs in `zoo` lack for sequences of axolotl's length.
SPECIAL: dict[str, dict[str, Any]] = {}


def known_architecture(base_model: str) -> str | None:
    """What `ARCHITECTURES` says of a base model."""
    return next((kind for regex, kind in ARCHITECTURES.items() if re.search(regex, base_model)), None)


def architecture(base_model: str) -> str:
    """The model_type of a base model.

    Raises:
        NotBuilt: when transformers has none for it, or its name says nothing.
    """
    found = known_architecture(base_model)
    if found is None:
        raise NotBuilt(f"nothing here knows the architecture of {base_model}")
    if found not in t.CONFIG_MAPPING:
        raise NotBuilt(found if " " in found else f"transformers {t.__version__} has no {found}")
    return found


def tiny_base(config: dict[str, Any], folder: Path) -> tuple[Path, list[str]]:
    """Save a tiny random model of a YAML's architecture with its tokenizer, and its processor where it names one.

    Args:
        config: The YAML.
        folder: Where to put it. The base model's name is kept: axolotl goes by it in places.

    Returns:
        The folder of the model, and what stands in for what.

    Raises:
        NotBuilt: when there is none.
    """
    kind = architecture(config["base_model"])
    target = folder / Path(config["base_model"]).name
    tokens, remarks = _tokenizer(config, kind)
    try:
        model = _model(kind, bool(config.get("processor_type")))
    except Exception as error:
        raise NotBuilt(f"no tiny {kind}: {_first_line(error)}") from error
    if model.config.model_type != kind:
        remarks.append(f"the text model alone ({model.config.model_type})")
    model.save_pretrained(target)
    tokens.save_pretrained(target)
    # Some models' tokenizers are loaded by their processors, whether or not the YAML asks for one.
    try:
        _processor(kind, tokens).save_pretrained(target)
    except Exception as error:
        if config.get("processor_type"):
            raise NotBuilt(f"no tiny processor of {kind}: {_first_line(error)}") from error
    if config.get("processor_type"):
        remarks.append("rows without images")
    return target, remarks


def _model(kind: str, sees: bool) -> Any:
    """A model of an architecture. Without a processor the text model of one that sees, which loads none."""
    config_class = t.CONFIG_MAPPING[kind]
    maps = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    name = next(names[kind] for names in (maps if sees else reversed(maps)) if kind in names)
    model_class = getattr(t, name if isinstance(name, str) else name[0])
    config = tiny_config(config_class, model_class)
    for part in _configs(config):
        sizes = {"vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB}
        for field, size in (sizes | dict.fromkeys(("max_position_embeddings", "n_positions"), POSITIONS)).items():
            if hasattr(part, field):
                setattr(part, field, size)
        for field, value in SPECIAL.get(part.model_type, {}).items():
            setattr(part, field, value)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > 4e8:  # the vision tower of Gemma 3n has one size
        raise NotBuilt(f"it has {count} parameters")
    torch.manual_seed(0)
    return model_class(config)


def _configs(config: t.PreTrainedConfig) -> list[t.PreTrainedConfig]:
    """A config and the configs in it."""
    parts = [value for value in vars(config).values() if isinstance(value, t.PreTrainedConfig)]
    return [config, *(inner for part in parts for inner in _configs(part))]


def _tokenizer(config: dict[str, Any], kind: str) -> tuple[Any, list[str]]:
    from axolotl.utils.chat_templates import get_chat_template

    tokens, remarks = tokenizer(), []
    asked = config.get("chat_template")
    types = {str(one.get("type")) for one in config.get("datasets") or ()}
    name = asked if asked not in (None, "tokenizer_default", "jinja") else None
    if name is None:
        # A processor renders contents that are lists of texts and images.
        other = "qwen2_vl" if config.get("processor_type") else "chatml"
        name = next((template for begin, template in STAND_INS.items() if kind.startswith(begin)), other)
        if any("chat" in one or "transform" in one for one in types):
            remarks.append(f"axolotl's chat template {name} in place of the tokenizer's")
    tokens.chat_template = get_chat_template(name, tokenizer=tokens)
    special = [*(config.get("special_tokens") or {}).values(), *(config.get("eot_tokens") or ())]
    special += re.findall(r"<[|a-z_/][^<>{}'\"\s]*>|\[/?[A-Z_]+\]", tokens.chat_template)
    if kind in PROCESSOR_MAPPING_NAMES:
        special += [*PARTS, *NAMED_PARTS.values()]
        tokens._set_model_specific_special_tokens(NAMED_PARTS)
    tokens.add_special_tokens({"additional_special_tokens": list(dict.fromkeys(map(str, special)))})
    tokens.model_max_length = POSITIONS
    return tokens, remarks


def _processor(kind: str, tokens: Any) -> Any:
    """A processor of the architecture's own class, with default parts beside the tokenizer."""
    processor_class = getattr(t, PROCESSOR_MAPPING_NAMES[kind])
    parts: dict[str, Any] = {}
    for name in processor_class.get_attributes():
        if name == "tokenizer":
            parts[name] = tokens
        else:
            auto = {
                "image_processor": "AutoImageProcessor",
                "video_processor": "AutoVideoProcessor",
                "feature_extractor": "AutoFeatureExtractor",
            }[name]
            module = getattr(t.models.auto, f"{_SNAKE[auto]}")
            names = getattr(module, _NAMES[auto])
            found = names[kind]
            found = found if isinstance(found, str) else next(one for one in _flat(found) if one)
            parts[name] = getattr(t, found)()
    processor = processor_class(**parts)
    processor.chat_template = tokens.chat_template
    return processor


_SNAKE = {
    "AutoImageProcessor": "image_processing_auto",
    "AutoVideoProcessor": "video_processing_auto",
    "AutoFeatureExtractor": "feature_extraction_auto",
}
_NAMES = {
    "AutoImageProcessor": "IMAGE_PROCESSOR_MAPPING_NAMES",
    "AutoVideoProcessor": "VIDEO_PROCESSOR_MAPPING_NAMES",
    "AutoFeatureExtractor": "FEATURE_EXTRACTOR_MAPPING_NAMES",
}


def _flat(names: Any) -> list[Any]:
    return list(names.values()) if isinstance(names, dict) else list(names)


COLOURS = ["red", "blue", "green", "white"]


def tiny_rows(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """A few rows in the columns that a dataset of a YAML reads.

    Raises:
        NotBuilt: for a type that this module does not know.
    """
    kind = str(dataset.get("type"))
    pairs = [(f"Which colour has number {n}, in a word?", f"It is {COLOURS[n % 4]}.") for n in range(8)]
    if kind.startswith("alpaca"):
        return [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    if kind == "chat_template":
        return [{dataset.get("field_messages") or "messages": _talk(dataset, *pair)} for pair in pairs]
    if kind in ("chat_template.default", "chat_template.argilla"):
        return [_preference(dataset, *pair) for pair in pairs]
    if kind == "llama3.ultra":
        return [
            {"prompt": question, "completion": answer, "label": n % 2 == 0}
            for n, (question, answer) in enumerate(pairs)
        ]
    if kind.startswith("ebft"):
        return [
            {"input": question, "output": answer, "question": f"{question} {answer} " * 4}
            for question, answer in pairs
        ]
    raise NotBuilt(f"no rows for type: {kind}")


def _talk(dataset: dict[str, Any], question: str, answer: str) -> list[dict[str, Any]]:
    """A conversation of two turns, in the keys that the dataset's options name."""
    keys = dataset.get("message_property_mappings") or {}
    role = keys.get("role") or dataset.get("message_field_role") or "role"
    content = keys.get("content") or dataset.get("message_field_content") or "content"
    turns = [("user", question), ("assistant", answer), ("user", "Are you sure of that?"), ("assistant", "Yes, I am.")]
    talk = [{role: who, content: text} for who, text in turns]
    if dataset.get("field_thinking"):
        for one in talk:
            one[dataset["field_thinking"]] = "A colour is asked for." if one[role] == "assistant" else None
    return talk


def _preference(dataset: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    asked = {"role": "user", "content": question}
    chosen, rejected = ({"role": "assistant", "content": text} for text in (answer, "I do not know."))
    if dataset["type"].endswith("argilla"):
        return {"chosen": [asked, chosen], "rejected": [asked, rejected]}
    return {dataset.get("field_messages") or "messages": [asked], "chosen": chosen, "rejected": rejected}


def write_rows(dataset: dict[str, Any], path: Path) -> None:
    """Write the rows of a dataset as JSON lines."""
    path.write_text("\n".join(map(json.dumps, tiny_rows(dataset))))


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
