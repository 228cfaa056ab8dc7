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
from jax.core import ShapedArray
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jaxtyping import Array, Float

from hetmoe.analog.devices import Device
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar import block_sizes, pallas_tpu, pallas_triton
from hetmoe.ops.grouped_crossbar.block_sizes import BlockSizes, Platform
from hetmoe.ops.grouped_crossbar.blocks import Matrix, Tables, fold
from hetmoe.ops.grouped_crossbar.gradient import blocks_gradient
from hetmoe.ops.grouped_crossbar.packing import make_layout, pack_rows, pad_axis, round_up
from hetmoe.ops.grouped_crossbar.shape import Shape, weights_of

PLATFORMS: tuple[Platform, ...] = ("tpu", "cuda")
KERNELS = {"tpu": pallas_tpu.blocks_matmul, "cuda": pallas_triton.blocks_matmul}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static:
    """What a change of recompiles.

    Attributes:
        options: of the converters.
        device: noise model, where weights are programmed on the way.
        interpret: runs the kernel of that platform operation by operation, anywhere.
        sizes: of the kernel's blocks; None = `block_sizes.choose`.
    """

    options: CrossbarOptions
    device: Device | None
    interpret: Platform | None
    sizes: BlockSizes | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def crossbar_blocks(
    x: Float[Array, "blocks block K"], tables: Tables, matrices: tuple[Matrix, ...], static: Static
) -> tuple[Float[Array, "blocks block N"], ...]:
    """Products of every block of rows with its matrix of each of `matrices`; float32."""
    return _forward(static)(x, tables, matrices)


def _fwd(x: Array, tables: Tables, matrices: tuple[Matrix, ...], static: Static) -> tuple[Any, Any]:
    return _forward(static)(x, tables, matrices), (x, tables, matrices)


def _bwd(static: Static, residuals: Any, grads: tuple[Array, ...]) -> tuple[Array, None, tuple[Matrix, ...]]:
    x, tables, matrices = residuals
    dx, weights = blocks_gradient(x, tables, matrices, grads, static.options, static.device)
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
def _forward(static: Static) -> Callable[[Array, Tables, tuple[Matrix, ...]], tuple[Array, ...]]:
    @custom_vmap
    def run(x: Array, tables: Tables, matrices: tuple[Matrix, ...]) -> tuple[Array, ...]:
        if static.interpret is not None:
            return _on(static.interpret, static, x, tables, matrices)
        branches = {name: functools.partial(_on, name, static) for name in PLATFORMS}
        return jax.lax.platform_dependent(x, tables, matrices, **branches, default=_refuse)

    @run.def_vmap
    def _rule(size: int, batched: Any, x: Array, tables: Tables, matrices: tuple[Matrix, ...]) -> Any:
        x, tables, matrices = fold(size, batched, x, tables, matrices)
        if matrices[0].programmed is None and not any(jax.tree.leaves(batched[2][0].clean)):
            # Elements that share weights and program them in the kernel: side by side, so that they are read once.
            order = jnp.argsort(tables.clean, stable=True)
            results = run(x[order], jax.tree.map(lambda table: table[order], tables), matrices)
            results = tuple(y[jnp.argsort(order)] for y in results)
        else:
            results = run(x, tables, matrices)
        return tuple(y.reshape(size, -1, *y.shape[1:]) for y in results), tuple(True for _ in results)

    return run


def _refuse(x: Array, tables: Tables, matrices: tuple[Matrix, ...]) -> tuple[Array, ...]:
    """For platforms without a kernel: an operation that cannot be lowered."""
    del tables
    shapes = [(*x.shape[:2], weights_of(matrix).shape[2]) for matrix in matrices]
    return tuple(_refused.bind(x, shape=shape) for shape in shapes)


def _raise(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        "implementation='pallas' runs on TPU and NVIDIA GPU; on other devices use 'xla', or, to check the kernels, "
        "'interpret_tpu' or 'interpret_cuda'"
    )


_refused = Primitive("pallas_kernel_without_a_device")
_refused.def_abstract_eval(lambda _, *, shape: ShapedArray(shape, jnp.float32))
mlir.register_lowering(_refused, _raise)


def _on(
    platform: Platform, static: Static, x: Array, tables: Tables, matrices: tuple[Matrix, ...]
) -> tuple[Array, ...]:
    """Packs the operands as the platform's kernel wants them, and runs it."""
    w = weights_of(matrices[0])
    rows, columns = w.shape[1:]
    sizes = static.sizes or block_sizes.choose(
        platform, rows=x.shape[1], columns=columns, matrices=len(matrices), item_bytes=w.dtype.itemsize
    )
    layout = make_layout(rows, static.options.tile_rows, sizes.chunk)
    shape = Shape(layout=layout, options=static.options, device=static.device, width=columns, sizes=sizes)
    packed = round_up(columns, sizes.columns)

    def pack_weights(leaf: Array) -> Array:
        return pad_axis(pack_rows(leaf, layout, 1), packed, 2)

    def pack(matrix: Matrix) -> Matrix:
        wide = lambda leaf: leaf if leaf.shape[2] == 1 else pad_axis(leaf, packed, 2)  # noqa: E731
        clean = matrix.clean
        if clean is not None:
            group = (None, None) if clean.low is None or clean.high is None else (wide(clean.low), wide(clean.high))
            clean = dataclasses.replace(clean, w=pack_weights(clean.w), low=group[0], high=group[1])
        programmed = None if matrix.programmed is None else pack_weights(matrix.programmed)
        chip = dataclasses.replace(matrix.chip, weight_max=wide(matrix.chip.weight_max))
        return Matrix(clean=clean, programmed=programmed, chip=chip)

    packed_matrices = tuple(pack(matrix) for matrix in matrices)
    results = KERNELS[platform](
        pack_rows(x, layout, 2), tables, packed_matrices, shape, interpret=static.interpret is not None
    )
    return tuple(y[:, :, :columns] for y in results)
