"""Round-to-nearest: the nearest of all levels, within half a step, for every grid and any weights."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from hetmoe.errors import InputError
from hetmoe.quantize.grid import Grid, dequantize
from hetmoe.quantize.rtn import round_to_nearest
from tests.quantize.grids import ALL_GRIDS, grid_name, heavy_tailed, slack, steps_and_zeros, values_of

SHAPE = (128, 6)  # one for most tests: each grid is compiled for it once
TINIEST = 2.0**-126  # float32's smallest normal number: what is below may count as 0


def required_step(group, grid):
    """The smallest step that keeps a group within half a step of some level, by trying every zero; float64."""
    low, high = min(group.min(), 0.0), max(group.max(), 0.0)
    zeros = [(2**grid.bits - 1) / 2] if grid.symmetric else range(2**grid.bits)
    return min(max(-low / (zero + 0.5), high / (2**grid.bits - zero - 0.5)) for zero in zeros)


def check_bound(w, quantized):
    step, _ = steps_and_zeros(quantized)
    error = np.abs(np.asarray(w, np.float64) - np.asarray(dequantize(quantized), np.float64))
    assert (error <= step * (0.5 + slack(quantized.grid)) + TINIEST).all()


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_name)
def test_every_weight_gets_the_nearest_of_all_levels(grid):
    w = heavy_tailed(grid.bits, *SHAPE)
    quantized = round_to_nearest(jnp.asarray(w), grid)
    step, zero = steps_and_zeros(quantized)
    levels = (np.arange(2**grid.bits) - zero[..., None]) * step[..., None]
    distance = np.abs(w.astype(np.float64)[..., None] - levels)
    codes = np.asarray(quantized.codes)
    chosen = np.take_along_axis(distance, codes[..., None].astype(int), axis=-1)[..., 0]
    assert (chosen <= distance.min(axis=-1) + slack(grid) * step).all()
    clear = np.abs(np.diff(np.sort(distance, axis=-1)[..., :2], axis=-1)[..., 0]) > 2 * slack(grid) * step
    np.testing.assert_array_equal(codes[clear], distance.argmin(axis=-1)[clear])
    assert clear.mean() > 0.99
    np.testing.assert_allclose(np.asarray(dequantize(quantized)), values_of(quantized), rtol=2.0**-24, atol=0)
    check_bound(w, quantized)


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_name)
def test_the_step_is_the_smallest_that_covers_rounded_up(grid):
    w = heavy_tailed(7, *SHAPE)
    w[:, 1], w[:, 2], w[:, 3], w[:, 4] = np.abs(w[:, 1]), -np.abs(w[:, 2]), 0.01, -0.01
    quantized = round_to_nearest(jnp.asarray(w), grid)
    scale = np.asarray(quantized.scale)
    groups = w.astype(np.float64).reshape(-1, grid.group, SHAPE[1])
    for index in np.ndindex(scale.shape):
        needed = required_step(groups[index[0], :, index[1]], grid)
        stored, below = scale[index], np.nextafter(scale[index], np.float16(0))
        assert needed * (1 - 2.0**-22) <= stored and below < needed * (1 + 2.0**-22)
    if quantized.zero is not None:
        zero = np.asarray(quantized.zero, np.float64)
        assert (zero == np.round(zero)).all() and zero.min() >= 0 and zero.max() <= grid.largest


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(ALL_GRIDS),
    st.integers(-40, 13),
    st.sampled_from(["both", "above", "below", "outlier", "offset", "few values", "ties"]),
)
def test_no_weight_moves_by_more_than_half_a_step(seed, grid, exponent, kind):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=SHAPE)
    w = {
        "both": w,
        "above": np.abs(w),
        "below": -np.abs(w),
        "outlier": np.where(np.arange(len(w))[:, None] == rng.integers(len(w)), 1000 * w, w),
        "offset": w + 100,
        "few values": rng.choice([-1.0, 0.0, 0.5, 1.0], size=w.shape),
        "ties": rng.integers(-(2**grid.bits), 2**grid.bits, size=w.shape) / 2,  # multiples of half a step
    }[kind]
    w = (w / np.abs(w).max() * 2.0**exponent).astype(np.float32)
    check_bound(w, round_to_nearest(jnp.asarray(w), grid))


@pytest.mark.parametrize("grid", ALL_GRIDS, ids=grid_name)
def test_groups_of_zeros_stay_zero_beside_others(grid):
    w = heavy_tailed(1, *SHAPE)
    w[: grid.group, 1] = 0
    w[-1] = 0
    quantized = round_to_nearest(jnp.asarray(w), grid)
    values = np.asarray(dequantize(quantized))
    assert (values[: grid.group, 1] == 0).all() and np.asarray(quantized.scale)[0, 1] == 0
    if not grid.symmetric:
        assert (values[-1] == 0).all()
    check_bound(w, quantized)


@pytest.mark.parametrize("grid", [Grid(bits=b, group=32, symmetric=s) for b in (1, 8) for s in (True, False)])
def test_steps_at_the_ends_of_float16(grid):
    """Column by column: subnormal steps, steps below the smallest subnormal one, and the largest weights."""
    sizes = np.array([2.0**-15, 1e-6, 1e-8, 1e-20, 1e-44, 32752.0], np.float32)
    w = np.random.default_rng(0).uniform(-1, 1, (32, len(sizes))).astype(np.float32)
    w[::32], w[1::32] = 1, -1
    w *= sizes
    quantized = round_to_nearest(jnp.asarray(w), grid)
    assert np.isfinite(np.asarray(quantized.scale)).all()
    check_bound(w, quantized)
    for column, size in enumerate(sizes[:3]):
        multiple = np.ceil(required_step(w[:32, column].astype(np.float64), grid) / 2.0**-24)
        # Subnormal float16 numbers are multiples of 2**-24, normal ones below 2**-13 too.
        assert np.asarray(quantized.scale, np.float64)[0, column] == multiple * 2.0**-24, size


def test_narrow_stacks_are_quantized_as_the_numbers_they_hold():
    w = jnp.asarray(heavy_tailed(2, 2, 1, 64, 4)).astype(jnp.bfloat16)
    grid = Grid(bits=3, group=64, symmetric=False)
    quantized = round_to_nearest(w, grid)
    wide = round_to_nearest(w.astype(jnp.float32), grid)
    jax.tree.map(np.testing.assert_array_equal, quantized, wide)
    assert quantized.scale.shape == quantized.zero.shape == (2, 1, 1, 4) and quantized.codes.dtype == jnp.uint8
    traced = jax.jit(lambda w: round_to_nearest(w, grid))(w)
    jax.tree.map(np.testing.assert_array_equal, quantized, traced)
    alone = round_to_nearest(w[1, 0], grid)
    jax.tree.map(lambda one, all_: np.testing.assert_array_equal(one, all_[1, 0]), alone, quantized)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 33000.0])
def test_weights_that_are_no_numbers_or_too_large_are_refused_by_name(bad):
    w = heavy_tailed(3, 2, 64, 4)
    w[1, 5, 2] = bad
    with pytest.raises(InputError, match=r"layer 3 gate has 1 weights that are NaN.*first at \[1, 5, 2\]"):
        round_to_nearest(jnp.asarray(w), Grid(bits=2, group=32, symmetric=True), name="layer 3 gate")


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (jnp.zeros((96, 4)), r"gate: group=64 does not divide the 96 rows of a matrix; these do: 32"),
        (jnp.zeros((20, 4)), r"gate: .* none of 32, 64, 128"),
        (jnp.zeros((64, 4), jnp.int32), r"gate is int32\[64, 4\]: weights must be floats"),
        (jnp.zeros((64,)), r"gate is float32\[64\]: weights must be"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(w, message):
    from hetmoe.quantize.steps import check_weights

    with pytest.raises(InputError, match=message):
        check_weights(w, Grid(bits=2, group=64, symmetric=True), "gate")
