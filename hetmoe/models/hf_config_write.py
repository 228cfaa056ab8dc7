"""Writing a `config.json` in the hub's spelling."""

import dataclasses
from typing import Any

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import ARCHITECTURES, config_from_hf
from hetmoe.models.hf_rope import rope_to_hf


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """The `config.json` content that `config_from_hf` reads back to an equal config, in the hub's spelling.

    Raises:
        InputError: if the family's `config.json` has no way to say what `config` says.
    """
    result = _to_hf(config)
    try:
        again = config_from_hf(result)
    except InputError as error:
        raise InputError(f"a config.json of model_type {config.family!r} cannot say this config: {error}") from None
    for field in dataclasses.fields(config):
        if getattr(again, field.name) != getattr(config, field.name):
            raise InputError(
                f"a config.json of model_type {config.family!r} cannot say {field.name}={getattr(config, field.name)!r}"
            )
    return result


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    family = config.family
    result: dict[str, Any] = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_experts_per_tok": config.experts_per_token,
        "rms_norm_eps": config.rms_norm_eps,
        **rope_to_hf(config.rope),
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
    }
    if config.latent is None:
        result["head_dim"] = config.head_dim
    if family != "mixtral":
        result["norm_topk_prob"] = config.norm_topk_prob
    if family == "olmoe":
        return result | {
            "attention_bias": False,
            "clip_qkv": config.clip_qkv,
            "intermediate_size": config.expert_intermediate_size,
            "num_experts": config.num_experts,
        }
    if family == "mixtral":
        return result | {
            "intermediate_size": config.expert_intermediate_size,
            "num_local_experts": config.num_experts,
            "sliding_window": config.sliding_window,
        }
    result |= {
        "intermediate_size": config.dense_intermediate_size or config.expert_intermediate_size,
        "moe_intermediate_size": config.expert_intermediate_size,
    }
    if family in ("qwen2_moe", "qwen3_moe"):
        return result | _qwen_to_hf(config)
    return result | _deepseek_to_hf(config)


def _qwen_to_hf(config: ModelConfig) -> dict[str, Any]:
    result: dict[str, Any] = {
        "num_experts": config.num_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(config.dense_layers),
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
    }
    if config.family == "qwen3_moe":
        return result | {"attention_bias": config.qkv_bias}
    return result | {
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": config.shared_intermediate_size,
    }


def _deepseek_to_hf(config: ModelConfig) -> dict[str, Any]:
    shared = config.shared_intermediate_size
    first = next(i for i in range(config.num_layers) if i in config.moe_layers)
    steps = {b - a for a, b in zip(config.moe_layers, config.moe_layers[1:], strict=False)}
    result: dict[str, Any] = {
        "attention_bias": config.qkv_bias,
        "first_k_dense_replace": first,
        "moe_layer_freq": steps.pop() if steps else max(first, 1),
        "n_routed_experts": config.num_experts,
        "n_shared_experts": None if shared is None else max(shared // config.expert_intermediate_size, 1),
    }
    if config.family == "deepseek" or config.latent is None:
        return result | {"scoring_func": "softmax"}
    latent = config.latent
    result |= {
        "q_lora_rank": latent.query_rank,
        "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.content_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "n_group": config.expert_groups or 1,
        "topk_group": config.groups_per_token or 1,
        "routed_scaling_factor": config.routed_scaling_factor,
    }
    if config.family == "deepseek_v2":
        method = "greedy" if config.expert_groups is None else "group_limited_greedy"
        return result | {"scoring_func": "softmax", "topk_method": method}
    return result | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": config.rope.interleaved,
    }
