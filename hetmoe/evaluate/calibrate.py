"""Runs a model over calibration text and turns what its matrices received into DAC ranges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hetmoe.analog.calibration import Calibration, LayerRanges, Moments, RangeMethod, merge_ranges, observe_inputs
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.params import Params
from hetmoe.models.transformer import hidden_states


@functools.partial(jax.jit, static_argnames=("config", "tile_rows", "histogram"))
def _observe(
    params: Params, tokens: Array, config: ModelConfig, tile_rows: int, histogram: bool
) -> tuple[dict[str, Moments], Moments]:
    def observe(x: Array, real: Array, group: Array) -> Moments:
        return observe_inputs(x, real, group, groups=config.num_experts, tile_rows=tile_rows, histogram=histogram)

    hidden, _, seen = hidden_states(params, tokens, config, observe=observe)
    flat = hidden.reshape(1, -1, config.hidden_size)
    head = observe(flat, jnp.ones(flat.shape[:2], bool), jnp.zeros((1,), jnp.int32))
    return seen, head


def calibrate(
    params: Params,
    tokens: Int[Array, "sequences seq"],
    config: ModelConfig,
    how: RangeMethod,
    *,
    tile_rows: int = 512,
    batch: int = 4,
) -> Calibration:
    """Input ranges of every matrix from one digital pass over `tokens`, `batch` sequences at a time.

    Raises:
        InputError: for no sequences or a batch below 1.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or batch < 1:
        raise InputError(f"calibration needs tokens [sequences, seq] and batch >= 1, got {list(tokens.shape)}, {batch}")
    check_tokens(tokens, config)
    batches: list[dict[str, Moments]] = []
    heads: list[Moments] = []
    for start in range(0, tokens.shape[0], batch):
        seen, head = _observe(params, tokens[start : start + batch], config, tile_rows, how.method == "quantile")
        batches.append(jax.tree.map(np.asarray, seen))
        heads.append(jax.tree.map(np.asarray, head))

    def experts(name: str) -> tuple[np.ndarray, np.ndarray]:
        return merge_ranges([b[name] for b in batches], how)

    def single(moments: list[Moments]) -> np.ndarray:
        # Dense matrices have one group of inputs: the first of those that `observe_inputs` was told of.
        return merge_ranges([m.group(0) for m in moments], how)[0][..., 0, :]

    experts_in, counts = experts("experts_in")
    inputs_of_first_block = row_blocks(config.hidden_size, tile_rows)[0][1]

    def array(values: np.ndarray) -> Array:
        return jnp.asarray(values, jnp.float32)

    layers = LayerRanges(
        experts_in=array(experts_in),
        experts_mid=array(experts("experts_mid")[0]),
        attention_in=array(single([b["attention_in"] for b in batches])),
        attention_out=array(single([b["attention_out"] for b in batches])),
    )
    return Calibration(
        layers=layers,
        lm_head=array(single(heads)),
        tokens_seen=array(counts[..., 0] / inputs_of_first_block),
        tile_rows=tile_rows,
    )
