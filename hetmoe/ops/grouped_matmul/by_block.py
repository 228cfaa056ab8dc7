"""Grouped products in a loop with one matmul per block."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hetmoe.ops.narrow import take


def products(x: Array, w: Array, block_expert: Array, used: Array | None) -> Array:
    """As `grouped_matmul`."""
    return over_blocks(lambda rows, expert: product(rows, w, expert), x, block_expert, used, w.shape[2])


def product(rows: Array, w: Array, expert: Array) -> Array:
    """One block times the weights of one expert, read in its dtype; float32."""
    # HIGHEST: float32 operands are otherwise cut to TF32 or bfloat16 on GPU and TPU.
    weights = take(w, expert).astype(rows.dtype)
    return jnp.matmul(rows, weights, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def over_blocks(
    network: Callable[[Array, Array], Array], x: Array, block_expert: Array, used: Array | None, width: int
) -> Array:
    """`network(rows, expert)`, float32 `[block, width]`, of every block that is used, one after the other."""

    def one(block: tuple[Array, Array, Array | None]) -> Array:
        rows, expert, is_used = block
        if is_used is None:
            return network(rows, expert)
        # There are as many blocks as the worst load needs. (Under vmap both branches run, and one is chosen.)
        nothing = jnp.zeros((rows.shape[0], width), jnp.float32)
        return jax.lax.cond(is_used, network, lambda *_: nothing, rows, expert)

    return jax.lax.map(one, (x, block_expert, used))


def weights_gradient(x: Array, grad: Array, block_expert: Array, experts: int) -> Array:
    """Sum over every expert's blocks of `x^T grad`, float32 `[experts, K, N]`."""
    per_block = jnp.einsum("bmk,bmn->bkn", x, grad, preferred_element_type=jnp.float32)
    return jax.ops.segment_sum(per_block, block_expert, num_segments=experts, indices_are_sorted=True)
