"""The whole feed-forward network of the experts, block by block."""

from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.grouped_matmul.by_block import over_blocks, product
from hetmoe.ops.grouped_matmul.xla import grouped_matmul


@jax.custom_vjp
def grouped_feed_forward(
    x: Float[Array, "blocks block hidden"],
    gate: Float[Array, "experts hidden inner"],
    up: Float[Array, "experts hidden inner"],
    down: Float[Array, "experts inner hidden"],
    block_expert: Int[Array, "blocks"],
    used: Bool[Array, "blocks"],
) -> Float[Array, "blocks block hidden"]:
    """SwiGLU of every block by the weights of its expert; float32. Arguments as of `grouped_matmul`.

    A block goes through all three matrices before the next one, so that what is between them stays in a core's cache
    (`experiments/bench_cpu.py` times both). Under differentiation, and on TPU, every matrix takes all blocks in turn.
    """
    return jax.lax.platform_dependent(
        x, gate, up, down, block_expert, used, tpu=matrix_by_matrix, default=_block_by_block
    )


def matrix_by_matrix(x: Array, gate: Array, up: Array, down: Array, block_expert: Array, used: Array) -> Array:
    """The same; every matrix takes all blocks before the next one."""
    inner = jax.nn.silu(grouped_matmul(x, gate, block_expert, used)) * grouped_matmul(x, up, block_expert, used)
    return grouped_matmul(inner.astype(x.dtype), down, block_expert, used)


def _block_by_block(x: Array, gate: Array, up: Array, down: Array, block_expert: Array, used: Array) -> Array:
    def network(rows: Array, expert: Array) -> Array:
        inner = jax.nn.silu(product(rows, gate, expert)) * product(rows, up, expert)
        return product(inner.astype(rows.dtype), down, expert)

    return over_blocks(network, x, block_expert, used, down.shape[2])


def _fwd(x: Array, gate: Array, up: Array, down: Array, block_expert: Array, used: Array) -> tuple[Array, Any]:
    def network(x: Array, gate: Array, up: Array, down: Array) -> Array:
        return matrix_by_matrix(x, gate, up, down, block_expert, used)

    return jax.vjp(network, x, gate, up, down)


def _bwd(pullback: Any, grad: Array) -> tuple[Array | None, ...]:
    return (*pullback(grad), None, None)


grouped_feed_forward.defvjp(_fwd, _bwd)
