"""How far deployed tiles are from their target weights, from the products of a few known vectors.

A probe is a vector x of independent signs. The chip returns `y' = W'^T x + e`, with the weights W' that it really holds
and the error e of its converters; `y = W^T x` is known. With `a = <W', W> / |W|^2` (Frobenius) the weights are
`W' = a W + R`, `<R, W> = 0`: a scale, which drift lowers and one digital factor undoes, and a rest, which is noise.

Estimates from m probes, for a chip as it is:

- `S = mean |y' - y|^2 - N s^2` of `|W' - W|^2`, where s^2 is the mean square error of a converted output. Signs are
  independent, so `E (D^T x)^2` sums squares: it has no bias. With `A = D D^T`, `D = W' - W`, its variance is
  `2 (|A|^2 - sum_i A_ii^2) / m` beside that of the converters (Hutchinson 1990, for signs).
- `a' = sum <y', y> / sum |y|^2` of a. With `G = W W^T` and B the symmetric part of `R W^T`, whose trace is 0,
  `a' - a = sum x^T B x / sum x^T G x`, so to first order in 1/m its variance is `2 (|B|^2 - sum B_ii^2) / (m tr(G)^2)`
  and its bias `-2 (<B, G> - sum B_ii G_ii) / (m tr(G)^2)`. From the probes alone the variance is estimated as that
  of a ratio, `m / (m - 1) sum (<y', y> - a' |y|^2)^2 / (sum |y|^2)^2`.
- `mean |y' - a' y|^2 - N s^2` of `|R|^2`: its bias is of order 1/m of itself (the scale is fitted to the same probes).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Readings(NamedTuple):
    """What probing one matrix gives; all sums of squares are estimates."""

    scale: Float[Array, "*matrices"]  # a'
    scale_variance: Float[Array, "*matrices"]  # of a', from the spread of the probes
    change: Float[Array, "*matrices"]  # of |W' - W|^2
    rest: Float[Array, "*matrices"]  # of |R|^2
    size: Float[Array, "*matrices"]  # |W|^2, exactly


def probe_vectors(key: jax.Array, probes: int, rows: int) -> Float[Array, "probes rows"]:
    """Independent signs."""
    return jax.random.rademacher(key, (probes, rows), jnp.float32)


def read_probes(
    w: Float[Array, "K N"],
    outputs: Float[Array, "probes N"],
    vectors: Float[Array, "probes K"],
    converter_variance: Float[Array, ""] | float = 0.0,
) -> Readings:
    """Estimates for one matrix.

    Args:
        w: target weights.
        outputs: what the chip returned for each probe, scaled as the layer sees it.
        vectors: the probes.
        converter_variance: mean square error of one converted output, subtracted; `converter_error_variance`.
    """
    target, count = w.astype(jnp.float32), vectors.shape[0]
    known = jnp.matmul(vectors, target, precision=jax.lax.Precision.HIGHEST)
    powers, products = jnp.sum(jnp.square(known), axis=1), jnp.sum(outputs * known, axis=1)
    power = jnp.sum(powers)
    divisor = jnp.where(power > 0, power, 1.0)
    scale = jnp.where(power > 0, jnp.sum(products) / divisor, 1.0)
    spread = jnp.sum(jnp.square(products - scale * powers)) * (count / max(count - 1, 1))
    converters = w.shape[1] * converter_variance
    return Readings(
        scale=scale,
        scale_variance=jnp.where(power > 0, spread / jnp.square(divisor), 0.0),
        change=jnp.sum(jnp.square(outputs - known)) / count - converters,
        rest=jnp.sum(jnp.square(outputs - scale * known)) / count - converters,
        size=jnp.sum(jnp.square(target)),
    )


def converter_error_variance(bound: Float[Array, "*tiles"], bits: int | None) -> Float[Array, "*tiles"] | float:
    """Mean square error of one output of an ADC of this bound, per tile: a step squared over 12; 0 without converters.

    Rounding errors are taken as uniform, which they are to good accuracy when outputs spread over several steps.
    """
    if bits is None:
        return 0.0
    return jnp.square(2 * bound / (2**bits - 2)) / 12


def change_variance(change: Float[Array, "K N"], probes: int) -> Float[Array, ""]:
    """Variance of `Readings.change` over probes, for weights that are off by `change`, without converters."""
    gram = jnp.matmul(change, change.T, precision=jax.lax.Precision.HIGHEST)
    return 2 * (jnp.sum(jnp.square(gram)) - jnp.sum(jnp.square(jnp.diagonal(gram)))) / probes


def scale_moments(
    w: Float[Array, "K N"], programmed: Float[Array, "K N"], probes: int
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """(a, bias of a', variance of a') to first order in 1 / probes."""
    power = jnp.sum(jnp.square(w))
    scale = jnp.sum(w * programmed) / power
    rest = programmed - scale * w
    half = jnp.matmul(rest, w.T, precision=jax.lax.Precision.HIGHEST)
    b, g = (half + half.T) / 2, jnp.matmul(w, w.T, precision=jax.lax.Precision.HIGHEST)

    def off_diagonal(x: Array, y: Array) -> Array:
        return jnp.sum(x * y) - jnp.sum(jnp.diagonal(x) * jnp.diagonal(y))

    unit = 2 / (probes * jnp.square(power))
    return scale, -unit * off_diagonal(b, g), unit * off_diagonal(b, b)
