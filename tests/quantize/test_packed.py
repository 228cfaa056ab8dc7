"""Packing loses nothing, wastes nothing, and lays bits where the documentation says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.grid import BITS, GROUPS, Grid, Quantized, dequantize
from hetmoe.quantize.packed import Packed, dequantize_packed, pack, packed_bytes, take_packed, unpack

LEAD, COLUMNS = (2, 3), 5


def quantized(grid: Grid, rows: int = 128) -> Quantized:
    rng = np.random.default_rng(grid.bits * 1000 + grid.group)
    groups = (*LEAD, rows // grid.group, COLUMNS)
    return Quantized(
        codes=jnp.asarray(rng.integers(0, grid.largest + 1, (*LEAD, rows, COLUMNS)), jnp.uint8),
        scale=jnp.asarray(rng.uniform(0.01, 0.1, groups), jnp.float16),
        zero=None if grid.symmetric else jnp.asarray(rng.uniform(0, grid.largest, groups), jnp.float16),
        grid=grid,
    )


GRIDS = [Grid(bits=b, group=g, symmetric=s) for b in BITS for g in GROUPS for s in (False, True)]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_come_back_from_as_many_bytes_as_promised(grid: Grid) -> None:
    given = quantized(grid, 256)
    packed = jax.jit(pack)(given)
    found = jax.jit(unpack)(packed)
    np.testing.assert_array_equal(found.codes, given.codes)
    assert found.grid == grid and found.codes.dtype == jnp.uint8
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(packed))
    assert stored == 6 * packed_bytes(256, COLUMNS, grid)
    assert stored * 8 == 6 * 256 * COLUMNS * grid.bits_per_weight
    assert packed.shape == (*LEAD, 256, COLUMNS)
    np.testing.assert_array_equal(dequantize_packed(packed), dequantize(given))


def test_values_are_code_minus_zero_steps() -> None:
    """(code - zero) * scale in float64: exact in float32 here, where all are small dyadic numbers."""
    codes = np.arange(32 * 2).reshape(1, 32, 2) % 8
    scale, zero = np.array([[[0.5, 0.25]]]), np.array([[[3.0, 1.5]]])
    wanted = (codes - zero) * scale
    for symmetric, z in ((False, jnp.asarray(zero, jnp.float16)), (True, None)):
        q = Quantized(
            codes=jnp.asarray(codes, jnp.uint8), scale=jnp.asarray(scale, jnp.float16), zero=z,
            grid=Grid(bits=3, group=32, symmetric=symmetric),
        )  # fmt: skip
        np.testing.assert_array_equal(dequantize(q), (codes - 3.5) * scale if symmetric else wanted)


@pytest.mark.parametrize(("bits", "step"), [(1, 4), (2, 8), (4, 16), (8, 32)])
def test_a_byte_holds_rows_that_are_a_share_of_the_group_apart(bits: int, step: int) -> None:
    """By plain Python: code of row r of a group of 32 in byte r mod step, from bit bits * (r div step)."""
    grid = Grid(bits=bits, group=32, symmetric=True)
    given = quantized(grid, 64)
    (plane,) = pack(given).planes
    codes, wanted = np.asarray(given.codes), np.zeros((*LEAD, 64 * bits // 8, COLUMNS), np.uint8)
    for row in range(64):
        group, r = divmod(row, 32)
        wanted[:, :, group * step + r % step] |= codes[:, :, row] << (bits * (r // step))
    np.testing.assert_array_equal(plane, wanted)


def test_three_bits_are_two_and_one() -> None:
    given = quantized(Grid(bits=3, group=32, symmetric=True), 64)
    low, high = pack(given).planes
    two = pack(given.replace(codes=given.codes & 3, grid=Grid(bits=2, group=32, symmetric=True)))
    one = pack(given.replace(codes=given.codes >> 2, grid=Grid(bits=1, group=32, symmetric=True)))
    np.testing.assert_array_equal(low, two.planes[0])
    np.testing.assert_array_equal(high, one.planes[0])


def test_one_of_many() -> None:
    packed = pack(quantized(Grid(bits=3, group=64, symmetric=False)))
    one: Packed = jax.jit(lambda p, i: take_packed(take_packed(p, i), i))(packed, 1)
    np.testing.assert_array_equal(dequantize_packed(one), dequantize_packed(packed)[1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5 must be one of 1, 2, 3, 4, 8"),
        ({"group": 16}, "group=16 must be one of 32, 64, 128"),
    ],
)
def test_bad_grids(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Grid(**({"bits": 4, "group": 32, "symmetric": True} | options))


def test_groups_must_divide() -> None:
    grid = Grid(bits=4, group=128, symmetric=True)
    with pytest.raises(InputError, match="group=128 does not divide the 1376 rows of a matrix; these do: 32"):
        packed_bytes(1376, 4, grid)
    with pytest.raises(InputError, match="these do: none of 32, 64, 128"):
        grid.groups_of(48)
