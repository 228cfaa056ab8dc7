"""Small random models for tests, with every size different so that swapped axes cannot go unnoticed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Leaf, Params, abstract_params, is_leaf

SIZES: dict[str, Any] = {
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
    "rope_theta": 100.0,
    "max_position_embeddings": 64,
    "tie_embeddings": False,
}


def tiny_config(**changes: Any) -> ModelConfig:
    """One layer, 8 experts, grouped-query attention whose width (24) is not the hidden size (23)."""
    return ModelConfig(**(SIZES | changes))


def random_params(config: ModelConfig, seed: int, dtype: Any = jnp.float32) -> Params:
    """Drawn in numpy (nothing to compile). Norm gains are not 1 and embeddings are of order 1, unlike `init_params`."""
    rng = np.random.default_rng(seed)

    def draw(leaf: Leaf) -> jax.Array:
        values = rng.standard_normal(leaf.shape)
        if leaf.init is None:
            values = 1 + 0.2 * values
        elif leaf.key == "model.embed_tokens.weight":
            pass
        else:
            values = leaf.init * values
        return jnp.asarray(values, dtype)

    return jax.tree.map(draw, abstract_params(config), is_leaf=is_leaf)


def random_tokens(config: ModelConfig, seed: int, shape: tuple[int, int]) -> jax.Array:
    """int32 token ids `[batch, seq]`."""
    return jnp.asarray(np.random.default_rng(seed).integers(0, config.vocab_size, shape), jnp.int32)
