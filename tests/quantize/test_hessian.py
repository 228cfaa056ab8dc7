"""Sums of x x^T over the tokens of each expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.quantize.hessian import add_inputs, check_calibration, mean_hessian, no_inputs


def test_sums_are_those_of_real_rows_in_float64():
    rng = np.random.default_rng(0)
    blocks, block, rows, experts = 6, 8, 32, 3
    x = rng.normal(size=(2, blocks, block, rows)).astype(np.float32)
    real = rng.random((2, blocks, block)) < 0.7
    expert = np.array([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])  # none for expert 2
    x[~real] = np.nan
    hessians = no_inputs(experts, rows)
    for batch in range(2):
        hessians = jax.jit(add_inputs)(
            hessians, jnp.asarray(x[batch]), jnp.asarray(real[batch]), jnp.asarray(expert[batch])
        )
    for e in range(experts):
        seen = x[real & (expert == e)[..., None]].astype(np.float64)
        assert int(hessians.tokens[e]) == len(seen)
        # Each of the (at most 80) products and sums rounds to 2**-24 of the sum of magnitudes.
        bound = 80 * 2.0**-24 * (np.abs(seen).T @ np.abs(seen))
        assert (np.abs(np.asarray(hessians.total[e], np.float64) - seen.T @ seen) <= bound).all()
    everything = x[real].astype(np.float64)
    mean = everything.T @ everything / len(everything)
    np.testing.assert_allclose(mean_hessian(hessians), mean, atol=1e-5)


def test_narrow_inputs_are_multiplied_in_the_dtype_of_the_sum():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 64, 32))).astype(jnp.bfloat16)
    real, expert = jnp.ones((1, 64), bool), jnp.zeros((1,), jnp.int32)
    found = add_inputs(no_inputs(1, 32), x, real, expert)
    exact = np.asarray(x[0], np.float64)
    np.testing.assert_allclose(found.total[0], exact.T @ exact, atol=1e-4)
    assert found.total.dtype == jnp.float32
    with jax.enable_x64(True):
        double = add_inputs(no_inputs(1, 32, jnp.float64), x, real, expert)
        assert double.total.dtype == jnp.float64
        np.testing.assert_allclose(double.total[0], exact.T @ exact, rtol=1e-13, atol=1e-13)


def test_no_tokens_have_a_mean_of_zero():
    np.testing.assert_array_equal(mean_hessian(no_inputs(2, 32)), 0)


def test_text_shorter_than_the_inputs_of_a_matrix_is_refused():
    check_calibration(2048, 2048, "gate")
    with pytest.raises(InputError, match=r"2,047 tokens is too short for GPTQ: gate has 2,048 inputs"):
        check_calibration(2047, 2048, "gate")
