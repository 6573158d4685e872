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
    (r"hidden_size|d_model|n_embd|embed_dim|emb_dim|dim|embedding_size|backbone_hidden_size", WIDTH),
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
MLA = {"num_key_value_heads": HEADS}
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * (DEPTH // 2)},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1], "mamba_n_groups": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50},
    "codegen": {"rotary_dim": 4},
    "dbrx": {"n_heads": HEADS, "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 32}},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * (DEPTH // 2)},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2, "n_routed_experts": 4, **MLA},
    "dots1": {"moe_intermediate_size": 16, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "dots3_note_text": {"per_layer_config": {}, **MLA},
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
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4, "layer_types": ["linear_attention", "full_attention"] * (DEPTH // 2), **MLA},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * (DEPTH // 2), "num_dense_layers": 1},
    "longcat_flash": {"num_hidden_layers": 2 * DEPTH, "num_layers": DEPTH, "head_dim": 4, "expert_ffn_hidden_size": 16},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
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
    "xlstm": {"qk_dim_factor": 1.0},
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
        return {n: p for n, p in config_class.sub_configs.items() if dataclasses.is_dataclass(p) and p is not t.AutoConfig}
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


def mapping(name: str) -> dict[str, tuple[type, type]]:
    """The (config class, model class) of a mapping of transformers, by `ModelClass` or, where several configs share a
    class, `ModelClass[ConfigClass]`."""
    found = getattr(modeling_auto, name)
    pairs = []
    for config in found:
        models = found[config]
        pairs += [(config, model) for model in (models if isinstance(models, (list, tuple)) else [models])]
    count: dict[str, int] = {}
    for _, model in pairs:
        count[model.__name__] = count.get(model.__name__, 0) + 1
    return {
        model.__name__ if count[model.__name__] == 1 else f"{model.__name__}[{config.__name__}]": (config, model)
        for config, model in pairs
    }


def tiny(config_class: type, model_class: type) -> Any:
    torch.manual_seed(0)
    return model_class(tiny_config(config_class, model_class)).eval()
