"""Grouped matmul in plain XLA: token blocks times the weights of the expert that each block belongs to."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.grouped_matmul import by_block, ragged


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "blocks block K"],
    w: Float[Array, "experts K N"],
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"] | None,
) -> Float[Array, "blocks block N"]:
    """Every block times the weights of its expert; float32.

    Weights are read in the dtype of `x`. On TPU this is `jax.lax.ragged_dot`, elsewhere a loop over blocks: there
    `ragged_dot` becomes the products of every row with every expert's weights (on CPU by jax, on NVIDIA GPU by XLA of
    jaxlib 0.10; https://github.com/openxla/xla/pull/40189).

    Args:
        x: token blocks (`hetmoe.ops.dispatch`).
        w: weights.
        block_expert: expert of each block, in ascending order.
        used: False for blocks that need not be multiplied, whose results are zero; None = all are used.
    """
    return jax.lax.platform_dependent(x, w, block_expert, used, tpu=ragged.products, default=by_block.products)


Residuals = tuple[Array, Array, Array, Array | None]


def _fwd(x: Array, w: Array, block_expert: Array, used: Array | None) -> tuple[Array, Residuals]:
    return grouped_matmul(x, w, block_expert, used), (x, w, block_expert, used)


def _bwd(residuals: Residuals, grad: Array) -> tuple[Array, Array, None, None]:
    # Written by hand because the derivative of `w[expert]` inside a loop would carry, and add to, the whole
    # [E, K, N] gradient once per block (measured: 1.8 times the time of the whole forward and backward).
    x, w, block_expert, used = residuals
    if used is not None:
        grad = jnp.where(used[:, None, None], grad, 0)
    grad = grad.astype(x.dtype)
    dx = grouped_matmul(grad, w.swapaxes(1, 2), block_expert, used)
    ways = {"tpu": ragged.weights_gradient, "default": by_block.weights_gradient}
    branches = {name: functools.partial(way, experts=w.shape[0]) for name, way in ways.items()}
    dw = jax.lax.platform_dependent(x, grad, block_expert, **branches)
    return dx.astype(x.dtype), dw.astype(w.dtype), None, None


grouped_matmul.defvjp(_fwd, _bwd)
