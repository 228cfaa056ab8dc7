"""Small random models for tests, with every size different so that swapped axes cannot go unnoticed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import LatentAttention, ModelConfig, Rope, Yarn
from hetmoe.models.params import Params

SIZES: dict[str, Any] = {
    "family": "olmoe",
    "qk_norm": "width",
    "vocab_size": 40,
    "hidden_size": 23,
    "expert_intermediate_size": 21,
    "num_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 6,
    "num_experts": 8,
    "experts_per_token": 2,
    "norm_topk_prob": False,
    "clip_qkv": None,
    "rms_norm_eps": 1e-5,
    "rope": Rope(theta=100.0),
    "max_position_embeddings": 64,
    "tie_embeddings": False,
}
# Everything that a layer may have at once, though no family has it all: latent attention with biases and YaRN, shared
# experts behind a gate, sigmoid scores with a selection bias and groups, a dense layer between layers with experts.
FULL: dict[str, Any] = SIZES | {
    "family": "deepseek_v3",
    "qk_norm": None,
    "num_layers": 3,
    "num_kv_heads": 4,
    "head_dim": 11,
    "latent": LatentAttention(query_rank=17, kv_rank=13, content_dim=5, rope_dim=6, value_dim=7),
    "rope": Rope(
        theta=100.0,
        interleaved=True,
        yarn=Yarn(factor=4.0, original_positions=16, mscale=1.0, mscale_all_dim=0.7, beta_fast=2.0, beta_slow=0.5),
    ),
    "qkv_bias": True,
    "output_bias": True,
    "experts_per_token": 3,
    "router_score": "sigmoid",
    "norm_topk_prob": True,
    "selection_bias": True,
    "expert_groups": 4,
    "groups_per_token": 2,
    "group_score": "best_two",
    "routed_scaling_factor": 2.5,
    "shared_intermediate_size": 15,
    "shared_gate": True,
    "dense_layers": (1,),
    "dense_intermediate_size": 19,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """One layer, 8 experts, grouped-query attention whose width (24) is not the hidden size (23)."""
    return ModelConfig(**(SIZES | changes))


def full_config(**changes: Any) -> ModelConfig:
    """Three layers, the middle one dense, with every feature that a layer may have."""
    return ModelConfig(**(FULL | changes))


def random_params(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
    """Drawn in numpy (nothing to compile). Norm gains are not 1, biases not 0, embeddings of order 1."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Leaf) -> jax.Array:
        values = rng.standard_normal(leaf.shape)
        if leaf.init is None:
            values = 1 + 0.2 * values
        elif leaf.key == "model.embed_tokens.weight":
            pass
        elif leaf.init == 0:
            values = 0.3 * values
        else:
            values = leaf.init * values
        return jnp.asarray(values, leaf.dtype(dtype))

    return jax.tree.map(draw, abstract_params(config), is_leaf=is_leaf)


def random_tokens(config: ModelConfig, seed: int, shape: tuple[int, int]) -> jax.Array:
    """int32 token ids `[batch, seq]`."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)
