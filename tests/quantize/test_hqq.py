"""Half-quadratic quantization against the published update in plain numpy, and what it may never do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.grid import Grid, dequantize
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.rtn import round_to_nearest
from tests.quantize.grids import SOME_GRIDS, grid_name, heavy_tailed, slack, values_of

SHAPE = (128, 16)


@dataclasses.dataclass
class Published:
    """One group in float64, from round-to-nearest's step and zero, and how close its decisions were.

    `margin` is the smallest distance of any decision from its boundary in units of what float32 may be off by: below
    1, the float32 computation may decide otherwise.
    """

    step: float
    zero: float
    margin: float = np.inf

    def codes(self, w, grid):
        position = w / self.step + self.zero
        # Half-way between codes; beyond the outermost codes nothing is decided.
        inside = (position > -0.4) & (position < grid.largest + 0.4)
        if inside.any():
            off = np.abs(position[inside] % 1 - 0.5).min()
            self.margin = min(self.margin, off / slack(grid))
        return np.clip(np.rint(position), 0, grid.largest)

    def rounded(self, value, uncertainty):
        """In float16, minding how close the value was to the middle of two such numbers."""
        near = np.float16(value)
        gaps = [abs(float(np.nextafter(near, np.float16(side))) - float(near)) for side in (np.inf, -np.inf)]
        off = min(gaps) / 2 - abs(value - float(near))
        self.margin = min(self.margin, off / uncertainty)
        return float(near)

    def run(self, w, grid):
        beta, error, previous = 10.0, np.inf, (self.step, self.zero)
        for _ in range(21):  # the start and 20 rounds
            q = self.codes(w, grid)
            rest = w - (q - self.zero) * self.step
            now = float((np.abs(rest) ** 0.7).sum())
            if np.isfinite(error) and (self.step, self.zero) != previous:
                # Sums of at most 128 terms in float32, each term off by what its level is.
                self.margin = min(self.margin, abs(now - error) / (slack(grid) * error))
            if now >= error:
                break
            error, previous = now, (self.step, self.zero)
            with np.errstate(divide="ignore"):
                outlier = np.sign(rest) * np.maximum(np.abs(rest) - np.abs(rest) ** (0.7 - 1) / beta, 0)
            if grid.symmetric:
                level = q - grid.largest / 2
                step = level @ (w - outlier) / (level @ level)
                self.step = self.rounded(step, slack(grid) * step)
            else:
                self.zero = self.rounded(np.mean(q - (w - outlier) / self.step), slack(grid))  # terms to 2**bits
            beta *= 1.01
        self.step, self.zero = previous


@pytest.mark.parametrize("size", [0.02, 1.0], ids=["no-outliers", "outliers"])
@pytest.mark.parametrize("grid", SOME_GRIDS, ids=grid_name)
def test_the_published_update_in_float64_gives_the_same_steps_and_zeros(grid, size):
    w = heavy_tailed(grid.bits, *SHAPE, size=size)
    start, found = round_to_nearest(jnp.asarray(w), grid), half_quadratic(jnp.asarray(w), grid)
    compared, moved = 0, 0
    for group, column in np.ndindex(start.scale.shape):
        middle = grid.largest / 2
        zero = middle if start.zero is None else float(start.zero[group, column])
        reference = Published(float(start.scale[group, column]), zero)
        rows = slice(group * grid.group, (group + 1) * grid.group)
        reference.run(w[rows, column].astype(np.float64), grid)
        if reference.margin < 1:
            continue
        compared += 1
        assert float(found.scale[group, column]) == reference.step
        assert (middle if found.zero is None else float(found.zero[group, column])) == reference.zero
        moved += (reference.step, reference.zero) != (float(start.scale[group, column]), zero)
        np.testing.assert_array_equal(found.codes[rows, column], reference.codes(w[rows, column], grid))
    assert compared >= 0.5 * start.scale.size and moved >= 0.1 * compared


@pytest.mark.parametrize("grid", SOME_GRIDS, ids=grid_name)
def test_no_group_ends_with_a_larger_error_than_round_to_nearest(grid):
    """For ordinary weights, one-sided, tiny and all-zero columns, and an outlier."""
    w = heavy_tailed(11, *SHAPE)
    w[:, 0], w[:, 1] = np.abs(w[:, 0]), -np.abs(w[:, 1])
    w[:, 2], w[:, 3], w[3, 4] = 0, w[:, 3] * 1e-6, 50
    w[:, 5] = np.sign(w[:, 5])

    def errors(quantized):
        rest = np.abs(w.astype(np.float64) - values_of(quantized)) ** 0.7
        return rest.reshape(-1, grid.group, SHAPE[1]).sum(axis=1)

    before = errors(round_to_nearest(jnp.asarray(w), grid))
    found = half_quadratic(jnp.asarray(w), grid)
    after = errors(found)
    # A round counts as better by sums in float32: of up to 20 rounds, each may be worse by their rounding.
    assert (after <= before * (1 + 20 * slack(grid))).all()
    assert after.sum() < 0.99 * before.sum()
    assert np.isfinite(np.asarray(dequantize(found))).all() and (np.asarray(dequantize(found))[:, 2] == 0).all()
    np.testing.assert_allclose(np.asarray(dequantize(found)), values_of(found), rtol=2.0**-23, atol=1e-12)


def test_weights_of_two_values_become_exact_at_one_bit():
    w = np.random.default_rng(0).choice([-0.0625, 0.0625], SHAPE).astype(np.float32)
    found = half_quadratic(jnp.asarray(w), Grid(bits=1, group=32, symmetric=True))
    np.testing.assert_array_equal(np.asarray(dequantize(found)), w)  # round-to-nearest leaves half of them


def test_leading_axes_tracing_and_narrow_weights_change_nothing():
    grid = Grid(bits=2, group=64, symmetric=False)
    w = jnp.asarray(heavy_tailed(5, 2, 1, 64, 4)).astype(jnp.bfloat16)
    found = half_quadratic(w, grid)
    assert found.zero is not None and found.zero.shape == (2, 1, 1, 4)
    traced = jax.jit(lambda w: half_quadratic(w, grid))(w.astype(jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, found, traced)
    alone = half_quadratic(w[1, 0], grid)
    jax.tree.map(lambda one, stack: np.testing.assert_array_equal(one, stack[1, 0]), alone, found)


def test_weights_that_are_no_numbers_are_refused_by_name():
    w = jnp.full((64, 2), jnp.nan)
    with pytest.raises(InputError, match="layer 0 down has 128 weights that are NaN"):
        half_quadratic(w, Grid(bits=2, group=64, symmetric=False), name="layer 0 down")
