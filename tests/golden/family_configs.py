"""Configs of the tiny models of `make_families`."""

import dataclasses
from typing import Any

import transformers  # pyright: ignore[reportMissingImports]

Config = dict[str, Any]
VOCAB = 96
QUANTISED_BLOCK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """A model; `down_scale` multiplies the routed experts' last matrices, so that their sum stays near 1."""

    name: str
    seed: int
    config: Config
    down_scale: float = 3.0


COMMON: Config = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "transformers_version": transformers.__version__,
    "use_cache": True,
    "vocab_size": VOCAB,
}
# As the hub's files write it: `torch_dtype`, `rope_theta` and `rope_scaling`. The other spelling is transformers 5's.
HUB = COMMON | {"torch_dtype": "float32"}
NEW = COMMON | {"dtype": "float32"}

MIXTRAL: Config = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 48,
    "intermediate_size": 20,
    "max_position_embeddings": 64,
    "model_type": "mixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.02,
}
QWEN2: Config = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_size": 48,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "max_window_layers": 2,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 20,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 28,
    "sliding_window": 8,
    "use_sliding_window": False,
}
QWEN3: Config = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 16,
    "hidden_size": 48,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 20,
    "num_attention_heads": 4,
    "num_experts_per_tok": 3,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "use_sliding_window": False,
}
DEEPSEEK: Config = {
    "attention_bias": False,
    "aux_loss_alpha": 0.001,
    "first_k_dense_replace": 1,
    "hidden_size": 48,
    "intermediate_size": 40,
    "max_position_embeddings": 2560,
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "scoring_func": "softmax",
    "seq_aux": True,
}
LATENT: Config = DEEPSEEK | {
    "kv_lora_rank": 20,
    "n_group": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 16,
    "routed_scaling_factor": 1.0,
    "topk_group": 1,
    "topk_method": "greedy",
    "v_head_dim": 10,
}
YARN: Config = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "original_max_position_embeddings": 64,
    "type": "yarn",
}


def auto_map(kind: str, suffix: str) -> Config:
    """The class names and remote code of DeepSeek's directories, which a reader has to ignore."""
    files = {"AutoConfig": f"configuration_deepseek.{kind}Config", "AutoModel": f"modeling_deepseek.{kind}Model"}
    files |= {"AutoModelForCausalLM": f"modeling_deepseek.{kind}ForCausalLM"}
    return {"architectures": [f"{kind}ForCausalLM"], "auto_map": files, "model_type": f"deepseek{suffix}"}


V2 = HUB | LATENT | auto_map("DeepseekV2", "_v2")
V3 = (
    HUB
    | LATENT
    | auto_map("DeepseekV3", "_v3")
    | {
        "ep_size": 1,
        "n_group": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "q_lora_rank": 24,
        "rms_norm_eps": 1e-3,
        "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
    }
)
QUANTISATION: Config = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [QUANTISED_BLOCK, QUANTISED_BLOCK],
}

VARIANTS = (
    Variant(
        name="mixtral_tiny",
        seed=11,
        config=HUB | MIXTRAL | {"rope_theta": 1e6, "sliding_window": None},
    ),
    Variant(
        name="mixtral_window",
        seed=12,
        config=NEW
        | MIXTRAL
        | {
            "head_dim": 16,
            "pad_token_id": None,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "router_jitter_noise": 0.0,
            "sliding_window": 8,
            "tie_word_embeddings": True,
        },
    ),
    Variant(
        name="qwen2_moe_tiny",
        seed=13,
        config=HUB
        | QWEN2
        | {"mlp_only_layers": [1], "norm_topk_prob": False, "num_hidden_layers": 3, "rope_theta": 1e6},
    ),
    Variant(
        name="qwen2_moe_sparse_step",
        seed=14,
        config=HUB
        | QWEN2
        | {
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": 4,
            "rope_scaling": {"factor": 4.0, "type": "linear"},
            "rope_theta": 500.0,
        },
        down_scale=1.5,
    ),
    Variant(
        name="qwen3_moe_tiny",
        seed=15,
        config=HUB
        | QWEN3
        | {
            "attention_bias": False,
            "max_window_layers": 2,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "num_experts": 8,
            "num_hidden_layers": 2,
            "rope_scaling": None,
            "rope_theta": 1e6,
        },
        down_scale=1.5,
    ),
    Variant(
        name="qwen3_moe_bias",
        seed=16,
        config=NEW
        | QWEN3
        | {
            "attention_bias": True,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "num_hidden_layers": 3,
            "num_local_experts": 8,  # as transformers 5 writes it, though it reads `num_experts` too
            "pad_token_id": None,
            "rope_parameters": {
                "beta_fast": 4.0,  # with these the ramp covers five of the eight frequencies
                "beta_slow": 0.25,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "rope_theta": 100.0,
                "rope_type": "yarn",
            },
        },
    ),
    Variant(
        name="deepseek_v2_lite_tiny",
        seed=17,
        config=V2 | {"rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    Variant(
        name="deepseek_v2_tiny",
        seed=18,
        config=V2
        | {
            "attention_bias": True,
            "n_group": 4,
            "q_lora_rank": 24,
            "rms_norm_eps": 1e-3,
            "routed_scaling_factor": 16.0,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
        },
        down_scale=0.3,
    ),
    Variant(name="deepseek_v3_tiny", seed=19, config=V3, down_scale=1.5),
    Variant(
        name="deepseek_v3_fp8",
        seed=20,
        config=V3
        | {
            "hidden_size": 56,
            "moe_intermediate_size": 20,
            "num_nextn_predict_layers": 1,
            "qk_rope_head_dim": 8,
            "quantization_config": QUANTISATION,
            "torch_dtype": "bfloat16",
            "v_head_dim": 12,
        },
        down_scale=1.5,
    ),
)
DEEPSEEK_V1 = Variant(
    name="deepseek_v1_tiny",
    seed=21,
    config=HUB | DEEPSEEK | auto_map("Deepseek", "") | {"moe_intermediate_size": 16, "n_routed_experts": 12},
)
