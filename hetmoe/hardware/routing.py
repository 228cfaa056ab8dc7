"""What routing does to a step: how many copies of tokens every expert gets, and how many experts are needed at all.

A token chooses expert e with probability f_e. Tokens of a step are taken as independent (in decoding they belong to
different sequences), so an expert gets a binomial number of them. The number of different experts that a step needs is
then `sum_e 1 - (1 - f_e)^tokens`, whatever the dependence between the experts of one token. The largest number of
copies that any of some experts gets treats their numbers as independent of each other.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float64, Int
from scipy import stats

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig

MOST_LEVELS = 256  # of copies at which probabilities are kept; between them they are interpolated


@struct.dataclass
class StepRouting:
    """Routing of steps of so many tokens; leading axes are other steps. float32."""

    tokens: Float[Array, "*steps"]
    copies: Float[Array, "*steps moe_layers experts"]  # expected, of every expert
    touched: Float[Array, "*steps moe_layers experts"]  # probability that the step needs the expert
    log_below: Float[Array, "*steps moe_layers experts levels"]  # log of P(an expert gets at most `level` copies)
    weights: Float[Array, "*steps levels"]  # numbers of copies that a level stands for


def uniform_frequency(config: ModelConfig) -> Float64[np.ndarray, "moe_layers experts"]:
    """Every expert chosen equally often: `experts_per_token / num_experts`."""
    shape = (len(config.moe_layers), config.num_experts)
    return np.full(shape, config.experts_per_token / config.num_experts)


def check_frequency(frequency: Any, config: ModelConfig) -> Float64[np.ndarray, "moe_layers experts"]:
    """Shares of tokens in float64.

    Raises:
        InputError: unless they are `[moe_layers, experts]` within [0, 1] and sum to `experts_per_token` in each layer
            (within 1e-3, for shares that were rounded).
    """
    share = np.asarray(frequency, np.float64)
    wanted = (len(config.moe_layers), config.num_experts)
    if share.shape != wanted or not ((share >= 0) & (share <= 1)).all():
        raise InputError(f"frequency {list(share.shape)} must be shares in [0, 1], {list(wanted)} for this model")
    sums = share.sum(axis=1)
    if np.abs(sums - config.experts_per_token).max() > 1e-3:
        layer = int(np.argmax(np.abs(sums - config.experts_per_token)))
        raise InputError(
            f"frequency of layer {layer} (of those with experts) sums to {sums[layer]:g}; a token chooses "
            f"{config.experts_per_token} experts"
        )
    return share


def distinct_experts(
    frequency: Float64[np.ndarray, "moe_layers experts"], tokens: float
) -> Float64[np.ndarray, "moe_layers"]:
    """Expected number of different experts that a step of so many independent tokens needs, in each layer."""
    return np.sum(-np.expm1(tokens * np.log1p(-np.minimum(frequency, 1 - 1e-16))), axis=1)


def step_routing(frequency: Float64[np.ndarray, "moe_layers experts"], tokens: int) -> StepRouting:
    """Routing of a step of `tokens` tokens; on the host, in float64.

    Raises:
        InputError: for fewer than one token.
    """
    if tokens < 1 or tokens != int(tokens):
        raise InputError(f"tokens={tokens!r} of a step must be a whole number of at least 1")
    # No expert gets more than this: all tokens, or ten standard deviations above the mean of the busiest.
    busiest = float(tokens * np.max(frequency))
    most = int(min(tokens, np.ceil(busiest + 10 * np.sqrt(busiest) + 10)))
    levels = np.unique(np.linspace(0, most, min(most + 1, MOST_LEVELS)).round().astype(np.int64))
    log_below = stats.binom.logcdf(levels, tokens, frequency[..., None])
    # E[max] = sum over m < most of P(max > m), a sum that is linear between two levels.
    gaps = np.diff(levels)
    weights = np.zeros(len(levels))
    weights[:-1] += (gaps + 1) / 2
    weights[1:] += (gaps - 1) / 2
    return StepRouting(
        tokens=jnp.asarray(tokens, jnp.float32),
        copies=jnp.asarray(tokens * frequency, jnp.float32),
        touched=jnp.asarray(-np.expm1(tokens * np.log1p(-np.minimum(frequency, 1 - 1e-16))), jnp.float32),
        # A level that is never kept to (log 0) is as good as -1e9, and 0 times that is a number.
        log_below=jnp.asarray(np.maximum(log_below, -1e9), jnp.float32),
        weights=jnp.asarray(weights, jnp.float32),
    )


def stack_routings(steps: list[StepRouting]) -> StepRouting:
    """Steps along a new leading axis, to map over; levels that some lack are filled up with ones of no weight."""
    most = max(step.weights.shape[0] for step in steps)

    def filled(step: StepRouting) -> StepRouting:
        more = most - step.weights.shape[0]
        return dataclasses.replace(
            step,
            log_below=jnp.pad(step.log_below, ((0, 0), (0, 0), (0, more))),
            weights=jnp.pad(step.weights, (0, more)),
        )

    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(filled(step) for step in steps))


def largest_load(step: StepRouting, among: Float[Array, "moe_layers experts"]) -> Float[Array, "moe_layers"]:
    """Expected largest number of copies that one of the experts `among` (0 or 1) gets, in each layer."""
    together = jnp.einsum("le,leg->lg", among, step.log_below, precision=jax.lax.Precision.HIGHEST)
    return jnp.sum(-jnp.expm1(together) * step.weights[None], axis=-1)


def counted_experts(
    chosen: Int[np.ndarray, "moe_layers windows seq copies"], batch: int
) -> tuple[Float64[np.ndarray, "moe_layers"], Float64[np.ndarray, "moe_layers"]]:
    """(different experts, copies of the busiest expert) of a step, counted: means over steps, in each layer.

    A step decodes one token of each of `batch` different windows of a text, all at the same position.

    Raises:
        InputError: for more sequences than there are windows.
    """
    layers, windows, seq, copies = chosen.shape
    if not 1 <= batch <= windows:
        raise InputError(f"batch={batch} must be at least 1 and at most the {windows} windows of text")
    groups = windows // batch
    steps = chosen[:, : groups * batch].reshape(layers, groups, batch, seq, copies)
    steps = np.moveaxis(steps, 2, 3).reshape(layers, groups * seq, batch * copies)
    experts = int(chosen.max()) + 1
    loads = np.zeros((layers, groups * seq, experts), np.int32)
    rows = np.arange(groups * seq)[:, None]
    for layer in range(layers):
        np.add.at(loads[layer], (rows, steps[layer]), 1)
    return (loads > 0).sum(axis=2).mean(axis=1), loads.max(axis=2).mean(axis=1)
