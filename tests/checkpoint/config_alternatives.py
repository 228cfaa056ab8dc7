"""For every field that matters a different valid value, or one that must be refused, family by family.

What is in none of these tables, nor known to `test_config_mutations` as harmless, fails a test: a field of the golden
configs cannot be forgotten.
"""

from typing import Any

REFUSED = object()  # marks values that the reader must not take

COMMON: dict[str, list[tuple[Any, Any]]] = {
    # field: [(value, what changes in the config, or REFUSED)]
    "vocab_size": [(200, "vocab_size"), (0, REFUSED), (True, REFUSED), (96.0, REFUSED)],
    "num_hidden_layers": [(5, "num_layers"), (0, REFUSED)],
    "max_position_embeddings": [(777, "max_position_embeddings")],
    "tie_word_embeddings": [(True, "tie_embeddings"), (False, "tie_embeddings"), (1, REFUSED)],
    "rms_norm_eps": [(0.5, "rms_norm_eps"), (1, "rms_norm_eps"), (0.0, REFUSED), ("1e-6", REFUSED), (True, REFUSED)],
    "num_experts_per_tok": [(5, "experts_per_token"), (17, REFUSED)],
    "architectures": [(["LlamaForCausalLM"], REFUSED), ([], REFUSED), ("LlamaForCausalLM", REFUSED)],
    "hidden_act": [("gelu", REFUSED), ("relu", REFUSED), ("swish", REFUSED)],
    "model_type": [("llama", REFUSED), ("mistral", REFUSED), (3, REFUSED), (None, REFUSED)],
    "mlp_bias": [(True, REFUSED)],
    "partial_rotary_factor": [(0.5, REFUSED)],
    "rope_theta": [(1234.5, "rope"), (0, REFUSED), (-1.0, REFUSED), ("1e4", REFUSED)],
    "rope_scaling": [
        ({"type": "linear", "factor": 3.0}, "rope"),
        ({"rope_type": "linear", "factor": 5}, "rope"),
        ({"type": "dynamic", "factor": 2.0}, REFUSED),
        ({"type": "llama3", "factor": 2.0}, REFUSED),
        ({"type": "linear"}, REFUSED),
        ({"type": "linear", "rope_type": "yarn", "factor": 2.0}, REFUSED),
        ({"type": "linear", "factor": 2.0, "new_option": 1}, REFUSED),
        ([], REFUSED),
    ],
}
PLAIN_ATTENTION = {
    "hidden_size": [(96, "hidden_size"), (-48, REFUSED)],
    "num_attention_heads": [(2, "num_heads"), (3, REFUSED)],
    "num_key_value_heads": [(1, "num_kv_heads"), (3, REFUSED)],
    "head_dim": [(6, "head_dim"), (7, REFUSED), (0, REFUSED)],
}
WIDE_EXPERTS = {"intermediate_size": [(99, "expert_intermediate_size")]}
OLMOE = COMMON | PLAIN_ATTENTION | WIDE_EXPERTS | {
    "attention_bias": [(True, REFUSED)],
    "clip_qkv": [(2.5, "clip_qkv"), (8, "clip_qkv"), (0.0, REFUSED), ("8", REFUSED)],
    "num_experts": [(9, "num_experts"), (1, REFUSED)],
    "norm_topk_prob": [(True, "norm_topk_prob"), (False, "norm_topk_prob"), (0, REFUSED)],
}  # fmt: skip
MIXTRAL = COMMON | PLAIN_ATTENTION | WIDE_EXPERTS | {
    "num_local_experts": [(9, "num_experts"), (1, REFUSED)],
    "sliding_window": [(5, "sliding_window"), (0, REFUSED), (2.0, REFUSED)],
}  # fmt: skip
SPARSE = {"norm_topk_prob": OLMOE["norm_topk_prob"], "moe_intermediate_size": [(99, "expert_intermediate_size")]}
QWEN = COMMON | PLAIN_ATTENTION | SPARSE | {
    "num_experts": [(9, "num_experts"), (2, REFUSED)],
    "decoder_sparse_step": [(3, "dense_layers"), (0, REFUSED), (99, REFUSED)],
    "mlp_only_layers": [
        ([1], "dense_layers"), ([2, 0], "dense_layers"), ([77], REFUSED), ([True], REFUSED), ("0", REFUSED),
    ],
}  # fmt: skip
QWEN2 = QWEN | {
    "shared_expert_intermediate_size": [(99, "shared_intermediate_size"), (0, REFUSED)],
    "use_sliding_window": [(True, REFUSED)],
    "qkv_bias": [(False, "qkv_bias"), (0, REFUSED)],
    "layer_types": [(["sliding_attention"], REFUSED), ("full_attention", REFUSED)],
}
QWEN3 = QWEN | {
    "attention_bias": [(True, "qkv_bias"), (False, "output_bias"), (None, "qkv_bias")],
    "use_sliding_window": [(True, REFUSED)],  # without sliding_window
    "decoder_sparse_step": [(2, "dense_layers"), (0, REFUSED)],
    "mlp_only_layers": [([1], "dense_layers"), ([77], REFUSED)],
}
DEEPSEEK = COMMON | SPARSE | {
    "hidden_size": [(96, "hidden_size"), (-48, REFUSED)],
    "num_attention_heads": [(3, REFUSED)],
    "num_key_value_heads": [(3, REFUSED)],
    "attention_bias": [(True, "output_bias"), (False, "output_bias"), (1, REFUSED)],
    "first_k_dense_replace": [(2, "dense_layers"), (0, "dense_layers"), (-1, REFUSED), (99, REFUSED)],
    "moe_layer_freq": [(2, "dense_layers"), (0, REFUSED)],
    "n_routed_experts": [(32, "num_experts"), (1, REFUSED)],
    "n_shared_experts": [(5, "shared_intermediate_size"), (None, "shared_intermediate_size"), (0, REFUSED)],
    "intermediate_size": [(99, "dense_intermediate_size"), (None, REFUSED)],
    "scoring_func": [("tanh", REFUSED), (1, REFUSED)],
}  # fmt: skip
DEEPSEEK_V1 = DEEPSEEK | {
    "head_dim": PLAIN_ATTENTION["head_dim"],
    "scoring_func": [("sigmoid", REFUSED)],
    "num_key_value_heads": PLAIN_ATTENTION["num_key_value_heads"],
}
LATENT = DEEPSEEK | {
    "kv_lora_rank": [(99, "latent"), (0, REFUSED), (None, REFUSED)],
    "q_lora_rank": [(99, "latent"), (0, REFUSED)],
    "qk_nope_head_dim": [(99, "head_dim"), (0, REFUSED)],
    "qk_rope_head_dim": [(4, "head_dim"), (5, REFUSED)],
    "v_head_dim": [(99, "latent"), (0, REFUSED)],
    "routed_scaling_factor": [(3.5, "routed_scaling_factor"), (0.0, REFUSED), (-1.0, REFUSED)],
    "rope_scaling": [*COMMON["rope_scaling"], ({"type": "yarn", "factor": 7.0}, "rope")],
}
DEEPSEEK_V2 = LATENT | {
    "norm_topk_prob": [(True, REFUSED)],
    "scoring_func": [("sigmoid", REFUSED)],
    "topk_method": [("noaux_tc", REFUSED), ("new", REFUSED)],
}
DEEPSEEK_V3 = LATENT | {
    "scoring_func": [("softmax", REFUSED)],
    "topk_method": [("greedy", REFUSED), ("group_limited_greedy", REFUSED)],
    "rope_interleave": [(False, "rope")],
}
GROUPED = {"n_group": [(2, "expert_groups"), (5, REFUSED)], "topk_group": [(3, "groups_per_token"), (5, REFUSED)]}

FAMILIES = {
    "olmoe": OLMOE,
    "mixtral": MIXTRAL,
    "qwen2_moe": QWEN2,
    "qwen3_moe": QWEN3,
    "deepseek": DEEPSEEK_V1,
    "deepseek_v2": DEEPSEEK_V2,
    "deepseek_v3": DEEPSEEK_V3,
}
# Fields that do not change the logits, and why they do not where that is not obvious.
HARMLESS = {
    "attention_dropout", "auto_map", "aux_loss_alpha", "bos_token_id", "dtype", "eos_token_id",
    "ep_size", "initializer_range", "output_router_logits", "pad_token_id", "pretraining_tp", "router_aux_loss_coef",
    "router_jitter_noise", "seq_aux", "torch_dtype", "transformers_version", "use_cache",
    "max_window_layers",  # only Qwen2-MoE's code reads it, and that with use_sliding_window, which is refused
    "num_nextn_predict_layers", "quantization_config",  # storage
}  # fmt: skip


def alternatives(config: dict[str, Any]) -> dict[str, list[tuple[Any, Any]]]:
    """The table for a config; fields that only matter together are left to it."""
    table = dict(FAMILIES[config["model_type"]])
    if config["model_type"] == "deepseek_v3" or config.get("topk_method") == "group_limited_greedy":
        table |= GROUPED
    if "num_local_experts" in config and config["model_type"] == "qwen3_moe":  # as transformers 5 spells it
        table["num_local_experts"] = table.pop("num_experts")
    if "rope_parameters" in config:
        theta, scaling = table.pop("rope_theta"), table.pop("rope_scaling")
        base = {"rope_theta": 50.0}
        table["rope_parameters"] = [(base | {"rope_theta": v}, r) for v, r in theta]
        table["rope_parameters"] += [(base | v, r) for v, r in scaling if isinstance(v, dict)]
    return table
