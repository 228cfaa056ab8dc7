"""Crossbars for the small models: programmed weights and ranges made in numpy, without the package's own code."""

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.calibration import Calibration, LayerRanges
from hetmoe.analog.programming import ProgrammedLayer, ProgrammedMatrix, ProgrammedWeights
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Params
from tests.numpy_reference import row_blocks

TILE_ROWS = 12  # two row-blocks for each of the sizes 23, 24 and 21


def weight_maxima(w: np.ndarray, per_column: bool, tile_rows: int) -> np.ndarray:
    """`[..., tiles, 1 or columns]` of `[..., K, N]`."""
    axes = (-2,) if per_column else (-2, -1)
    blocks = row_blocks(w.shape[-2], tile_rows)
    return np.concatenate([np.max(np.abs(w[..., block, :]), axis=axes, keepdims=True) for block in blocks], axis=-2)


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

    stack = params.layers
    return ProgrammedWeights(
        layers=ProgrammedLayer(
            gate=matrix(stack.gate), up=matrix(stack.up), down=matrix(stack.down),
            q=matrix(stack.q), k=matrix(stack.k), v=matrix(stack.v), o=matrix(stack.o),
        ),
        lm_head=matrix(params.embed.T if params.lm_head is None else params.lm_head),
    )  # fmt: skip


def random_ranges(config: ModelConfig, seed: int, *, tile_rows: int = TILE_ROWS) -> Calibration:
    """A range of its own for every matrix, expert and row-block; some clip, some are too wide."""
    rng = np.random.default_rng(seed)

    def draw(width: int, *leading: int) -> jax.Array:
        tiles = len(row_blocks(width, tile_rows))
        return jnp.asarray(rng.uniform(0.7, 3.0, (*leading, tiles)), jnp.float32)

    layers, experts = config.num_layers, config.num_experts
    return Calibration(
        layers=LayerRanges(
            experts_in=draw(config.hidden_size, layers, experts),
            experts_mid=draw(config.expert_intermediate_size, layers, experts),
            attention_in=draw(config.hidden_size, layers),
            attention_out=draw(config.num_heads * config.head_dim, layers),
        ),
        lm_head=draw(config.hidden_size),
        tokens_seen=jnp.ones((layers, experts)),
        tile_rows=tile_rows,
    )
