"""Runs a model over calibration text and keeps the statistics of what its matrices received."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int

from hetmoe.analog.calibration import Calibration, InputStatistics, RangeMethod, calibration_from
from hetmoe.analog.moments import Moments, observe_inputs
from hetmoe.analog.tiles import row_blocks
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.hardware import Probe
from hetmoe.models.params import Params
from hetmoe.models.transformer import hidden_states
from hetmoe.parallel.mesh import shard_of
from hetmoe.parallel.model import pad_sequences
from hetmoe.parallel.rules import on_mesh, param_specs
from hetmoe.parallel.shard import TOKENS, WHOLE, Shard

CALIBRATED_AT_ONCE = 4  # sequences per step of the moving average


@functools.partial(jax.jit, static_argnames=("config", "tile_rows", "histogram", "mesh"))
def _observe(
    params: Params, tokens: Array, config: ModelConfig, tile_rows: int, histogram: bool, mesh: jax.sharding.Mesh | None
) -> tuple[tuple[dict[str, Moments], dict[str, Moments]], Moments]:
    def observe(x: Array, real: Array, group: Array) -> Moments:
        return observe_inputs(x, real, group, groups=config.num_experts, tile_rows=tile_rows, histogram=histogram)

    def run(params: Params, tokens: Array, counted: Array | None, shard: Shard) -> Any:
        hidden, _, seen = hidden_states(params, tokens, config, observe=observe, counted=counted, shard=shard)
        probe = Probe(observe, None if counted is None else jnp.repeat(counted, tokens.shape[1]))
        probe.single("lm_head", hidden.reshape(-1, config.hidden_size))
        return seen, probe.seen["lm_head"]

    if mesh is None:
        return run(params, tokens, None, WHOLE)
    shard = shard_of(mesh)

    def part(params: Params, tokens: Array, counted: Array) -> Any:
        found = run(params, tokens, counted, shard)
        return jax.tree.map(lambda m: m.over_devices(TOKENS), found, is_leaf=_is_moments)

    padded = pad_sequences(tokens, shard.data * shard.expert)
    counted = jnp.arange(padded.shape[0]) < tokens.shape[0]
    return on_mesh(part, mesh, (param_specs(config), P(TOKENS), P(TOKENS)), P())(params, padded, counted)


def collect_statistics(
    params: Params,
    tokens: Int[Array, "sequences seq"],
    config: ModelConfig,
    *,
    tile_rows: int = 512,
    batch: int = CALIBRATED_AT_ONCE,
    histogram: bool = False,
    mesh: jax.sharding.Mesh | None = None,
) -> InputStatistics:
    """Statistics of the inputs of every matrix from one digital pass over `tokens`, `batch` sequences at a time.

    Args:
        params: the model.
        tokens: calibration text.
        config: static.
        tile_rows: rows of a crossbar tile, which ranges are per.
        batch: sequences per step of the moving average (those left over make a smaller last one).
        histogram: also count magnitudes, for the method `quantile`.
        mesh: where the model lies; None = on one device.

    Raises:
        InputError: for no sequences, or a batch below 1.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or batch < 1:
        raise InputError(f"calibration needs tokens [sequences, seq] and batch >= 1, got {list(tokens.shape)}, {batch}")
    check_tokens(tokens, config)
    parts: list[Any] = []
    counted: Any = None  # histograms are large: they are added up at once
    for start in range(0, tokens.shape[0], batch):
        found: Any = jax.tree.map(
            np.asarray, _observe(params, tokens[start : start + batch], config, tile_rows, histogram, mesh)
        )
        new = [m.histogram for m in _moments(found)]
        counted = new if counted is None else [None if a is None else a + b for a, b in zip(counted, new, strict=True)]
        parts.append(jax.tree.map(lambda m: dataclasses.replace(m, histogram=None), found, is_leaf=_is_moments))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
    histograms = iter(counted)

    def with_histogram(m: Moments) -> Moments:
        total = next(histograms)
        return m if total is None else dataclasses.replace(m, histogram=total[None])

    (layers, dense_layers), head = jax.tree.map(with_histogram, stacked, is_leaf=_is_moments)
    counts = np.sum(layers["experts_in"].count, axis=0)[..., 0]
    return InputStatistics(
        layers={site: m if site.startswith("experts") else _first_group(m) for site, m in layers.items()},
        dense_layers={site: _first_group(m) for site, m in dense_layers.items()},
        lm_head=_first_group(head),
        tokens_seen=counts / row_blocks(config.hidden_size, tile_rows)[0][1],
        tile_rows=tile_rows,
    )


def _is_moments(node: Any) -> bool:
    return isinstance(node, Moments)


def _moments(tree: Any) -> list[Moments]:
    return jax.tree.leaves(tree, is_leaf=_is_moments)


def _first_group(m: Moments) -> Moments:
    """Dense matrices have one group of inputs: the first of those that `observe_inputs` was told of."""
    histogram = None if m.histogram is None else m.histogram[..., :1, :, :]
    part = jax.tree.map(lambda leaf: leaf[..., :1, :], dataclasses.replace(m, histogram=None))
    return dataclasses.replace(part, histogram=histogram)


def calibrate(
    params: Params,
    tokens: Int[Array, "sequences seq"],
    config: ModelConfig,
    how: RangeMethod,
    *,
    tile_rows: int = 512,
    batch: int = CALIBRATED_AT_ONCE,
    mesh: jax.sharding.Mesh | None = None,
) -> Calibration:
    """Input ranges of every matrix from one digital pass over `tokens`, `batch` sequences at a time.

    Arguments as of `collect_statistics`.

    Raises:
        InputError: for no sequences, a batch below 1, or inputs that are NaN or infinite.
    """
    if not isinstance(how, RangeMethod):
        raise InputError(f"calibration method {how!r} must be a RangeMethod, such as hetmoe.RangeMethod()")
    histogram = how.method == "quantile"
    return calibration_from(
        collect_statistics(params, tokens, config, tile_rows=tile_rows, batch=batch, histogram=histogram, mesh=mesh),
        how,
    )
