"""A vmapped axis folded into another one, so that one call serves all its elements."""

import jax.numpy as jnp
from jaxtyping import Array


def fold_axis(size: int, leaf: Array, has: bool) -> Array:
    """A leaf with its mapped leading axis, of `size`, folded into the next; repeated if it has none."""
    whole = leaf if has else jnp.broadcast_to(leaf, (size, *leaf.shape))
    return whole.reshape(-1, *whole.shape[2:])


def element_numbers(size: int, length: int) -> Array:
    """Which element every entry of a folded axis comes from, where each has `length` of them."""
    return jnp.repeat(jnp.arange(size, dtype=jnp.int32), length)
