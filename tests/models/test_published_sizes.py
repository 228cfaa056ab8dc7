"""The published models' shapes give the parameter counts that their cards and papers state.

Only the sizes of each `config.json` are written down, here and in `experiments/architectures`; no checkpoint is needed.
"""

import json
import math
from typing import Any

import jax
import pytest

from hetmoe.commands.info import active_parameters, parameters_by_module
from hetmoe.models.abstract import abstract_params, is_leaf
from hetmoe.models.hf_config import config_from_hf
from tests.checkpoint.golden_files import ROOT

COMMON = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
YARN = {
    "type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip


def sizes(
    model_type: str, vocab: int, hidden: int, layers: int, heads: int, kv_heads: int, positions: int, top: int,
    **more: Any,
) -> dict[str, Any]:  # fmt: skip
    return COMMON | more | {
        "model_type": model_type, "vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": positions,
        "num_experts_per_tok": top,
    }  # fmt: skip


def deepseek(first: int, shared: int, routed: int, inner: int, dense: int, **more: Any) -> dict[str, Any]:
    return more | {
        "first_k_dense_replace": first, "n_shared_experts": shared, "n_routed_experts": routed, "moe_layer_freq": 1,
        "moe_intermediate_size": inner, "intermediate_size": dense, "ep_size": 1, "seq_aux": True,
    }  # fmt: skip


def latent(rank: int | None, **more: Any) -> dict[str, Any]:
    return more | {
        "q_lora_rank": rank, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "rope_scaling": YARN,
    }  # fmt: skip


def architecture(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "experiments" / "architectures" / f"{name}.json").read_text())


# Config, all parameters and those active per token in billions as published; active counts leave out the embedding, or
# not, as their authors do.
PUBLISHED: dict[str, tuple[dict[str, Any], float, tuple[float, float]]] = {
    "OLMoE-1B-7B": (architecture("olmoe_7b"), 6.92, (1.1, 1.3)),
    "DeepSeekMoE-16B": (architecture("deepseek_moe_16b"), 16.4, (2.5, 2.9)),
    "Mixtral-8x7B": (
        sizes("mixtral", 32000, 4096, 32, 32, 8, 32768, 2, num_local_experts=8, intermediate_size=14336,
              sliding_window=None),
        46.7, (12.6, 12.9),
    ),
    "Mixtral-8x22B": (
        sizes("mixtral", 32768, 6144, 56, 48, 8, 65536, 2, num_local_experts=8, intermediate_size=16384,
              sliding_window=None),
        141, (38.8, 39.2),
    ),
    "Qwen1.5-MoE-A2.7B": (
        sizes("qwen2_moe", 151936, 2048, 24, 16, 16, 8192, 4, num_experts=60, moe_intermediate_size=1408,
              shared_expert_intermediate_size=5632, intermediate_size=5632, decoder_sparse_step=1,
              norm_topk_prob=False, use_sliding_window=False, sliding_window=32768, max_window_layers=21),
        14.3, (2.3, 2.7),
    ),
    "Qwen2-57B-A14B": (
        sizes("qwen2_moe", 151936, 3584, 28, 28, 4, 131072, 8, num_experts=64, moe_intermediate_size=2560,
              shared_expert_intermediate_size=20480, intermediate_size=18944, decoder_sparse_step=1,
              norm_topk_prob=False, use_sliding_window=False, sliding_window=65536, max_window_layers=28),
        57.4, (13.6, 14.3),
    ),
    "Qwen3-30B-A3B": (
        sizes("qwen3_moe", 151936, 2048, 48, 32, 4, 40960, 8, head_dim=128, num_experts=128,
              moe_intermediate_size=768, intermediate_size=6144, decoder_sparse_step=1, mlp_only_layers=[],
              norm_topk_prob=True, use_sliding_window=False, sliding_window=None, attention_bias=False),
        30.5, (3.0, 3.4),
    ),
    "Qwen3-235B-A22B": (
        sizes("qwen3_moe", 151936, 4096, 94, 64, 4, 40960, 8, head_dim=128, num_experts=128,
              moe_intermediate_size=1536, intermediate_size=12288, decoder_sparse_step=1, mlp_only_layers=[],
              norm_topk_prob=True, use_sliding_window=False, sliding_window=None, attention_bias=False),
        235, (21, 22.5),
    ),
    "DeepSeek-V2-Lite": (
        sizes("deepseek_v2", 102400, 2048, 27, 16, 16, 163840, 6, norm_topk_prob=False, topk_method="greedy",
              scoring_func="softmax", n_group=1, topk_group=1, routed_scaling_factor=1.0,
              **deepseek(1, 2, 64, 1408, 10944), **latent(None)),
        15.7, (2.3, 2.7),
    ),
    "DeepSeek-V2": (
        sizes("deepseek_v2", 102400, 5120, 60, 128, 128, 163840, 6, norm_topk_prob=False, n_group=8, topk_group=3,
              topk_method="group_limited_greedy", scoring_func="softmax", routed_scaling_factor=16.0,
              **deepseek(1, 2, 160, 1536, 12288), **latent(1536)),
        236, (20.5, 21.5),
    ),
    "DeepSeek-V3": (architecture("deepseek_v3_671b"), 671, (36.5, 37.6)),
    "Kimi-K2": (architecture("moe_1t"), 1.03e3, (31.5, 32.6)),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    content, billions, active = PUBLISHED[name]
    config = config_from_hf(content)
    counts = parameters_by_module(config)
    total = sum(counts.values())
    assert total == sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config), is_leaf=is_leaf))
    assert f"{total / 1e9:.3g}" == f"{billions:.3g}"
    assert active[0] <= active_parameters(config, counts) / 1e9 <= active[1]
