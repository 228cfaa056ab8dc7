"""GPTQ: weights are rounded one row after the other, each taking up the output errors of those before it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from hetmoe.errors import InputError
from hetmoe.quantize.grid import Grid, Quantized, dequantize, zero_or_middle
from hetmoe.quantize.hessian import Hessians, mean_hessian
from hetmoe.quantize.rtn import round_to_nearest
from hetmoe.quantize.steps import check_weights, round_codes

HIGHEST = jax.lax.Precision.HIGHEST
RETRIES = 5  # with ten times the damping each: from 0.01 to 1000 mean diagonals


@dataclasses.dataclass(frozen=True, kw_only=True)
class GptqOptions:
    """How Hessians are made safe to factor; static.

    Attributes:
        damping: added to the diagonal, as a fraction of its mean; above 0. The paper's is 0.01.
        prior: n0 / K, how many tokens for each of the K inputs the layer's mean Hessian counts. For an expert of n
            tokens it has the weight n0 / (n0 + n), so that an expert that no token reached is quantized for the mean
            of the layer, and a busy one for its own inputs. At least 0. With little text 1 is clearly better than 0
            (`experiments/gptq_prior.py`).

    Raises:
        InputError: for values outside these ranges.
    """

    damping: float = 0.01
    prior: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.damping < math.inf:
            raise InputError(f"damping={self.damping!r} must be above 0, and finite")
        if not 0 <= self.prior < math.inf:
            raise InputError(f"prior={self.prior!r} must be at least 0, and finite")


@struct.dataclass
class GptqResult:
    """Quantized experts, and the errors `(w - q)^T H (w - q)` of their columns for the expert's own H.

    That is the squared change of an output, summed over the calibration tokens that reached the expert, as far as
    float32 sums of K x K terms give it: terms of few tokens cancel.
    """

    quantized: Quantized
    error: Float[Array, "experts N"]  # never above `rtn_error`
    rtn_error: Float[Array, "experts N"]
    fell_back: Int[Array, "experts"]  # columns that are round-to-nearest's, because GPTQ's error was above its
    damping: Float[Array, "experts"]  # fraction of the mean diagonal that it took
    factored: Bool[Array, "experts"]  # False: no damping made H positive definite, and all columns fell back


def gptq(
    w: Float[Array, "experts K N"],
    hessians: Hessians,
    grid: Grid,
    options: GptqOptions,
    *,
    mean: Float[Array, "K K"] | None = None,
    name: str = "w",
) -> GptqResult:
    """Experts of a layer by GPTQ (Frantar et al. 2023, arXiv:2210.17323), with act-order and static groups.

    Steps and zeros are round-to-nearest's, from the original weights of each group of rows. Rows are then rounded by
    falling diagonal of H, the inputs with most energy first, each after all earlier rows' errors `e = w - q` have been
    compensated by changing it. With the rows in that order and H = R R^T, R upper triangular, the error of a column is
    `|R^T e|^2`, whose term i vanishes for

        w_i + sum over j < i of R_ji e_j / R_ii,

    and row i is what is nearest to that. It is the paper's step in other words: its U, the Cholesky factor of the
    inverse (H^-1 = U^T U), is R^-1, and what it subtracts from the rows to come is what is here collected when a row's
    turn is there (see also Chen et al. 2025, arXiv:2507.18553). It needs no inverse, which float32 would not hold well.

    Before, H is regularised: n0 times the mean over tokens of the layer's Hessians is added (`GptqOptions.prior`), then
    `damping` times the mean diagonal on the diagonal, ten times as much (up to 5 times) if the factorisation fails.
    Inputs that were always 0 are then independent of the others, and their rows are rounded to nearest. Columns for
    which all this does more harm than rounding to nearest on the expert's own data (at 1 bit and with few inputs or
    tokens it happens) are rounded to nearest.

    Everything is in float32, one expert after the other.

    Args:
        w: weights, any float dtype.
        hessians: of their inputs.
        grid: what to quantize to.
        options: regularisation.
        mean: `mean_hessian` of the whole layer, where `w` is of some of its experts only; None = it is of all.
        name: of the matrix, for messages.

    Raises:
        InputError: as `check_weights`; for Hessians of other shapes, or whose values are not finite, not symmetric or
            negative on the diagonal (where they are known: not while JAX traces).
    """
    check_weights(w, grid, name)
    _check_hessians(hessians, w.shape, name)
    return _gptq(w, hessians, mean_hessian(hessians) if mean is None else mean, grid, options)


def _check_hessians(hessians: Hessians, shape: tuple[int, ...], name: str) -> None:
    wanted = [shape[0], shape[1], shape[1]]
    if list(hessians.total.shape) != wanted or list(hessians.tokens.shape) != wanted[:1]:
        raise InputError(
            f"Hessians {list(hessians.total.shape)} with {list(hessians.tokens.shape)} counts of tokens do not belong "
            f"to {name} {list(shape)}: they must be {wanted} and {wanted[:1]}"
        )
    if isinstance(hessians.total, Tracer):
        return
    for expert, total in enumerate(np.asarray(hessians.total)):
        if not np.isfinite(total).all():
            problem = "NaN or infinite values: check the calibration inputs"
        elif np.diagonal(total).min() < 0 or np.abs(total - total.T).max() > 1e-3 * np.abs(total).max():
            problem = "a negative diagonal or is not symmetric: it is no sum of x x^T"
        else:
            continue
        raise InputError(f"the Hessian of expert {expert} of {name} has {problem}")


@functools.partial(jax.jit, static_argnames=("grid", "options"))
def _gptq(w: Array, hessians: Hessians, mean: Array, grid: Grid, options: GptqOptions) -> GptqResult:
    prior = options.prior * w.shape[1] * mean.astype(jnp.float32)

    def one(expert: tuple[Array, Array]) -> GptqResult:
        return _one_expert(expert[0].astype(jnp.float32), expert[1].astype(jnp.float32), prior, grid, options)

    return jax.lax.map(one, (w, hessians.total))


def _one_expert(w: Array, own: Array, prior: Array, grid: Grid, options: GptqOptions) -> GptqResult:
    hessian = own + prior
    rising = jnp.argsort(jnp.diagonal(hessian))
    factor, damping = _factor(hessian[rising][:, rising], options.damping)
    factored = jnp.all(jnp.isfinite(factor))
    order, upper = rising[::-1], factor[::-1, ::-1]
    feedback = jnp.tril(upper.T / jnp.diagonal(upper)[:, None], -1)

    nearest = round_to_nearest(w, grid)
    zero = zero_or_middle(nearest.scale, nearest.zero, grid)
    group = order // grid.group
    ordered = _round_in_order(w[order], nearest.scale[group], zero[group], feedback, grid)
    codes = jnp.zeros_like(ordered).at[order].set(ordered)

    error = _column_errors(w, dataclasses.replace(nearest, codes=codes), own)
    rtn_error = _column_errors(w, nearest, own)
    worse = ~(factored & (error <= rtn_error))  # also where an error is NaN
    return GptqResult(
        quantized=dataclasses.replace(nearest, codes=jnp.where(worse, nearest.codes, codes)),
        error=jnp.where(worse, rtn_error, error),
        rtn_error=rtn_error,
        fell_back=jnp.sum(worse, dtype=jnp.int32),
        damping=damping,
        factored=factored,
    )


def _factor(hessian: Array, damping: float) -> tuple[Array, Array]:
    """The lower Cholesky factor of the damped Hessian over its mean diagonal, and the damping that made one."""
    mean = jnp.mean(jnp.diagonal(hessian))
    scaled = hessian / jnp.where(mean > 0, mean, 1)

    def fails(state: tuple[Array, Array]) -> Array:
        tries, factor = state
        return (tries <= RETRIES) & ~jnp.all(jnp.isfinite(factor))

    def attempt(state: tuple[Array, Array]) -> tuple[Array, Array]:
        tries, _ = state
        damped = scaled + damping * 10.0**tries * jnp.eye(scaled.shape[0], dtype=scaled.dtype)
        return tries + 1, jnp.linalg.cholesky(damped)

    tries, factor = jax.lax.while_loop(fails, attempt, (jnp.zeros(()), jnp.full_like(scaled, jnp.nan)))
    return factor, damping * 10.0 ** (tries - 1)


def _round_in_order(w: Array, scale: Array, zero: Array, feedback: Array, grid: Grid) -> Array:
    """Codes of rows `[K, N]`, with a step and a zero each, in the order given.

    Block by block of rows: what a block takes up from earlier blocks is one matmul.
    """
    block = grid.group  # it divides the rows

    def one_block(errors: Array, start: Array) -> tuple[Array, Array]:
        def rows(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, block)

        w_block, scale_block, zero_block = rows(w), rows(scale), rows(zero)
        taken = w_block + jnp.matmul(rows(feedback), errors, precision=HIGHEST)
        within = jax.lax.dynamic_slice_in_dim(rows(feedback), start, block, axis=1)

        def one_row(row: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            codes, errors = state
            target = taken[row] + jnp.matmul(within[row], errors, precision=HIGHEST)
            code = round_codes(target, scale_block[row], zero_block[row], grid)
            level = (code.astype(jnp.float32) - zero_block[row]) * scale_block[row].astype(jnp.float32)
            return codes.at[row].set(code), errors.at[row].set(w_block[row] - level)

        nothing = jnp.zeros(w_block.shape, jnp.uint8), jnp.zeros_like(w_block)
        codes, found = jax.lax.fori_loop(0, block, one_row, nothing)
        return jax.lax.dynamic_update_slice_in_dim(errors, found, start, axis=0), codes

    _, codes = jax.lax.scan(one_block, jnp.zeros_like(w), jnp.arange(0, w.shape[0], block))
    return codes.reshape(w.shape)


def _column_errors(w: Array, quantized: Quantized, hessian: Array) -> Array:
    change = w - dequantize(quantized)
    return jnp.maximum(jnp.sum(change * jnp.matmul(hessian, change, precision=HIGHEST), axis=0), 0)
