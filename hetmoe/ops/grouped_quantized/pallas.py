"""The kernels for packed weights as one operation: choice by platform, mapped axes folded into blocks, gradients.

The gradient is that of the rows; packed weights, their steps and zeros count as constants (that of the XLA version
goes to steps and zeros, too).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float, Int

from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.platforms import on_platform
from hetmoe.ops.grouped_quantized import pallas_tpu, pallas_triton
from hetmoe.ops.grouped_quantized.block_sizes import choose
from hetmoe.ops.grouped_quantized.shape import Shape, Static, arrange_rows
from hetmoe.ops.grouped_quantized.xla import transposed_product
from hetmoe.ops.mapped_axis import element_numbers, fold_axis
from hetmoe.quantize.packed import Packed

KERNELS: dict[Platform, Callable[..., Array]] = {
    "tpu": pallas_tpu.blocks_matmul,
    "cuda": pallas_triton.blocks_matmul,
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def packed_blocks(
    x: Float[Array, "blocks block K"],
    own: Bool[Array, "blocks"],
    slot: Int[Array, "blocks"],
    packed: Packed,
    static: Static,
) -> Float[Array, "blocks block N"]:
    """Products of blocks of rows with packed matrices `[stored, K, N]`, unpacked on the way; float32.

    Weights are rounded to the dtype of `x` before they are multiplied, and each is read once for the blocks that meet
    it, or once for each of them (GPU).

    Args:
        x: blocks of rows; their number and that of a block's rows as `rows_per_block` and `BLOCKS_MULTIPLE` of
            `hetmoe.ops.grouped_crossbar.block_sizes`.
        own: False for blocks that need not be multiplied, whose results are zero.
        slot: which matrix each of the other blocks meets; blocks of one matrix follow each other.
        packed: matrices of one precision.
        static: what is static.
    """
    return _forward(static)(x, own, slot, packed)


def _fwd(x: Array, own: Array, slot: Array, packed: Packed, static: Static) -> tuple[Array, Any]:
    return packed_blocks(x, own, slot, packed, static), (jnp.zeros((0,), x.dtype), own, slot, packed)


def _bwd(static: Static, residuals: Any, grad: Array) -> tuple[Array, None, None, None]:
    del static
    like, own, slot, packed = residuals
    return transposed_product(grad, packed, slot, own).astype(like.dtype), None, None, None


packed_blocks.defvjp(_fwd, _bwd)


@functools.cache
def _forward(static: Static) -> Callable[[Array, Array, Array, Packed], Array]:
    @custom_vmap
    def run(x: Array, own: Array, slot: Array, packed: Packed) -> Array:
        out = jax.ShapeDtypeStruct((*x.shape[:2], packed.shape[-1]), jnp.float32)
        return on_platform(static.interpret, functools.partial(_on, static=static), out, x, own, slot, packed)

    @run.def_vmap
    def _rule(size: int, batched: Any, x: Array, own: Array, slot: Array, packed: Packed) -> Any:
        x_has, own_has, slot_has, packed_has = batched
        blocks, join = own.shape[-1], functools.partial(fold_axis, size)
        x, own, slot = join(x, x_has), join(own, own_has), join(slot, slot_has)
        if any(jax.tree.leaves(packed_has)):
            packed = jax.tree.map(join, packed, packed_has)
            y = run(x, own, slot + element_numbers(size, blocks) * (packed.shape[0] // size), packed)
        else:  # every element's: side by side, so that they are read once
            order = jnp.argsort(jnp.where(own, slot, packed.shape[0]), stable=True)
            y = run(x[order], own[order], slot[order], packed)[jnp.argsort(order)]
        return y.reshape(size, blocks, *y.shape[1:]), True

    return run


def _on(platform: Platform, x: Array, own: Array, slot: Array, packed: Packed, *, static: Static) -> Array:
    """Arranges the rows as the platform's kernel wants them, and runs it."""
    rows, columns = packed.shape[1:]
    sizes = static.sizes or choose(platform, grid=packed.grid, rows=rows, columns=columns, block=x.shape[1])
    shape = Shape(grid=packed.grid, rows=rows, width=columns, sizes=sizes)
    arranged, tables = arrange_rows(x, shape), (own.astype(jnp.int32), slot.astype(jnp.int32))
    return KERNELS[platform](arranged, *tables, packed, shape, interpret=static.interpret is not None)
