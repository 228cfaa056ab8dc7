"""Rows in blocks that each go through one matrix: what the kernels work on, and how a mapped axis becomes more blocks.

A kernel sees no experts, seeds or plans, only tables with one entry per block: whether it is digital or analog, and
which stored matrix, maxima and draws it uses. A vmapped axis is folded into them, so that one call serves all seeds,
and a matrix that they share is stored, and read, once.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from hetmoe.ops.mapped_axis import element_numbers, fold_axis

EMPTY, DIGITAL, ANALOG = 0, 1, 2  # what a block is; the rows of an empty one are padding, its results zero


@struct.dataclass
class Tables:
    """One entry per block: what it is, indices into the arrays of `Matrix`, and its converters' magnitudes."""

    mode: Int[Array, "blocks"]
    clean: Int[Array, "blocks"]
    programmed: Int[Array, "blocks"]
    chip: Int[Array, "blocks"]
    input_range: Float[Array, "blocks tiles"] | None  # DAC ranges; None = dynamic
    adc_bound: Float[Array, "blocks"]  # lambda


@struct.dataclass
class Clean:
    """Weights as they are in a digital unit, and the range of the device's scale group where noise is drawn."""

    w: Float[Array, "clean K N"]
    low: Float[Array, "clean tiles columns"] | None  # columns: 1 or N
    high: Float[Array, "clean tiles columns"] | None


@struct.dataclass
class Noise:
    """What programs clean weights while they are multiplied; the draws are those of `hetmoe.analog.programming`."""

    words: UInt32[Array, "chip streams 2"]  # key of every stream, expert folded in
    scale: Float[Array, "chip"]  # c
    time_s: Float[Array, "chip"] | None  # None = programming noise only
    factor: Float[Array, "chip tiles"] | None  # of drift compensation; None = off


@struct.dataclass
class Chip:
    """What an analog block needs besides weights."""

    weight_max: Float[Array, "chip tiles columns"]  # max |w| as programmed; columns: 1 or N
    noise: Noise | None  # None: `Matrix.programmed` holds the noisy weights


@struct.dataclass
class Matrix:
    """One matrix for every expert, and for every seed where they differ.

    Analog blocks multiply by `programmed`, or by `clean` with `chip.noise`; digital ones by `clean`, which may be None
    if there are none, as `chip` may if no block is analog.
    """

    clean: Clean | None
    programmed: Float[Array, "programmed K N"] | None
    chip: Chip | None

    @property
    def noise(self) -> Noise | None:
        """What programs the weights on the way, if anything does."""
        return None if self.chip is None else self.chip.noise


def fold(
    size: int, batched: tuple[Any, Any, Any], x: Array, tables: Tables, matrices: tuple[Matrix, ...]
) -> tuple[Array, Tables, tuple[Matrix, ...]]:
    """Blocks of all elements of a mapped leading axis, one element after the other.

    Args:
        size: of the mapped axis.
        batched: which leaves of the other arguments have that axis, in their structure.
        x: rows `[blocks, block, K]`.
        tables: of the blocks.
        matrices: those that share `x`.
    """
    x_has, tables_has, matrices_has = batched

    join = functools.partial(fold_axis, size)
    blocks = tables.mode.shape[-1]
    element = element_numbers(size, blocks)
    joined: Tables = jax.tree.map(join, tables, tables_has)
    for name in ("clean", "programmed", "chip"):  # each an index of the tables and a part of every matrix
        part, has = ([getattr(m, name) for m in group] for group in (matrices, matrices_has))
        if not any(jax.tree.leaves(has)):
            continue  # shared by all elements
        first, first_has = jax.tree.leaves(part)[0], jax.tree.leaves(has)[0]
        stored = first.shape[1 if first_has else 0]
        joined = dataclasses.replace(joined, **{name: getattr(joined, name) + element * stored})
        whole = jax.tree.map(join, part, has)
        matrices = tuple(dataclasses.replace(m, **{name: w}) for m, w in zip(matrices, whole, strict=True))
    return join(x, x_has), joined, matrices
