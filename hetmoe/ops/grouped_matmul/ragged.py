"""Grouped products as `jax.lax.ragged_dot`: the blocks of one expert are one run of rows.

A mapped axis is folded into the rows, and into the experts where their weights differ: `ragged_dot` of jax 0.10 maps
over few combinations of its arguments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from hetmoe.ops.mapped_axis import element_numbers, fold_axis


def _precision(x: Array) -> jax.lax.Precision | None:
    """Float32 operands are otherwise cut to bfloat16 on TPU; for narrow ones its compiler takes the default only."""
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


@custom_vmap
def products(x: Array, w: Array, block_expert: Array, used: Array | None) -> Array:
    """As `grouped_matmul`."""
    sizes = _rows_per_expert(x, block_expert, w.shape[0])
    y = jax.lax.ragged_dot(
        _rows(x), w.astype(x.dtype), sizes, precision=_precision(x), preferred_element_type=jnp.float32
    )
    y = y.reshape(*x.shape[:2], -1)
    return y if used is None else jnp.where(used[:, None, None], y, 0)


@products.def_vmap
def _products_of_all(size: int, batched: Any, x: Array, w: Array, block_expert: Array, used: Array | None) -> Any:
    x_has, w_has, expert_has, used_has = batched
    blocks = block_expert.shape[-1]
    x, expert = fold_axis(size, x, x_has), fold_axis(size, block_expert, expert_has)
    used = None if used is None else fold_axis(size, used, used_has)
    if w_has:
        y = products(x, fold_axis(size, w, w_has), expert + element_numbers(size, blocks) * w.shape[1], used)
    else:  # the experts are every element's: their blocks together
        order = jnp.argsort(expert, stable=True)
        y = products(x[order], w, expert[order], None if used is None else used[order])[jnp.argsort(order)]
    return y.reshape(size, blocks, *y.shape[1:]), True


def weights_gradient(x: Array, grad: Array, block_expert: Array, experts: int) -> Array:
    """As `by_block.weights_gradient`."""

    @custom_vmap
    def of_all(x: Array, grad: Array, block_expert: Array) -> Array:
        over_rows = jax.lax.RaggedDotDimensionNumbers(
            dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
        )
        return jax.lax.ragged_dot_general(
            _rows(x), _rows(grad), _rows_per_expert(x, block_expert, experts), over_rows,
            precision=_precision(x), preferred_element_type=jnp.float32,
        )  # fmt: skip

    @of_all.def_vmap
    def _rule(size: int, batched: Any, x: Array, grad: Array, block_expert: Array) -> Any:
        x, grad, expert = (
            fold_axis(size, leaf, has) for leaf, has in zip((x, grad, block_expert), batched, strict=True)
        )
        expert += element_numbers(size, block_expert.shape[-1]) * experts
        dw = weights_gradient(x, grad, expert, size * experts)
        return dw.reshape(size, experts, *dw.shape[1:]), True

    return of_all(x, grad, block_expert)


def _rows(blocks: Array) -> Array:
    return blocks.reshape(-1, blocks.shape[2])


def _rows_per_expert(x: Array, block_expert: Array, experts: int) -> Array:
    return jnp.zeros((experts,), jnp.int32).at[block_expert].add(x.shape[1])
