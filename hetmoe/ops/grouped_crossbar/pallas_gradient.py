"""The gradient kernels as one operation: packing, choice by platform, mapped axes folded into blocks.

Ranges, bounds and programming noise count as constants; an input within its range (or at it) and an output within its
bound pass their gradient on.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Int

from hetmoe.ops.grouped_crossbar import pallas_tpu_backward, pallas_triton_backward
from hetmoe.ops.grouped_crossbar.block_sizes import Platform
from hetmoe.ops.grouped_crossbar.blocks import ANALOG, DIGITAL, EMPTY, Matrix, Tables, fold
from hetmoe.ops.grouped_crossbar.operand_packing import make_shape, pack_matrix
from hetmoe.ops.grouped_crossbar.packing import pack_rows, pad_axis, unpack_rows
from hetmoe.ops.grouped_crossbar.platforms import on_platform
from hetmoe.ops.grouped_crossbar.shape import Shape, Static
from hetmoe.ops.mapped_axis import element_numbers, fold_axis

KERNELS: dict[str, Any] = {"tpu": pallas_tpu_backward, "cuda": pallas_triton_backward}

# Of the clean and of the programmed weights of a matrix, where it has them.
OfWeights = tuple[Array | None, Array | None]
Slots = tuple[Int[Array, "blocks"], Int[Array, "blocks"]]


def kernel_gradient(
    x: Array,
    tables: Tables,
    matrices: tuple[Matrix, ...],
    grads: tuple[Array, ...],
    insides: tuple[Array | None, ...],
    static: Static,
) -> tuple[Array, tuple[OfWeights, ...]]:
    """Gradients of x, and of the clean and the programmed weights of each matrix, in their dtypes.

    `insides` are int8 `[blocks, tiles, block, N]` from the forward pass: which sums their ADCs did not clip.
    """
    counts = tuple(0 if w is None else w.shape[0] for w in _weights(matrices[0]))
    return _backward(static, counts)(x, tables, matrices, grads, insides, (tables.clean, tables.programmed))


def _weights(matrix: Matrix) -> OfWeights:
    return None if matrix.clean is None else matrix.clean.w, matrix.programmed


@functools.cache
def _backward(static: Static, counts: tuple[int, ...]) -> Callable[..., tuple[Array, tuple[OfWeights, ...]]]:
    """The operation for `counts` gradients of clean and of programmed weights, which blocks name by number."""

    @custom_vmap
    def run(
        x: Array,
        tables: Tables,
        matrices: tuple[Matrix, ...],
        grads: tuple[Array, ...],
        insides: tuple[Array | None, ...],
        slots: Slots,
    ) -> tuple[Array, tuple[OfWeights, ...]]:
        def out(leaf: Array, count: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype)

        of_weights = tuple(
            tuple(None if w is None else out(w, count) for w, count in zip(_weights(matrix), counts, strict=True))
            for matrix in matrices
        )
        outputs = (out(x, x.shape[0]), of_weights)
        kernels = functools.partial(_on, static=static, counts=counts)
        return on_platform(static.interpret, kernels, outputs, x, tables, matrices, grads, insides, slots)

    @run.def_vmap
    def _rule(
        size: int, batched: Any, x: Array, tables: Tables, matrices: tuple[Matrix, ...], grads: Any, insides: Any,
        slots: Slots,
    ) -> Any:  # fmt: skip
        join = functools.partial(fold_axis, size)
        element = element_numbers(size, tables.mode.shape[-1])
        # Also of a matrix that all elements share, each has a gradient of its own.
        own = tuple(
            join(slot, has) + element * count for slot, has, count in zip(slots, batched[5], counts, strict=True)
        )
        found = _backward(static, tuple(size * count for count in counts))(
            *fold(size, batched[:3], x, tables, matrices),
            *jax.tree.map(join, (grads, insides), tuple(batched[3:5])),
            own,
        )
        parts = jax.tree.map(lambda leaf: leaf.reshape(size, -1, *leaf.shape[1:]), found)
        return parts, jax.tree.map(lambda _: True, parts)

    return run


def _on(
    platform: Platform,
    x: Array,
    tables: Tables,
    matrices: tuple[Matrix, ...],
    grads: tuple[Array, ...],
    insides: tuple[Array | None, ...],
    slots: Slots,
    *,
    static: Static,
    counts: tuple[int, ...],
) -> tuple[Array, tuple[OfWeights, ...]]:
    """Packs the operands as the platform's kernels want them, and runs them."""
    shape, packed = make_shape(platform, static, x.shape[1], matrices)
    kernels, interpret = KERNELS[platform], static.interpret is not None
    rows = pack_rows(x, shape.layout, 2)
    outputs = tuple(pad_axis(g, packed, 2) for g in grads)
    passes = tuple(None if inside is None else pad_axis(inside, packed, 3) for inside in insides)
    packed_matrices = tuple(pack_matrix(matrix, shape, packed) for matrix in matrices)
    dx = kernels.inputs_gradient(rows, outputs, passes, tables, packed_matrices, shape, interpret=interpret)

    is_stored = matrices[0].programmed is not None
    found: list[tuple[Array | None, ...]] = []
    for which, (w, slot, count) in enumerate(zip(_weights(matrices[0]), slots, counts, strict=True)):
        if w is None:
            found.append(tuple(None for _ in matrices))
            continue
        own = dataclasses.replace(
            tables, mode=_adding(tables.mode, (DIGITAL, ANALOG)[which]) if is_stored else tables.mode
        )
        of_weights = kernels.weights_gradient(
            rows, outputs, passes, own, slot, count, shape, w.dtype, interpret=interpret
        )
        found.append(tuple(_unpack_weights(dw, shape) for dw in of_weights))
    return unpack_rows(dx, shape.layout, 2), tuple(zip(*found, strict=True))


def _adding(mode: Array, only: int) -> Array:
    """Blocks of another mode add nothing to these weights' gradient."""
    return jnp.where(mode == only, mode, EMPTY)


def _unpack_weights(dw: Array, shape: Shape) -> Array:
    """Without the padding of rows and columns."""
    return unpack_rows(dw[:, :, : shape.width], shape.layout, 1)
