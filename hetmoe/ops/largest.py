"""Maxima in which NaN is not lost."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def largest(values: Float[Array, "..."], axis: int | tuple[int, ...]) -> Float[Array, "..."]:
    """The maximum along axes, NaN where any value is.

    `jnp.max` promises the same, but on CPU XLA (jaxlib 0.10.2) vectorises longer reductions so that NaN is dropped.
    """
    return jnp.where(jnp.any(jnp.isnan(values), axis=axis), jnp.nan, jnp.max(values, axis=axis))
