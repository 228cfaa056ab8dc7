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
from hetmoe.ops.grouped_quantized import pallas_tpu, pallas_triton, triton_codes
from hetmoe.ops.grouped_quantized.block_sizes import choose, choose_for_codes
from hetmoe.ops.grouped_quantized.shape import Operand, Shape, Static, arrange_rows
from hetmoe.ops.grouped_quantized.xla import transposed_product
from hetmoe.ops.mapped_axis import element_numbers, fold_axis
from hetmoe.quantize.packed import Packed

KERNELS: dict[Platform, Callable[..., Array]] = {
    "tpu": pallas_tpu.blocks_matmul,
    "cuda": pallas_triton.blocks_matmul,
}


def packed_blocks(
    x: Float[Array, "blocks block K"],
    own: Bool[Array, "blocks"],
    slot: Int[Array, "blocks"],
    packed: Packed,
    static: Static,
) -> Float[Array, "blocks block N"]:
    """`packed_products` of one operand."""
    return packed_products(x, (Operand(own=own, slot=slot, packed=packed),), static)[0]


def packed_products(
    x: Float[Array, "blocks block K"], operands: tuple[Operand, ...], static: Static
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Products of blocks of rows with packed matrices `[stored, K, N]`, unpacked on the way; float32.

    Weights are rounded to the dtype of `x` before they are multiplied (few rows of bfloat16 on GPU: not rounded), and
    each is read once for the blocks that meet it, or once for each of them (GPU).

    Args:
        x: blocks of rows; their number and that of a block's rows as `rows_per_block` and `BLOCKS_MULTIPLE` of
            `hetmoe.ops.grouped_crossbar.block_sizes`.
        operands: of one precision and shape.
        static: what is static.
    """
    return _packed_products(x, operands, static)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _packed_products(x: Array, operands: tuple[Operand, ...], static: Static) -> Any:
    return _forward(static)(x, operands)


def _fwd(x: Array, operands: tuple[Operand, ...], static: Static) -> tuple[Any, Any]:
    return _packed_products(x, operands, static), (jnp.zeros((0,), x.dtype), operands)


def _bwd(static: Static, residuals: Any, grads: tuple[Array, ...]) -> tuple[Array, None]:
    del static
    like, operands = residuals
    parts = [transposed_product(grad, o.packed, o.slot, o.own) for grad, o in zip(grads, operands, strict=True)]
    return functools.reduce(jnp.add, parts).astype(like.dtype), None


_packed_products.defvjp(_fwd, _bwd)


@functools.cache
def _forward(static: Static) -> Callable[[Array, tuple[Operand, ...]], tuple[Array, ...]]:
    @custom_vmap
    def run(x: Array, operands: tuple[Operand, ...]) -> tuple[Array, ...]:
        outs = tuple(jax.ShapeDtypeStruct((*x.shape[:2], o.packed.shape[-1]), jnp.float32) for o in operands)
        return on_platform(static.interpret, functools.partial(_on, static=static), outs, x, operands)

    @run.def_vmap
    def _rule(size: int, batched: Any, x: Array, operands: tuple[Operand, ...]) -> Any:
        x_has, operands_has = batched
        blocks, join = operands[0].own.shape[-1], functools.partial(fold_axis, size)
        element = element_numbers(size, blocks)
        x, joined = join(x, x_has), list[Operand]()
        for operand, has in zip(operands, operands_has, strict=True):
            own, slot, packed = join(operand.own, has.own), join(operand.slot, has.slot), operand.packed
            if any(jax.tree.leaves(has.packed)):
                packed = jax.tree.map(join, packed, has.packed)
                slot = slot + element * (packed.shape[0] // size)
            joined.append(Operand(own=own, slot=slot, packed=packed))
        if any(jax.tree.leaves([has.packed for has in operands_has])):
            ys = run(x, tuple(joined))
        else:  # every element's: side by side, so that they are read once
            first = joined[0]
            order = jnp.argsort(jnp.where(first.own, first.slot, first.packed.shape[0]), stable=True)
            ordered = tuple(Operand(own=o.own[order], slot=o.slot[order], packed=o.packed) for o in joined)
            ys = tuple(y[jnp.argsort(order)] for y in run(x[order], ordered))
        parts = tuple(y.reshape(size, blocks, *y.shape[1:]) for y in ys)
        return parts, tuple(True for _ in parts)

    return run


def _on(platform: Platform, x: Array, operands: tuple[Operand, ...], *, static: Static) -> tuple[Array, ...]:
    """Arranges the rows as the platform's kernel wants them, and runs it."""
    grid, (rows, columns) = operands[0].packed.grid, operands[0].packed.shape[1:]
    assert all((o.packed.grid, o.packed.shape[1:]) == (grid, (rows, columns)) for o in operands)
    by_codes = platform == "cuda" and triton_codes.serves(x, operands[0].packed)
    if by_codes:
        sizes = static.sizes or choose_for_codes(grid, rows, columns, x.shape[0] * len(operands))
    else:
        sizes = static.sizes or choose(platform, grid=grid, rows=rows, columns=columns, block=x.shape[1])
    shape, interpret = Shape(grid=grid, rows=rows, width=columns, sizes=sizes), static.interpret is not None
    if by_codes:
        return triton_codes.blocks_matmul(x, operands, shape, interpret=interpret)
    run = functools.partial(KERNELS[platform], arrange_rows(x, shape), shape=shape, interpret=interpret)
    return tuple(run(o.own.astype(jnp.int32), o.slot.astype(jnp.int32), o.packed) for o in operands)
