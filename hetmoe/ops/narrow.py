"""Slices of stacks of 2-byte weights inside loops, without a widened copy of the whole stack.

XLA on CPU slices bfloat16 in float32 and moves the widening of the whole operand, which does not change, out of the
loop: a scan over the layers of a model would first make a float32 copy of all experts. A barrier that ties the stack to
something that changes in the loop keeps the widening at the slice. Other dtypes are not affected; on other devices the
barrier changes nothing but the order of operations.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


def is_narrow(leaf: Any) -> bool:
    """Whether an array holds 2-byte floats."""
    return jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize == 2


def take(stack: Array, index: Int[Array, ""]) -> Array:
    """`stack[index]`, for an index that changes in a loop."""
    if not is_narrow(stack):
        return stack[index]
    tied, index = jax.lax.optimization_barrier((stack, index))
    return tied[index]


def scan(step: Any, carry: Any, xs: Any) -> Any:
    """`jax.lax.scan(step, carry, xs)` that slices by `take`; its derivative is that of the scan.

    (The derivative of `take` in a loop would add to the whole stack once per step.)
    """
    leaves = jax.tree.leaves(xs)
    if not any(is_narrow(leaf) for leaf in leaves):
        return jax.lax.scan(step, carry, xs)

    def plain(carry: Any, xs: Any) -> Any:
        return jax.lax.scan(step, carry, xs)

    @jax.custom_vjp
    def run(carry: Any, xs: Any) -> Any:
        def one(carry: Any, index: Array) -> Any:
            return step(carry, jax.tree.map(lambda leaf: take(leaf, index), xs))

        return jax.lax.scan(one, carry, jnp.arange(leaves[0].shape[0]))

    run.defvjp(lambda carry, xs: jax.vjp(plain, carry, xs), lambda pullback, grads: pullback(grads))
    return run(carry, xs)
