"""Crossbars for the small models: programmed weights and ranges made in numpy, without the package's own code."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedMatrix, ProgrammedWeights
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import DenseLayer, Layer, Params
from tests.numpy_reference import row_blocks

TILE_ROWS = 12  # two row-blocks for each of the sizes 23, 24 and 21
EXPERT_MATRICES = ("gate", "up", "down")
ATTENTION_MATRICES = ("q", "k", "v", "o", "q_a", "q_b", "kv_a", "kv_b")
# The input that each matrix reads.
SITE_OF = {
    "gate": "experts_in", "up": "experts_in", "down": "experts_mid",
    "q": "attention_in", "k": "attention_in", "v": "attention_in", "o": "attention_out",
    "q_a": "attention_in", "q_b": "query_latent", "kv_a": "attention_in", "kv_b": "kv_latent",
    "shared_gate": "shared_in", "shared_up": "shared_in", "shared_down": "shared_mid",
    "ffn_gate": "ffn_in", "ffn_up": "ffn_in", "ffn_down": "ffn_mid",
}  # fmt: skip


def weight_maxima(w: np.ndarray, per_column: bool, tile_rows: int) -> np.ndarray:
    """`[..., tiles, 1 or columns]` of `[..., K, N]`."""
    axes = (-2,) if per_column else (-2, -1)
    blocks = row_blocks(w.shape[-2], tile_rows)
    return np.concatenate([np.max(np.abs(w[..., block, :]), axis=axes, keepdims=True) for block in blocks], axis=-2)


def matrices_of(layer: Layer | DenseLayer | None) -> dict[str, Any]:
    """Every matrix that may be on crossbars, of the layers of one kind."""
    if layer is None:
        return {}
    found = {name: getattr(layer.attention, name) for name in ATTENTION_MATRICES}
    if isinstance(layer, DenseLayer):
        found |= {f"ffn_{name}": getattr(layer.ffn, name) for name in EXPERT_MATRICES}
    else:
        found |= {name: getattr(layer.moe.experts, name) for name in EXPERT_MATRICES}
        if layer.moe.shared is not None:
            found |= {f"shared_{name}": getattr(layer.moe.shared, name) for name in EXPERT_MATRICES}
    return {name: w for name, w in found.items() if w is not None}


def programmed_by_hand(
    params: Params, seed: int, *, noise: float, per_column: bool, tile_rows: int = TILE_ROWS
) -> ProgrammedWeights:
    """Every matrix with normal noise of `noise` times its own standard deviation added."""
    rng = np.random.default_rng(seed)

    def matrix(w: jax.Array) -> ProgrammedMatrix:
        clean = np.asarray(w)
        noisy = (clean + noise * clean.std() * rng.standard_normal(clean.shape)).astype(np.float32)
        return ProgrammedMatrix(
            w=jnp.asarray(noisy), weight_max=jnp.asarray(weight_maxima(noisy, per_column, tile_rows))
        )

    return ProgrammedWeights(
        layers={name: matrix(w) for name, w in matrices_of(params.layers).items()},
        dense_layers={name: matrix(w) for name, w in matrices_of(params.dense_layers).items()},
        lm_head=matrix(params.embed.T if params.lm_head is None else params.lm_head),
    )


def site_widths(config: ModelConfig, dense: bool) -> dict[str, int]:
    """How wide the input of every site is, in layers without (`dense`) or with experts."""
    hidden, heads, latent = config.hidden_size, config.num_heads, config.latent
    widths = {
        "attention_in": hidden,
        "attention_out": heads * (config.head_dim if latent is None else latent.value_dim),
    }
    if latent is not None:
        widths["kv_latent"] = latent.kv_rank
        if latent.query_rank is not None:
            widths["query_latent"] = latent.query_rank
    if dense:
        return widths | {"ffn_in": hidden, "ffn_mid": config.dense_intermediate_size or 0}
    widths |= {"experts_in": hidden, "experts_mid": config.expert_intermediate_size}
    if config.shared_intermediate_size is not None:
        widths |= {"shared_in": hidden, "shared_mid": config.shared_intermediate_size}
    return widths


def random_ranges(config: ModelConfig, seed: int, *, tile_rows: int = TILE_ROWS) -> Calibration:
    """A range of its own for every matrix, expert and row-block; some clip, some are too wide."""
    rng = np.random.default_rng(seed)

    def draw(width: int, *leading: int) -> jax.Array:
        tiles = len(row_blocks(width, tile_rows))
        return jnp.asarray(rng.uniform(0.7, 3.0, (*leading, tiles)), jnp.float32)

    layers, experts, dense = len(config.moe_layers), config.num_experts, len(config.dense_layers)
    return Calibration(
        layers={
            site: draw(width, layers, experts) if site.startswith("experts") else draw(width, layers)
            for site, width in site_widths(config, dense=False).items()
        },
        dense_layers={s: draw(w, dense) for s, w in site_widths(config, dense=True).items()} if dense else {},
        lm_head=draw(config.hidden_size),
        tokens_seen=jnp.ones((layers, experts)),
        tile_rows=tile_rows,
    )
