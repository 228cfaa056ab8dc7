"""Kernels for packed weights, interpreted, against float64 products with weights unpacked by their definition."""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import ProgrammedMatrix
from hetmoe.analog.spec import analog_spec
from hetmoe.analog.tiles import block_max
from hetmoe.ops.grouped_crossbar.api import digital_products, expert_products
from hetmoe.ops.grouped_crossbar.block_sizes import BlockSizes
from hetmoe.ops.grouped_quantized import kernel_math, pallas, pallas_tpu
from hetmoe.ops.grouped_quantized.block_sizes import choose
from hetmoe.ops.grouped_quantized.pallas import packed_blocks
from hetmoe.ops.grouped_quantized.shape import Static
from hetmoe.quantize.grid import BITS, GROUPS, Grid
from hetmoe.quantize.mixed import MixedMatrix, Places
from hetmoe.quantize.packed import PLANES, Packed, pack
from tests.ops.crossbar_battery import KERNELS, sum_error
from tests.quantize.random_quantized import random_mixed, random_quantized

BLOCK = 16
OWN = np.array([False, True, True, False, True, False])
SLOT = np.array([0, 0, 0, 0, 2, 1])  # two blocks of one matrix, none of matrix 1


ROUNDING = {"float32": 0.0, "bfloat16": 2.0**-9, "float16": 2.0**-11}  # to the dtype, relative


def platform(name: str) -> Any:
    return name.removeprefix("interpret_")


def exact_weights(packed: Packed) -> np.ndarray:
    """In float64, row by row."""
    grid, (stored, rows, columns) = packed.grid, packed.shape
    found = np.zeros((stored, rows, columns))
    for row in range(rows):
        group, within = divmod(row, grid.group)
        codes, place = np.zeros((stored, columns), np.int64), 0
        for bits, plane in zip(PLANES[grid.bits], packed.planes, strict=True):
            part, byte = divmod(within, grid.group * bits // 8)
            stored_bytes = np.asarray(plane, np.int64)[:, group * grid.group * bits // 8 + byte]
            codes += (stored_bytes // 2 ** (bits * part) % 2**bits) * 2**place
            place += bits
        zero = grid.largest / 2 if packed.zero is None else np.asarray(packed.zero, np.float64)[:, group]
        found[:, row] = (codes - zero) * np.asarray(packed.scale, np.float64)[:, group]
    return found


def case(bits: int, group: int, rows: int, columns: int, *, symmetric: bool, dtype: Any) -> tuple[jax.Array, Packed]:
    rng = np.random.default_rng([bits, group, rows, columns])
    packed = pack(random_quantized(rng, Grid(bits=bits, group=group, symmetric=symmetric), 3, rows, columns))
    return jnp.asarray(rng.standard_normal((len(OWN), BLOCK, rows)), dtype), packed


def assert_is_product(y: Any, x: Any, w: np.ndarray, used: np.ndarray) -> None:
    """Every block of `y` is that of `x` times the matrix of the same number in `w`, or zero where not used."""
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    # A weight is rounded twice in float32, and once to the dtype of the rows; products are summed in float32.
    rounding = 2.0**-23 + ROUNDING[x.dtype.name]
    limit = (sum_error(x.shape[2]) + rounding) * (np.abs(wide) @ np.abs(w))
    wanted = np.where(used[:, None, None], wide @ w, 0)
    assert y.shape == wanted.shape and y.dtype == jnp.float32
    wrong = ~(np.abs(np.asarray(y) - wanted) <= np.where(used[:, None, None], limit, 0))
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} elements differ"


_blocks = jax.jit(packed_blocks, static_argnums=4)


def check(name: str, bits: int, group: int, rows: int, columns: int, *, symmetric: bool, dtype: Any) -> None:
    x, packed = case(bits, group, rows, columns, symmetric=symmetric, dtype=dtype)
    y = _blocks(x, jnp.asarray(OWN), jnp.asarray(SLOT), packed, Static(interpret=platform(name)))
    assert_is_product(y, x, exact_weights(packed)[SLOT], OWN)


# One or several groups, in one chunk of the kernels or not, and columns that fill stripes or not.
CASES = [
    ("interpret_cuda", 1, 32, 96, 40, False, jnp.float32), ("interpret_tpu", 1, 128, 128, 24, True, jnp.bfloat16),
    ("interpret_tpu", 2, 64, 192, 130, False, jnp.float32), ("interpret_cuda", 2, 32, 64, 48, True, jnp.bfloat16),
    ("interpret_cuda", 3, 32, 96, 24, False, jnp.float32), ("interpret_tpu", 3, 128, 256, 40, True, jnp.bfloat16),
    ("interpret_tpu", 4, 64, 64, 136, True, jnp.float32), ("interpret_cuda", 4, 128, 384, 24, False, jnp.bfloat16),
    ("interpret_cuda", 8, 32, 32, 24, False, jnp.bfloat16), ("interpret_tpu", 8, 128, 128, 72, True, jnp.float32),
]  # fmt: skip
# Compiling a kernel takes seconds: the other half of the cases is slow, and what both kernels share is tried on one.
OTHERS = [(name, *given) for name in KERNELS for first, *given in CASES if name != first]
SHARED = [pytest.param("interpret_tpu", marks=pytest.mark.slow), "interpret_cuda"]


@pytest.mark.parametrize(
    ("name", "bits", "group", "rows", "columns", "symmetric", "dtype"),
    [*CASES, *(pytest.param(*given, marks=pytest.mark.slow) for given in OTHERS)],
)
def test_products(name: str, bits: int, group: int, rows: int, columns: int, symmetric: bool, dtype: Any) -> None:
    check(name, bits, group, rows, columns, symmetric=symmetric, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), list(itertools.product(BITS, GROUPS)))
@pytest.mark.parametrize("name", KERNELS)
def test_products_on_every_grid(name: str, bits: int, group: int) -> None:
    # Weights of symmetric grids are at least half a step, which float16 holds as a normal number.
    for dtype, symmetric in ((jnp.float32, False), (jnp.float16 if group == 64 else jnp.bfloat16, True)):
        check(name, bits, group, 3 * group, 40, symmetric=symmetric, dtype=dtype)


SIZES = {
    "interpret_tpu": BlockSizes(columns=16, chunk=64),
    "interpret_cuda": BlockSizes(columns=16, chunk=32, warps=4, stages=2),
}


@pytest.mark.parametrize("name", KERNELS)
def test_stripes_of_columns_tiles_and_groups_of_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of each, the last stripe half full; a matrix that later blocks share after others were skipped."""
    x, packed = case(4, 32, 384, 40, symmetric=False, dtype=jnp.float32)
    monkeypatch.setattr("hetmoe.ops.grouped_crossbar.pallas_tpu.SUM_BYTES", 3 * BLOCK * 16 * 4)
    for own, slot in (
        ([0, 1, 1, 0, 1, 0], [2, 0, 0, 1, 2, 1]),
        ([1, 0, 1, 0, 0, 0], [1, 0, 1, 2, 2, 2]),
        ([0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]),
    ):
        used = np.array(own, bool)
        static = Static(interpret=platform(name), sizes=SIZES[name])
        y = _blocks(x, jnp.asarray(used), jnp.asarray(slot), packed, static)
        assert_is_product(y, x, exact_weights(packed)[slot], used)


def test_blocks_rest_where_their_neighbours_work() -> None:
    """In groups of three: what is fetched, and unpacked anew, is what blocks with work need."""
    own, slot = jnp.array([0, 1, 1, 0, 0, 0, 1, 0, 1]), jnp.array([5, 7, 7, 7, 8, 9, 7, 5, 8])
    steps = pallas_tpu.make_steps(own, slot, 3)
    other, same, new = pallas_tpu.OTHER, pallas_tpu.SAME, pallas_tpu.NEW
    assert steps.action.tolist() == [other, new, same, other, other, other, new, other, new]
    assert steps.slot.tolist() == [7, 7, 7, -1, -1, -1, 7, 7, 8]
    assert steps.rows.tolist() == [1, 1, 2, 3, 3, 3, 6, 6, 8]


def test_float16_from_its_bits() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    found = np.asarray(jax.jit(kernel_math.float16_value)(bits.astype(np.int16).astype(np.int32)))
    wanted = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found)[~np.isnan(wanted)], np.signbit(wanted)[~np.isnan(wanted)])


@pytest.mark.parametrize("name", SHARED)
def test_bad_steps_stay_with_their_matrix(name: str) -> None:
    x, packed = case(3, 32, 96, 24, symmetric=False, dtype=jnp.float32)
    bad = packed.replace(scale=packed.scale.at[0, 1, 3].set(jnp.nan))
    y = np.asarray(_blocks(x, jnp.asarray(OWN), jnp.asarray(SLOT), bad, Static(interpret=platform(name))))
    assert np.isnan(y).any(axis=1).tolist() == [
        [bool(own and slot == 0 and n == 3) for n in range(24)] for own, slot in zip(OWN, SLOT, strict=True)
    ]


POOL = np.array([0, 3, 1, 2, 0])
EXPERT = np.array([0, 0, 1, 2, 3, 4])  # of the blocks
USED = np.array([True, True, True, True, True, False])


@functools.partial(jax.jit, static_argnames="name")
def _digital(x: Any, matrices: Any, expert: Any, name: str) -> tuple[jax.Array, ...]:
    return digital_products(x, matrices, block_expert=expert, used=jnp.asarray(USED), implementation=name)


def rows(width: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(9).standard_normal((len(EXPERT), BLOCK, width)), dtype)


@pytest.mark.parametrize("name", SHARED)
def test_every_block_meets_the_weights_of_its_expert(name: str) -> None:
    """Experts at four precisions, one of them that of no quantization; two matrices placed differently."""
    (first, exact), (second, other) = random_mixed(0, POOL, 64, 40), random_mixed(1, np.zeros_like(POOL), 64, 40)
    x = rows(64, jnp.bfloat16)
    found = _digital(x, (first, second), jnp.asarray(EXPERT), name)
    for y, w in zip(found, (exact, other), strict=True):
        assert_is_product(y, x, w[EXPERT], USED)


@pytest.mark.parametrize("name", SHARED)
def test_analog_experts_beside_quantized_ones(name: str) -> None:
    """The kernels' converters are compared elsewhere; here every block gets the half that it should, or NaN."""
    matrix, exact = random_mixed(0, np.array([3, 0, 3, 0, 3]), 64, 40)
    spec = analog_spec(dac_bits=None, adc_bits=None, tile_rows=32)
    noisy = np.random.default_rng(4).standard_normal((3, 64, 40)).astype(np.float32)  # of experts 0, 2 and 4
    slot = np.array([0, 2, 1, 2, 2])
    places = Places(pool=jnp.zeros(5, jnp.int32), slot=jnp.asarray(slot, jnp.int32))
    side = ProgrammedMatrix(
        w=MixedMatrix(pools=(jnp.asarray(noisy),), places=places),
        weight_max=block_max(jnp.asarray(noisy), 32, per_column=False)[slot],
    )
    analog = np.array([True, False, False, True, True])

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, ...]:
        return expert_products(
            x, (matrix,), (side,), block_expert=jnp.asarray(EXPERT), used=jnp.ones(len(EXPERT), bool),
            analog=jnp.asarray(analog), input_range=None, spec=spec, read=(None,), implementation=name,
        )  # fmt: skip

    x = rows(64)
    (y,) = run(x)
    is_wrong = EXPERT == 3  # quantized, and on a crossbar
    assert np.isnan(y[is_wrong]).all()
    w = np.where(analog[:, None, None], noisy[slot], exact)[EXPERT]
    assert_is_product(jnp.where(is_wrong[:, None, None], 0, y), x, w, ~is_wrong)


@pytest.mark.parametrize("name", SHARED)
def test_gradient_and_mapped_axes(name: str) -> None:
    """Of the rows; over rows, over weights, and over which block meets which matrix."""
    x, packed = case(4, 32, 64, 24, symmetric=False, dtype=jnp.float32)
    own, slot, w = jnp.asarray(OWN), jnp.asarray(SLOT), exact_weights(packed)
    static, back = Static(interpret=platform(name)), np.random.default_rng(1).standard_normal((6, BLOCK, 24))
    cotangent = jnp.asarray(back, jnp.float32)

    def pull(x: Any, cotangent: Any) -> jax.Array:
        return jax.vjp(lambda x: packed_blocks(x, own, slot, packed, static), x)[1](cotangent)[0]

    dx = jax.jit(jax.vmap(pull))(jnp.stack([x, x]), jnp.stack([cotangent, 2 * cotangent]))
    assert_is_product(dx[0], cotangent, w[SLOT].swapaxes(1, 2), OWN)
    np.testing.assert_array_equal(dx[1], 2 * dx[0])

    others = jnp.asarray([[2, 1, 1, 0, 0, 0], SLOT])
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf[::-1]]), packed)
    run = jax.vmap(functools.partial(packed_blocks, static=static), in_axes=(None, None, 0, None))
    shared = jax.jit(run)(x, own, others, packed)
    apart = jax.jit(jax.vmap(functools.partial(packed_blocks, static=static), in_axes=(None, None, None, 0)))(
        x, own, slot, both
    )
    for y, weights in ((shared[0], w[others[0]]), (shared[1], w[SLOT]), (apart[0], w[SLOT]), (apart[1], w[::-1][SLOT])):
        assert_is_product(y, x, weights, OWN)


def test_sizes_are_what_the_platforms_want() -> None:
    """Tiles of whole lanes where the rows allow it; a part of a group only where it has one plane."""
    for bits, group, rows_, columns in itertools.product(BITS, GROUPS, (32, 128, 1024, 1408, 2048, 7168), (24, 1024)):
        if rows_ % group:
            continue
        grid, shifts = Grid(bits=bits, group=group, symmetric=True), 8 // PLANES[bits][0]
        tpu = choose("tpu", grid=grid, rows=rows_, columns=columns, block=16)
        length = rows_ // shifts
        assert length % tpu.chunk == 0 and (tpu.chunk == length or tpu.chunk % 128 == 0)
        assert tpu.chunk % (group // shifts) == 0 and tpu.columns % 128 == 0
        cuda = choose("cuda", grid=grid, rows=rows_, columns=columns, block=128)
        assert (
            cuda.chunk >= 16 and cuda.columns >= 16 and (len(PLANES[bits]) == 1 or cuda.chunk % (group // shifts) == 0)
        )
    with pytest.raises(NotImplementedError, match=r"packed matrices of 8224 rows .* a multiple of 128 rows can"):
        choose("tpu", grid=Grid(bits=8, group=32, symmetric=True), rows=8224, columns=64, block=16)


def of_next_position(planes: Any, position: int, shape: Any, original: Any = kernel_math.unpack) -> jax.Array:
    return original(planes, (position + 1) % shape.shifts, shape)


def without_upper_plane(planes: Any, position: int, shape: Any, original: Any = kernel_math.unpack) -> jax.Array:
    return original(planes, position, shape) & 3


def without_zero(
    codes: Any, scale: Any, zero: Any, shape: Any, dtype: Any, original: Any = kernel_math.dequantize
) -> jax.Array:
    del zero
    return original(codes, scale, None, shape, dtype)


def of_next_group(values: Any, shape: Any, original: Any = kernel_math.per_row) -> jax.Array:
    return original(jnp.flip(values, axis=0), shape)


def in_order(x: Any, shape: Any, original: Any = pallas.arrange_rows) -> jax.Array:
    return jnp.resize(x, original(x, shape).shape)


def never_again(own: Any, slot: Any, group: int, original: Any = pallas_tpu.make_steps) -> Any:
    """Only a group's first block unpacks."""
    steps = original(own, slot, group)
    is_first = jnp.cumsum(steps.action == pallas_tpu.NEW) == 1
    return steps.replace(action=jnp.where(is_first, steps.action, jnp.minimum(steps.action, pallas_tpu.SAME)))


BREAKS: dict[str, tuple[Any, str, Any]] = {
    "position": (kernel_math, "unpack", of_next_position),
    "upper_plane": (kernel_math, "unpack", without_upper_plane),
    "zero": (kernel_math, "dequantize", without_zero),
    "group": (kernel_math, "per_row", of_next_group),
    "order_of_rows": (pallas, "arrange_rows", in_order),
    "kept_weights": (pallas_tpu, "make_steps", never_again),
}


@pytest.fixture
def uncached() -> Iterator[None]:
    """Compiles anew what a test changes, and again behind it."""
    jax.clear_caches()
    yield
    jax.clear_caches()


# All but the last change what both kernels share, and are tried on the one that compiles faster.
@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize("broken", BREAKS)
def test_a_perturbed_kernel_fails(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*BREAKS[broken])
    name = "interpret_tpu" if broken == "kept_weights" else "interpret_cuda"
    with pytest.raises(AssertionError, match="elements differ"):
        check(name, 3, 32, 64, 16, symmetric=False, dtype=jnp.float32)
