"""A tiny random model of every family of transformers that generates text, made from its configuration class alone.

A configuration is what its class gives by default, with every size that is named in SIZES made small; OVERRIDES says
what a family needs besides.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

VOCABULARY, PAD, END, START = 128, 0, 1, 2

# Decoders that number positions in three dimensions, here without any image.
MULTIMODAL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

_WIDTH, _INNER, _HEADS, _HEAD, _EXPERTS, _LAYERS = 32, 32, 4, 8, 4, 2

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": START,
    "decoder_start_token_id": START,
    "sep_token_id": END,
    "max_position_embeddings": 256,
    "n_positions": 256,
    "max_source_positions": 256,
    "max_target_positions": 256,
    "sliding_window": 4,
    "attention_window": 4,
    **dict.fromkeys(
        (
            "hidden_size",
            "d_model",
            "n_embd",
            "dim",
            "embedding_size",
            "emb_dim",
            "dim_model",
            "model_dim",
            "word_embed_proj_dim",
            "lru_width",
            "attention_hidden_size",
        ),
        _WIDTH,
    ),
    **dict.fromkeys(
        (
            "intermediate_size",
            "d_ff",
            "ffn_dim",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "dim_ff",
            "n_inner",
            "ffn_hidden_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "d_inner",
            "dff",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "expert_ffn_hidden_size",
            "intermediate_size_mlp",
            "feed_forward_size",
        ),
        _INNER,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "encoder_layers",
            "decoder_layers",
            "num_encoder_layers",
            "num_decoder_layers",
        ),
        _LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
            "num_encoder_attention_heads",
            "num_decoder_attention_heads",
            "linear_num_value_heads",
        ),
        _HEADS,
    ),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "linear_num_key_heads", "multi_query_group_num"), 2),
    **dict.fromkeys(
        (
            "head_dim",
            "d_kv",
            "dim_head",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "v_head_dim",
            "qk_rope_head_dim",
            "qk_nope_head_dim",
            "global_head_dim",
            "kv_channels",
        ),
        _HEAD,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    "rotary_dim": _HEAD,
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    "embed_dim": _WIDTH,
    "out_hidden_size": _WIDTH,
    "depth": _LAYERS,
    "image_size": 28,
    "patch_size": 14,
    "encoder_hidden_size": _WIDTH,
    "output_dim": _WIDTH,
    "projection_dim": _WIDTH,
    "adapter_hidden_size": _WIDTH,
}

# What the layers of a cache keep, by the names of their classes.
KINDS = {
    "DynamicLayer": "attention",
    "DynamicSlidingWindowLayer": "sliding-window attention",
    "DynamicIndexedLayer": "indexed attention",
    "LinearAttentionLayer": "state space",
    "LinearAttentionAndFullAttentionLayer": "state space with attention",
    "LinearAttentionAndSlidingWindowAttentionLayer": "state space with sliding-window attention",
}

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MAMBA2 = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_ssm": 64,
    "num_heads": 8,
    "head_dim": 8,
    "n_groups": 1,
}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY}
_TINY_BERT = {"model_type": "bert"}

OVERRIDES: dict[str, dict[str, Any]] = {
    # Encoders with a causal head, which ask to be told that they decode.
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        {"is_decoder": True},
    ),
    # Hybrids with attention in one layer of several.
    **dict.fromkeys(("olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), {"num_hidden_layers": 4}),
    "qwen4_exp_text": {
        "num_hidden_layers": 4,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": _HEAD,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "bailing_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": _HEAD,
        "linear_num_heads": _HEADS,
    },
    "bamba": {**_MAMBA2, "attn_layer_indices": [1]},
    "granitemoehybrid": {**_MAMBA2, "layer_types": ["linear_attention", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "kimi_linear": {
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
        "linear_head_dim": _HEAD,
        "linear_num_heads": _HEADS,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "adapter_rank": 8,
    },
    **dict.fromkeys(("falcon_h1", "mamba2"), _MAMBA2),
    # Whose defaults do not fit small sizes.
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": _INNER, "moe_num_experts": _EXPERTS, "moe_top_k": 2},
    },
    **dict.fromkeys(("dots3_note", "dots3_note_text"), {"per_layer_config": {}, "num_key_value_heads": _HEADS}),
    "encoder-decoder": {
        "encoder": _TINY_BERT,
        "decoder": {**_TINY_BERT, "is_decoder": True, "add_cross_attention": True},
    },
    "gemma3n_text": {
        **_PER_LAYER,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "intermediate_size": [_INNER] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": _PER_LAYER,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}),
    "nemo_speechlm": {"head_config": {"audio_hidden_size": _WIDTH}},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "attention_head_size": _HEAD,
        "local_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "roc_bert": {"shape_vocab_size": VOCABULARY, "pronunciation_vocab_size": VOCABULARY, "is_decoder": True},
    "xmod": {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
}


def families() -> list[str]:
    """The model types that decode text by a causal head or behind an encoder, and the multi-modal ones, sorted."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, *MULTIMODAL})


def tiny_config(family: str, **values: Any) -> PretrainedConfig:
    """The small configuration of a family, with ``values`` in place of its own."""
    return _shrunk(CONFIG_MAPPING[family], {**OVERRIDES.get(family, {}), **values})


def tiny_model(family: str, **values: Any) -> Any:
    """A model in evaluation mode with random weights, whose log-probabilities are far apart.

    Rounding then changes no order; at the usual start all prompts look alike.
    """
    config = tiny_config(family, **values)
    model_class = _class_of(config)
    model = model_class(_text_part(config, model_class)).eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[-1] ** 0.5)
        head = model.get_output_embeddings()
        if head is not None:
            head.weight.mul_(3)
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = START
    return model


def _text_part(config: PretrainedConfig, model_class: Any) -> PretrainedConfig:
    """The part of a multi-modal configuration that a text decoder is made from, as AutoModelForCausalLM takes it."""
    if getattr(model_class, "config_class", None) is config.sub_configs.get("text_config", ()):
        return config.get_text_config()
    return config


def _class_of(config: PretrainedConfig) -> Any:
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        for mapping in (MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
            if type(config) in mapping:
                return mapping[type(config)]
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def _shrunk(config_class: Any, own: dict[str, Any]) -> PretrainedConfig:
    names = set(inspect.signature(config_class.__init__).parameters)
    if not dataclasses.is_dataclass(config_class):
        names |= set(vars(config_class()))
    values = {name: value for name, value in SIZES.items() if name in names}
    for name, part in getattr(config_class, "sub_configs", {}).items():
        given = own.get(name) or {}
        if "model_type" in given:
            part = CONFIG_MAPPING[given["model_type"]]
        elif not getattr(part, "model_type", None):  # any configuration will do: the default's
            part = type(getattr(config_class(), name))
        if getattr(part, "model_type", None):
            values[name] = _shrunk(part, {**OVERRIDES.get(part.model_type, {}), **given})
    if "kv_lora_rank" in names:  # latent attention has keys and values of its own for every head
        values["num_key_value_heads"] = _HEADS
    values |= {
        name: value
        for name, value in own.items()
        if name in names and not isinstance(values.get(name), PretrainedConfig)
    }
    return config_class(**values)


def forward_arguments(model: Any) -> set[str]:
    """The names of the inputs that a model takes."""
    return set(inspect.signature(model.forward).parameters)


def kind(model: Any) -> str:
    """What a decoder keeps of what it has read, in words, told by the layers of the cache that it returns."""
    ids = torch.full((1, 3), VOCABULARY - 1)
    encodes = model.config.is_encoder_decoder
    inputs = {"decoder_input_ids": ids} if encodes else {}
    try:
        output = model(input_ids=ids, **inputs, use_cache=True, return_dict=True)
    except Exception:  # of whatever kind a family's own code raises, if it asks for more than tokens
        return ""
    names = [name for name in ("past_key_values", "cache_params", "state", "mems") if output.get(name) is not None]
    cache = output.get(names[0]) if names else None
    layers = getattr(getattr(cache, "self_attention_cache", cache), "layers", None)
    kinds = [] if layers is None else [KINDS.get(type(layer).__name__, type(layer).__name__) for layer in layers]
    kept = " and ".join(dict.fromkeys(kinds)) or (f"{names[0]} of its own" if names else "no cache")
    return f"encoder-decoder: {kept}" if encodes else kept
