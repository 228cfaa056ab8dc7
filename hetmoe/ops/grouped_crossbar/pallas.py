"""The kernels as one operation: packing, choice by platform, mapped axes folded into blocks, gradients.

The gradient takes ranges, bounds and programming noise as constants: it is that of the clipped product, with converters
rounding straight through, an input at its range and an output within its bound counting as inside.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

from hetmoe.analog.tiles import row_blocks
from hetmoe.ops.grouped_crossbar import pallas_tpu, pallas_triton
from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.blocks import Matrix, Tables, fold
from hetmoe.ops.grouped_crossbar.operand_packing import make_shape, pack_matrix
from hetmoe.ops.grouped_crossbar.packing import pack_rows
from hetmoe.ops.grouped_crossbar.pallas_gradient import kernel_gradient
from hetmoe.ops.grouped_crossbar.platforms import on_platform
from hetmoe.ops.grouped_crossbar.shape import Static, weights_of

KERNELS = {"tpu": pallas_tpu.blocks_matmul, "cuda": pallas_triton.blocks_matmul}

Results = tuple[tuple[Array, ...], tuple[Array, ...]]  # products; which sums their ADCs did not clip, if kept


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def crossbar_blocks(
    x: Float[Array, "blocks block K"], tables: Tables, matrices: tuple[Matrix, ...], static: Static
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Products of every block of rows with its matrix of each of `matrices`; float32."""
    return _forward(static, keep_inside=False)(x, tables, matrices)[0]


def _fwd(x: Array, tables: Tables, matrices: tuple[Matrix, ...], static: Static) -> tuple[Any, Any]:
    keep = static.options.adc_bits is not None
    results, insides = _forward(static, keep_inside=keep)(x, tables, matrices)
    return results, (x, tables, matrices, insides if keep else tuple(None for _ in matrices))


def _bwd(static: Static, residuals: Any, grads: tuple[Array, ...]) -> tuple[Array, None, tuple[Matrix, ...]]:
    x, tables, matrices, insides = residuals
    dx, weights = kernel_gradient(x, tables, matrices, grads, insides, static)
    nothing = jax.tree.map(_no_gradient, matrices)
    found = []
    for matrix, (clean, programmed) in zip(nothing, weights, strict=True):
        part = matrix.clean if clean is None else dataclasses.replace(matrix.clean, w=clean)
        found.append(dataclasses.replace(matrix, clean=part, programmed=programmed))
    return dx, None, tuple(found)


def _no_gradient(leaf: Array) -> Any:
    is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jnp.zeros_like(leaf) if is_float else np.zeros(leaf.shape, jax.dtypes.float0)


crossbar_blocks.defvjp(_fwd, _bwd)


@functools.cache
def _forward(static: Static, *, keep_inside: bool) -> Callable[[Array, Tables, tuple[Matrix, ...]], Results]:
    @custom_vmap
    def run(x: Array, tables: Tables, matrices: tuple[Matrix, ...]) -> Results:
        blocks, block, rows = x.shape
        columns, tiles = weights_of(matrices[0]).shape[2], len(row_blocks(rows, static.options.tile_rows))
        result = jax.ShapeDtypeStruct((blocks, block, columns), jnp.float32)
        inside = jax.ShapeDtypeStruct((blocks, tiles, block, columns), jnp.int8)
        outputs = tuple(result for _ in matrices), tuple(inside for _ in matrices if keep_inside)
        kernel = functools.partial(_on, static=static, keep_inside=keep_inside)
        return on_platform(static.interpret, kernel, outputs, x, tables, matrices)

    @run.def_vmap
    def _rule(size: int, batched: Any, x: Array, tables: Tables, matrices: tuple[Matrix, ...]) -> Any:
        x, tables, matrices = fold(size, batched, x, tables, matrices)
        if matrices[0].programmed is None and not any(jax.tree.leaves(batched[2][0].clean)):
            # Elements that share weights and program them in the kernel: side by side, so that they are read once.
            order = jnp.argsort(tables.clean, stable=True)
            results = run(x[order], jax.tree.map(lambda table: table[order], tables), matrices)
            results = jax.tree.map(lambda leaf: leaf[jnp.argsort(order)], results)
        else:
            results = run(x, tables, matrices)
        parts = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), results)
        return parts, jax.tree.map(lambda _: True, parts)

    return run


def _on(
    platform: Platform,
    x: Array,
    tables: Tables,
    matrices: tuple[Matrix, ...],
    *,
    static: Static,
    keep_inside: bool,
) -> Results:
    """Packs the operands as the platform's kernel wants them, and runs it."""
    shape, packed = make_shape(platform, static, x.shape[1], matrices)
    results, insides = KERNELS[platform](
        pack_rows(x, shape.layout, 2),
        tables,
        tuple(pack_matrix(matrix, shape, packed) for matrix in matrices),
        shape,
        keep_inside=keep_inside,
        interpret=static.interpret is not None,
    )
    columns = shape.width
    return tuple(y[:, :, :columns] for y in results), tuple(inside[..., :columns] for inside in insides)
