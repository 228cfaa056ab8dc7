"""Token blocks times the quantized weights of their experts, in plain XLA."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.quantize.mixed import MixedMatrix, Places, expert_weights
from hetmoe.quantize.packed import Packed


def quantized_feed_forward(
    x: Float[Array, "blocks block hidden"],
    gate: MixedMatrix,
    up: MixedMatrix,
    down: MixedMatrix,
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
) -> Float[Array, "blocks block hidden"]:
    """SwiGLU of every block by the weights of its expert; float32.

    An expert's weights are unpacked once for all its blocks, which follow each other, and are multiplied in the dtype
    of `x`. Beside the packed weights, those of one expert are in memory.

    Args:
        x: token blocks (`hetmoe.ops.dispatch`).
        gate: of one layer.
        up: likewise.
        down: likewise.
        block_expert: expert of each block, in ascending order.
        used: False for blocks that need not be multiplied, whose results are zero.
    """

    def network(rows: Array, weights: tuple[Array, ...]) -> Array:
        gate, up, down = weights
        inner = jax.nn.silu(_product(rows, gate)) * _product(rows, up)
        return _product(inner.astype(rows.dtype), down)

    return _over_blocks(network, x, (gate, up, down), block_expert, used, down.shape[-1])


def quantized_products(
    x: Float[Array, "blocks block K"],
    matrices: tuple[MixedMatrix, ...],
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Every block times the weights of its expert of each matrix; float32. Otherwise as `quantized_feed_forward`."""
    return tuple(
        _over_blocks(lambda rows, w: _product(rows, w[0]), x, (matrix,), block_expert, used, matrix.shape[-1])
        for matrix in matrices
    )


def transposed_product(
    grad: Float[Array, "blocks block N"], packed: Packed, slot: Int[Array, "blocks"], used: Bool[Array, "blocks"]
) -> Float[Array, "blocks block K"]:
    """Every block times the transpose of the packed matrix that `slot` names, in float32; zero where not used."""
    stored = jnp.arange(packed.shape[0], dtype=jnp.int32)
    matrix = MixedMatrix(pools=(packed,), places=Places(pool=jnp.zeros_like(stored), slot=stored))
    return _over_blocks(lambda rows, w: _product(rows, w[0].T), grad, (matrix,), slot, used, packed.shape[-2])


def _product(rows: Array, w: Array) -> Array:
    # HIGHEST: float32 operands are otherwise cut to TF32 or bfloat16 on GPU and TPU.
    return jnp.matmul(rows, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _over_blocks(
    network: Callable[[Array, tuple[Array, ...]], Array],
    x: Array,
    matrices: tuple[MixedMatrix, ...],
    block_expert: Array,
    used: Array,
    width: int,
) -> Array:
    def unpack(expert: Array) -> tuple[Array, ...]:
        return tuple(expert_weights(matrix, expert, x.dtype) for matrix in matrices)

    def step(
        held: tuple[Array, tuple[Array, ...]], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, tuple[Array, ...]], Array]:
        rows, expert, is_used = block
        owner, weights = held
        is_new = is_used & (expert != owner)
        weights = jax.lax.cond(is_new, unpack, lambda _: weights, expert)
        nothing = jnp.zeros((rows.shape[0], width), jnp.float32)
        y = jax.lax.cond(is_used, network, lambda *_: nothing, rows, weights)
        return (jnp.where(is_new, expert, owner), weights), y

    start = (jnp.int32(-1), tuple(jnp.zeros(matrix.shape[-2:], x.dtype) for matrix in matrices))
    return jax.lax.scan(step, start, (x, block_expert, used))[1]
