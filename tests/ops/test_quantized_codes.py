"""Products with the codes of packed weights, interpreted, against float64 products with exact weights.

What is common to all kernels for packed weights is compared in `test_quantized_kernels.py`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.ops.grouped_crossbar.block_sizes import BlockSizes
from hetmoe.ops.grouped_quantized import triton_codes
from hetmoe.ops.grouped_quantized.block_sizes import choose_for_codes
from hetmoe.ops.grouped_quantized.pallas import packed_products
from hetmoe.ops.grouped_quantized.shape import Operand, Static
from hetmoe.quantize.grid import BITS, GROUPS, Grid
from hetmoe.quantize.packed import PLANES, Packed
from tests.ops import test_quantized_kernels as of_packed
from tests.ops.crossbar_battery import sum_error
from tests.ops.test_quantized_kernels import OWN, SLOT, case, exact_weights

_products = jax.jit(packed_products, static_argnums=2)


def operand(packed: Packed, own: Any = OWN, slot: Any = SLOT) -> Operand:
    return Operand(own=jnp.asarray(own), slot=jnp.asarray(slot), packed=packed)


def assert_is_exact(y: Any, x: jax.Array, packed: Packed, own: Any = OWN, slot: Any = SLOT) -> None:
    """As far as float32 sums are: no weight is rounded."""
    grid, w = packed.grid, exact_weights(packed)[slot]
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    # Codes are summed with the power above them, and that and the zero times the sum of the inputs are taken off.
    above = sum(2.0**number.power for number in triton_codes.NUMBERS[grid.bits]) + 2 * grid.largest
    steps = np.repeat(np.asarray(packed.scale, np.float64)[slot], grid.group, axis=1)
    limit = sum_error(x.shape[2]) * (np.abs(wide) @ (np.abs(w) + above * steps))
    used = np.asarray(own)[:, None, None]
    assert y.shape == limit.shape and y.dtype == jnp.float32
    wrong = ~(np.abs(np.asarray(y) - np.where(used, wide @ w, 0)) <= np.where(used, limit, 0))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements differ"


def check(
    name: str, bits: int, group: int, columns: int, sizes: BlockSizes | None = None, *, symmetric: bool = False
) -> None:
    x, packed = case(bits, group, 4 * group, columns, symmetric=symmetric, dtype=jnp.bfloat16)
    assert triton_codes.serves(x, packed)
    (y,) = _products(x, (operand(packed),), Static(interpret=of_packed.platform(name), sizes=sizes))
    assert_is_exact(y, x, packed)


# Of every number of planes and of pieces of a code, several groups at a time or one, columns that fill stripes or not.
SIZES = [
    (4, 64, 128, None, False), (4, 32, 72, BlockSizes(columns=32, chunk=32, warps=4, stages=3), True),
    (2, 64, 40, None, True), (2, 128, 136, BlockSizes(columns=128, chunk=64, warps=4, stages=3), False),
    (3, 64, 40, None, False), (3, 128, 264, BlockSizes(columns=256, chunk=32, warps=4, stages=4), True),
    (8, 32, 24, None, False), (8, 64, 256, BlockSizes(columns=256, chunk=64, warps=4, stages=3), True),
    (1, 128, 64, None, False),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "group", "columns", "sizes", "symmetric"), SIZES)
@pytest.mark.parametrize("name", ["interpret_cuda"])
def test_codes(name: str, bits: int, group: int, columns: int, sizes: BlockSizes | None, *, symmetric: bool) -> None:
    check(name, bits, group, columns, sizes, symmetric=symmetric)


@pytest.mark.parametrize("name", ["interpret_cuda"])
def test_operands_of_one_call_each_have_their_own_blocks(name: str) -> None:
    x, first = case(4, 64, 128, 40, symmetric=False, dtype=jnp.bfloat16)
    own, slot = ~OWN, (SLOT + 1) % 3
    second = jax.tree.map(lambda leaf: jnp.roll(leaf, 1, axis=2), first)
    found = _products(x, (operand(first), operand(second, own, slot)), Static(interpret=of_packed.platform(name)))
    assert_is_exact(found[0], x, first)
    assert_is_exact(found[1], x, second, own, slot)


def test_sizes_are_whole_groups_and_whole_chunks() -> None:
    for bits in BITS:
        for group, rows, columns, programs in ((g, r, c, p) for g in GROUPS for r in (128, 1408, 7168)
                                               for c in (24, 1024, 1408) for p in (1, 16, 160)):  # fmt: skip
            grid, held = Grid(bits=bits, group=group, symmetric=True), group * PLANES[bits][0] // 8
            sizes = choose_for_codes(grid, rows, columns, programs)
            assert sizes.chunk % held == 0 and rows * PLANES[bits][0] // 8 % sizes.chunk == 0
            assert sizes.columns >= 2 * triton_codes.LEAST_ROWS


def of_next_bit(words: Any, fields: Any, power: int, *, interpret: bool) -> Any:
    return ORIGINAL["codes"]([word >> 1 for word in words], fields, power, interpret=interpret)


ORIGINAL = {"codes": triton_codes.bfloat16_codes, "pair": triton_codes.float32_pair}
BREAKS: dict[str, tuple[str, Any]] = {
    "bits": ("bfloat16_codes", of_next_bit),
    "columns": ("float32_pair", lambda words, *, interpret: ORIGINAL["pair"](words, interpret=interpret)[::-1]),
    "powers": ("NUMBERS", triton_codes.NUMBERS | {3: (triton_codes.NUMBERS[3][0]._replace(power=4),)}),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_a_perturbed_kernel_fails(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_codes, *BREAKS[broken])
    jax.clear_caches()
    with pytest.raises(AssertionError, match="elements differ"):
        check("interpret_cuda", 3, 64, 32)
    monkeypatch.undo()
    jax.clear_caches()
