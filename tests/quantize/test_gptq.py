"""GPTQ against optimal brain quantization in float64, its fallbacks, and Hessians that are hard to use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.gptq import GptqOptions, gptq
from hetmoe.quantize.grid import Grid, dequantize
from hetmoe.quantize.hessian import Hessians
from hetmoe.quantize.rtn import round_to_nearest
from tests.quantize.grids import SOME_GRIDS, grid_name, heavy_tailed, steps_and_zeros, values_of

EXPERTS, ROWS, COLUMNS = 2, 128, 6
ALONE = GptqOptions(prior=0)  # every expert by its own Hessian
GRID = SOME_GRIDS[1]  # 2 bits, asymmetric: each grid compiles for seconds


def weights(seed=0):
    return heavy_tailed(seed, EXPERTS, ROWS, COLUMNS)


@functools.cache
def correlated(tokens=400, seed=0):
    """Hessians of inputs of few directions, of energies from 0.1 to 10; float32."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(EXPERTS, ROWS, ROWS)) * np.exp2(rng.uniform(-3, 3, size=(EXPERTS, ROWS, 1)))
    mixing *= np.exp2(rng.uniform(-2, 2, size=(EXPERTS, 1, ROWS)))
    x = rng.normal(size=(EXPERTS, tokens, ROWS)) @ mixing
    return np.einsum("etk,etl->ekl", x, x).astype(np.float32)


def given(total, tokens=400):
    counts = np.broadcast_to(np.asarray(tokens, np.int32), (len(total),))
    return Hessians(total=jnp.asarray(total), tokens=jnp.asarray(counts))


def brain_quantized(w, hessian, nearest, damping=0.01):
    """Optimal brain quantization of one matrix, weight by weight, with the inverse Hessian written out.

    Each weight in its turn is rounded, the weights that are left take up its error, and its row and column are
    eliminated from the inverse (Frantar et al. 2022, arXiv:2208.11580, equations 2 to 4).

    Returns:
        Codes, the distance in steps of each from where it would have been another, `[N, K]` in the order that rows
        took, and that order.
    """
    step, zero = steps_and_zeros(nearest)
    hessian, w = hessian.astype(np.float64), w.astype(np.float64)
    order = np.argsort(-np.diagonal(hessian), kind="stable")
    damped = hessian + damping * np.mean(np.diagonal(hessian)) * np.eye(len(hessian))
    codes, distance = np.zeros(w.shape, np.uint8), np.zeros(w.shape)
    left, inverse = w.copy(), np.linalg.inv(damped)
    for row in order:  # in all columns, which share the Hessian
        position = left[row] / step[row] + zero[row]
        codes[row] = np.clip(np.rint(position), 0, nearest.grid.largest)
        outside = (position < -0.4) | (position > nearest.grid.largest + 0.4)
        distance[row] = np.where(outside, 1, np.abs(position % 1 - 0.5))
        error = left[row] - (codes[row] - zero[row]) * step[row]
        left -= np.outer(inverse[:, row] / inverse[row, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    return codes, distance[order].T, order


def column_errors(w, values, hessian):
    """`(w - q)^T H (w - q)`, float64."""
    change = np.asarray(w, np.float64) - values
    return np.einsum("...kn,...kl,...ln->...n", change, hessian.astype(np.float64), change)


@pytest.mark.parametrize("grid", SOME_GRIDS, ids=grid_name)
def test_codes_are_those_of_optimal_brain_quantization(grid):
    w, total = weights(grid.bits), correlated()
    nearest = round_to_nearest(jnp.asarray(w), grid)
    found = gptq(jnp.asarray(w), given(total), grid, ALONE)
    np.testing.assert_array_equal(found.quantized.scale, nearest.scale)
    rtn_error = column_errors(w, values_of(nearest), total)
    compared = 0
    for expert in range(EXPERTS):
        start = jax.tree.map(lambda leaf: leaf[expert], nearest)  # noqa: B023
        codes, distance, order = brain_quantized(w[expert], total[expert], start)
        error = column_errors(w[expert], values_of(start.replace(codes=codes)), total[expert])
        fallen = error > rtn_error[expert]
        for column in range(COLUMNS):
            # Targets in float32 are off by about the condition number of H (1e4) times 2**-24 of their size: a code
            # this close to another may be that one, and those after it in the order then differ for good reason.
            close = np.flatnonzero(distance[column] < 1e-3)
            clear = order[: close[0]] if close.size else order
            wanted = start.codes[:, column] if fallen[column] else codes[:, column]
            np.testing.assert_array_equal(found.quantized.codes[expert, clear, column], wanted[clear])
            compared += len(clear)
        assert int(found.fell_back[expert]) == fallen.sum()
    assert compared >= 0.7 * w.size


def test_errors_are_those_of_the_codes_and_never_above_round_to_nearest():
    """An expert with few tokens is quantized for the mean of both: compensated the wrong way for its own inputs."""
    w, total = weights(1), correlated().copy()
    signs = np.random.default_rng(2).choice(np.float32([-1, 1]), ROWS)
    total[0] = total[1] * np.outer(signs, signs) / 200
    found = gptq(jnp.asarray(w), given(total, [2, 400]), GRID, GptqOptions())
    nearest = round_to_nearest(jnp.asarray(w), GRID)
    for stated, quantized in [(found.error, found.quantized), (found.rtn_error, nearest)]:
        values = values_of(quantized)
        # Two sums of 128 terms in float32.
        bound = 2 * 128 * 2.0**-24 * column_errors(np.abs(w - values), 0, np.abs(total))
        assert (np.abs(stated - column_errors(w, values, total)) <= bound).all()
    assert (np.asarray(found.error) <= np.asarray(found.rtn_error)).all()
    same = (np.asarray(found.quantized.codes) == np.asarray(nearest.codes)).all(axis=1)
    np.testing.assert_array_equal(found.fell_back, same.sum(axis=1))
    assert int(found.fell_back[0]) > 0 and int(found.fell_back[1]) == 0
    assert float(found.error[1].sum()) < 0.8 * float(found.rtn_error[1].sum())


@pytest.mark.parametrize("grid", [GRID, Grid(bits=1, group=32, symmetric=True)], ids=grid_name)
def test_independent_inputs_are_rounded_to_nearest(grid):
    """A diagonal Hessian, and none at all."""
    energies = np.exp(np.random.default_rng(0).normal(size=ROWS)).astype(np.float32)
    total = np.stack([np.diag(energies), np.zeros((ROWS, ROWS), np.float32)])
    w = jnp.asarray(weights())
    found, nearest = gptq(w, given(total), grid, ALONE), round_to_nearest(w, grid)
    np.testing.assert_array_equal(found.quantized.codes, nearest.codes)
    np.testing.assert_array_equal(found.fell_back, 0)
    np.testing.assert_array_equal(found.error[1], 0)


def test_rows_of_dead_inputs_are_rounded_to_nearest():
    total = correlated().copy()
    dead = np.arange(ROWS) % 7 == 3
    total[:, dead], total[:, :, dead] = 0, 0
    w = jnp.asarray(weights())
    found, nearest = gptq(w, given(total), GRID, ALONE), round_to_nearest(w, GRID)
    np.testing.assert_array_equal(found.quantized.codes[:, dead], nearest.codes[:, dead])
    assert (np.asarray(found.quantized.codes) != np.asarray(nearest.codes)).mean() > 0.1
    assert (np.asarray(found.error) < np.asarray(found.rtn_error)).mean() > 0.9


def test_a_factor_of_the_hessian_changes_no_code():
    w = jnp.asarray(weights())
    once = gptq(w, given(correlated()), GRID, ALONE)
    for factor in (2.0**-60, 2.0**60):
        scaled = gptq(w, given(correlated() * np.float32(factor)), GRID, ALONE)
        np.testing.assert_array_equal(once.quantized.codes, scaled.quantized.codes)


@pytest.mark.parametrize("few", [50, 0])
def test_experts_with_few_tokens_lean_on_the_mean_of_the_layer(few):
    """n0 = K tokens of the mean are added; an expert without tokens takes the mean alone."""
    w, total = weights(), correlated().copy()
    total[1] *= few / 400
    found = gptq(jnp.asarray(w), given(total, [400, few]), GRID, GptqOptions())
    stated = total + ROWS * total.astype(np.float64).sum(axis=0) / (400 + few)
    alone = gptq(jnp.asarray(w), given(stated.astype(np.float32)), GRID, ALONE)
    # Columns may fall back by the expert's own Hessian; without tokens all errors are 0, and none does.
    own = np.asarray((found.error < found.rtn_error) | (found.rtn_error == 0)) & np.asarray(
        alone.error < alone.rtn_error
    )
    assert own.mean() > 0.7
    # The sums differ by rounding, which may move a weight that is half-way between codes and those after it.
    same = np.asarray(found.quantized.codes == alone.quantized.codes).mean(axis=1)
    assert same[own].min() > 0.95 and same[own].mean() > 0.99


def test_more_damping_where_the_hessian_is_not_positive_definite():
    """The first of 0.01, 0.1, ... 1000 mean diagonals that outweighs the lowest eigenvalue, if any does."""
    pair = np.zeros((EXPERTS, ROWS, ROWS), np.float32)
    for expert, off in enumerate([3.0, -1e5]):
        pair[expert] = np.eye(ROWS)
        pair[expert, 0, 1] = pair[expert, 1, 0] = off
    lowest = np.linalg.eigvalsh(pair.astype(np.float64))[:, 0]
    np.testing.assert_allclose(lowest, [-2, 1 - 1e5])
    w = jnp.asarray(weights())
    found = gptq(w, given(pair), GRID, ALONE)
    np.testing.assert_array_equal(found.factored, [True, False])
    np.testing.assert_allclose(found.damping[0], 10, rtol=1e-6)
    nearest = round_to_nearest(w, GRID)
    np.testing.assert_array_equal(found.quantized.codes[1], nearest.codes[1])
    np.testing.assert_array_equal(found.fell_back[1], COLUMNS)
    assert np.isfinite(np.asarray(found.error)).all()


def test_a_hessian_that_is_no_number_leaves_round_to_nearest_under_jit_and_is_refused_outside():
    total = correlated().copy()
    total[1, 3, 4] = np.nan
    w = jnp.asarray(weights())
    found = jax.jit(lambda total: gptq(w, given(correlated()).replace(total=total), GRID, ALONE))(jnp.asarray(total))
    # The mean of the layer is unknown, and with it what any expert should be quantized for.
    np.testing.assert_array_equal(found.quantized.codes, round_to_nearest(w, GRID).codes)
    np.testing.assert_array_equal(found.fell_back, COLUMNS)
    assert not found.factored.any() and np.isfinite(np.asarray(dequantize(found.quantized))).all()
    with pytest.raises(InputError, match="Hessian of expert 1 of layer 2 up has NaN or infinite values"):
        gptq(w, given(total), GRID, ALONE, name="layer 2 up")


def test_narrow_and_tiny_weights():
    """bfloat16 counts as what it holds; steps below float16's smallest still give numbers."""
    w = jnp.asarray(weights()).astype(jnp.bfloat16)
    hessians = given(correlated())
    narrow, wide = gptq(w, hessians, GRID, ALONE), gptq(w.astype(jnp.float32), hessians, GRID, ALONE)
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)
    tiny = gptq(jnp.asarray(weights() * np.float32(1e-8)), hessians, GRID, ALONE)
    assert np.isfinite(np.asarray(dequantize(tiny.quantized))).all() and bool(tiny.factored.all())
    assert (np.asarray(tiny.error) <= np.asarray(tiny.rtn_error)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda total: total[:, :64, :64], r"Hessians \[2, 64, 64\] .* do not belong to gate \[2, 128, 6\]"),
        (lambda total: total[:1], r"they must be \[2, 128, 128\] and \[2\]"),
        (lambda total: -total, "expert 0 of gate has a negative diagonal"),
        (lambda total: total + np.triu(total, 1), "is not symmetric"),
        (lambda total: total * np.float32(np.inf), "NaN or infinite"),
    ],
)
def test_wrong_hessians_are_refused(change, message):
    with np.errstate(invalid="ignore"):
        total = change(correlated())
    with pytest.raises(InputError, match=message):
        gptq(jnp.asarray(weights()), given(total), GRID, ALONE, name="gate")


def test_wrong_weights_and_options_are_refused():
    with pytest.raises(InputError, match="gate has 1536 weights that are NaN"):
        gptq(jnp.full((EXPERTS, ROWS, COLUMNS), jnp.nan), given(correlated()), GRID, ALONE, name="gate")
    for name, value in [("damping", 0.0), ("damping", np.nan), ("prior", -1.0), ("prior", np.inf)]:
        with pytest.raises(InputError, match=f"{name}="):
            GptqOptions(**{name: value})
