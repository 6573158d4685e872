"""Tiny random models of every architecture in transformers' mappings.

A config class is made with small values for the fields whose names say a size; the same goes for the configs that it
holds. What no name tells is in `SPECIAL`, by `model_type`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import torch
import transformers as t
from transformers.models.auto import modeling_auto


VOCAB, WIDTH, HEADS, DEPTH = 97, 32, 4, 4
PAD, BOS, EOS = 0, 1, 2

# (regex of a field's name, value): the first that matches counts.
SIZES: list[tuple[str, Any]] = [
    (r"pad_token_id", PAD),
    (r"bos_token_id|decoder_start_token_id", BOS),
    (r"eos_token_id", EOS),
    (r".*vocab_size.*", VOCAB),
    (r"type_vocab_size", 2),
    (r"num_hidden_layers|n_layers?|num_layers|encoder_layers|decoder_layers|depth|num_decoder_layers", DEPTH),
    (r"num_attention_heads|n_heads?|num_heads|encoder_attention_heads|decoder_attention_heads", HEADS),
    (r"num_key_value_heads|num_kv_heads", 2),
    (
        r"hidden_size|hidden_size_global|d_model|n_embd|embed_dim|emb_dim|dim|embedding_size|backbone_hidden_size",
        WIDTH,
    ),
    (r"out_hidden_size|text_hidden_size|projection_dim|codebook_dim|output_dim|lm_hidden_size", WIDTH),
    (r"head_dim|d_kv|dim_head|kv_channels|attention_head_size", WIDTH // HEADS),
    (r"moe_intermediate_size|expert_ffn_hidden_size", 16),
    (r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dim_ff|dff|d_inner)", 2 * WIDTH),
    (r"n_routed_experts|num_experts|num_local_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|top_k_experts", 2),
    (r"n_group|topk_group", 1),
    (r"q_lora_rank|kv_lora_rank", 8),
    (r"qk_rope_head_dim", 4),
    (r"qk_nope_head_dim|v_head_dim", 8),
    (r"index_head_dim", 8),
    (r"index_n_heads", 2),
    (r"index_topk", 4),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_source_positions|max_target_positions", 64),
    (r"linear_(key|value)_head_dim", 8),
    (r"linear_num_(key|value)_heads", 4),
    (r"mamba_d_state|state_size|ssm_state_size", 4),
    (r"image_size", 16),
    (r"patch_size", 8),
]
DROPOUT = re.compile(r".*(dropout|layerdrop|_pdrop|dropout_p|dropout_prob)(_prob|_rate)?$")
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
MLA = {"num_key_value_heads": HEADS}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * (DEPTH // 2)},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1], "mamba_n_groups": 1},
    "blt": {"use_cache": False, "encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 4},
    "dbrx": {
        "n_heads": HEADS,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2),
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "esmc": {"num_key_value_heads": HEADS},
    "esm": {"vocab_size": VOCAB, "pad_token_id": PAD, "mask_token_id": 3, "position_embedding_type": "absolute"},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4, "input_size": 16},
    "longformer": {"attention_window": 4},
    "lilt": {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 64, "hidden_size": 48, "num_attention_heads": 4},
    "t5": {"decoder_start_token_id": PAD},
    "tapas": {"type_vocab_sizes": [3, 256, 256, 2, 256, 256, 10]},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_routed_experts": 4, **MLA},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "num_hidden_layers": 8},
    "dots1": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "dots3_note_text": {"head_dim": 12, "per_layer_config": {}, **MLA},
    "gemma3n_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "laurel_rank": 4},
    "gemma4_unified_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "layer_types": ["mamba", "attention"] * (DEPTH // 2),
    },
    "hy_v4_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "linear_head_dim": 8,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * (DEPTH // 2),
        **MLA,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (DEPTH // 2), "num_dense_layers": 1},
    "longcat_flash": {
        "num_hidden_layers": 2 * DEPTH,
        "num_layers": DEPTH,
        "head_dim": 4,
        "expert_ffn_hidden_size": 16,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
    "qwen2_vl_text": MROPE,
    "qwen2_5_vl_text": MROPE,
    "qwen2_5_omni_text": MROPE,
    "paddleocr_vl_text": MROPE,
    "glm46v_text": MROPE,
    "glm_ocr_text": MROPE,
    "glm4v_text": MROPE,
    "qwen3_vl_text": MROPE,
    "qwen3_vl_moe_text": MROPE,
    "qwen3_omni_moe_text": MROPE,
    "cosmos3_edge_text": MROPE,
    "glm4v_moe_text": {"partial_rotary_factor": 1.0, **MROPE},
    "glm5_next_text": {"index_topk": 16, "qk_rope_head_dim": 0, "linear_head_dim": 8, "linear_num_heads": 4},
    "molmo2_adapter": {"vision_feature_layers": [1, 0]},
    "mpt": {"d_model": WIDTH, "n_heads": HEADS, "attn_config": {"attn_pdrop": 0}},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "num_buckets": 2,
        "local_attn_chunk_length": 2,
        "lsh_attn_chunk_length": 2,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 8,
    },
    "xlstm": {"hidden_size": 64, "num_heads": 1, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_hidden_layers": 6},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * (DEPTH // 2), "mamba_ngroups": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}


def tiny_settings(config_class: type) -> dict[str, Any]:
    """Small values for the fields of a config class, with those of the configs in it."""
    settings: dict[str, Any] = {}
    fields = {field.name: field.default for field in dataclasses.fields(config_class)}
    for name, value in fields.items():
        if isinstance(value, bool):
            continue
        if DROPOUT.match(name) and isinstance(value, (int, float)):
            settings[name] = 0.0
            continue
        for pattern, small in SIZES:
            if re.fullmatch(pattern, name):
                if value is not None or name in ("num_key_value_heads", "head_dim", "pad_token_id"):
                    settings[name] = small
                break
    if "kv_lora_rank" in fields and "num_key_value_heads" in settings:
        settings |= MLA
    for name, part in _parts(config_class).items():
        settings[name] = tiny_settings(part) | {"model_type": part.model_type}
    return settings | SPECIAL.get(config_class.model_type, {})


def _parts(config_class: type) -> dict[str, type]:
    """The classes of the configs in a config, by field."""
    names = list(config_class.sub_configs or {})
    if not names:
        return {}
    try:
        default = config_class()
    except Exception:
        return {
            n: p for n, p in config_class.sub_configs.items() if dataclasses.is_dataclass(p) and p is not t.AutoConfig
        }
    parts = {name: type(getattr(default, name, None)) for name in names}
    return {name: part for name, part in parts.items() if issubclass(part, t.PreTrainedConfig)}


def tiny_config(config_class: type, model_class: type) -> Any:
    """A small config for a model class: the text part, where the class is that of the text model."""
    config = config_class(**tiny_settings(config_class))
    if config.model_type.startswith("musicgen"):
        return config.decoder
    if model_class.config_class is not type(config) and issubclass(
        model_class.config_class, type(config.get_text_config())
    ):
        config = config.get_text_config()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if hasattr(config, name) and not isinstance(getattr(config, name), int):
            setattr(config, name, {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}[name])
    return config


KINDS = {"causal": "CAUSAL_LM", "classification": "SEQUENCE_CLASSIFICATION", "vision": "IMAGE_TEXT_TO_TEXT"}


def architectures() -> list[tuple[str, str, str]]:
    """(kind, model_type, model class) of every entry of the three mappings, without importing a model."""
    found = []
    for kind, name in KINDS.items():
        for model_type, entry in getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES").items():
            for model in entry if isinstance(entry, (list, tuple)) else [entry]:
                found.append((kind, model_type, model))
    return found


def classes(model_type: str, model: str) -> tuple[type, type]:
    """The config class and the model class of an entry."""
    return t.models.auto.configuration_auto.CONFIG_MAPPING[model_type], getattr(t, model)


def tiny(config_class: type, model_class: type) -> Any:
    """The tiny model in evaluation mode, with the same weights at every call.

    Raises:
        ValueError: when it is not tiny, because its sizes have names that this module does not know.
    """
    with torch.device("meta"):
        count = sum(p.numel() for p in model_class(tiny_config(config_class, model_class)).parameters())
    if count > 2e7:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(0)
    return model_class(tiny_config(config_class, model_class)).eval()
