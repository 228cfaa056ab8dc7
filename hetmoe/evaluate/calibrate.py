"""Runs a model over calibration text and turns what its matrices received into DAC ranges."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hetmoe.analog.calibration import Calibration, Moments, RangeMethod, merge_ranges, observe_inputs
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.params import Params
from hetmoe.models.transformer import hidden_states


@functools.partial(jax.jit, static_argnames=("config", "tile_rows", "histogram"))
def _observe(
    params: Params, tokens: Array, config: ModelConfig, tile_rows: int, histogram: bool
) -> tuple[tuple[dict[str, Moments], dict[str, Moments]], Moments]:
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
        InputError: for no sequences, a batch below 1, or inputs that are NaN or infinite.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or batch < 1:
        raise InputError(f"calibration needs tokens [sequences, seq] and batch >= 1, got {list(tokens.shape)}, {batch}")
    if not isinstance(how, RangeMethod):
        raise InputError(f"calibration method {how!r} must be a RangeMethod, such as hetmoe.RangeMethod()")
    check_tokens(tokens, config)
    batches: list[Any] = []
    for start in range(0, tokens.shape[0], batch):
        observed = _observe(params, tokens[start : start + batch], config, tile_rows, how.method == "quantile")
        batches.append(jax.tree.map(np.asarray, observed))

    def experts(name: str) -> tuple[np.ndarray, np.ndarray]:
        return merge_ranges([moe[name] for (moe, _), _ in batches], how)

    def single(moments: list[Moments]) -> Array:
        # Dense matrices have one group of inputs: the first of those that `observe_inputs` was told of.
        return _array(merge_ranges([m.group(0) for m in moments], how)[0][..., 0, :])

    seen, seen_dense = batches[0][0]
    counts = experts("experts_in")[1]
    inputs_of_first_block = row_blocks(config.hidden_size, tile_rows)[0][1]
    return Calibration(
        layers={
            site: _array(experts(site)[0])
            if site.startswith("experts")
            else single([moe[site] for (moe, _), _ in batches])
            for site in seen
        },
        dense_layers={site: single([dense[site] for (_, dense), _ in batches]) for site in seen_dense},
        lm_head=single([head for _, head in batches]),
        tokens_seen=_array(counts[..., 0] / inputs_of_first_block),
        tile_rows=tile_rows,
    )


def _array(values: np.ndarray) -> Array:
    if not np.isfinite(values).all():
        raise InputError(
            "calibration: inputs of some matrices are NaN or infinite: the weights are, or activations overflow"
        )
    return jnp.asarray(values, jnp.float32)
