"""A sum whose order is in the program, so that it does not change with backend, fusion or the shape around it."""

import jax.numpy as jnp
from jaxtyping import Array


def pairwise_sum(x: Array, axis: int) -> Array:
    """Sum over one axis, kept with size 1: halves are added to each other until one element is left.

    XLA chooses the order of its own sums by what it fuses them with: one device and a mesh then differ in the last bit.
    """
    axis %= x.ndim
    size = x.shape[axis]
    count = 1 << max(size - 1, 0).bit_length()
    x = jnp.pad(x, [(0, count - size if at == axis else 0) for at in range(x.ndim)])
    while count > 1:
        count //= 2
        low, high = jnp.split(x, 2, axis=axis)
        x = low + high
    return x
