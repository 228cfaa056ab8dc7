"""Errors of converters: a search, and bounds that are reached."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul

SEEDS = st.integers(0, 2**31)


@settings(max_examples=15)
@given(data=st.data())
def test_converters_at_any_magnitude(data: st.DataObject) -> None:
    """Ranges far too small or large, coarse and fine converters, tiles of one row, inputs of 0."""
    rng = np.random.default_rng(data.draw(SEEDS))
    rows, columns = data.draw(st.sampled_from([1, 7, 20])), data.draw(st.sampled_from([1, 5]))
    tile_rows, magnitude = data.draw(st.sampled_from([1, 3, 512])), 10.0 ** data.draw(st.integers(-4, 4))
    bits = [data.draw(st.sampled_from([None, 2, 5, 8, 12])) for _ in range(2)]
    spec = analog_spec(
        dac_bits=bits[0], adc_bits=bits[1], tile_rows=tile_rows,
        bound_axis=data.draw(st.sampled_from(["tile", "column"])),
    )  # fmt: skip
    x = jnp.asarray(rng.normal(size=(4, rows)) * magnitude * (rng.random((4, rows)) < 0.8), jnp.float32)
    w = jnp.asarray(rng.normal(size=(rows, columns)), jnp.float32)
    ranges = None
    if data.draw(st.booleans()):
        ranges = jnp.asarray(magnitude * 10.0 ** rng.uniform(-1, 1, -(-rows // tile_rows)), jnp.float32)
    adc_bound = float(10.0 ** rng.uniform(-1, 1.5))
    found = crossbar_matmul(
        x, w, input_range=ranges, dac_bits=bits[0], adc_bits=bits[1], adc_bound=adc_bound, tile_rows=tile_rows,
        bound_axis=spec.options.bound_axis,
    )  # fmt: skip
    bound = converter_error_bound(x, w, input_range=ranges, adc_bound=adc_bound, options=spec.options)
    error = np.abs(np.asarray(found, np.float64) - np.asarray(x, np.float64) @ np.asarray(w, np.float64))
    assert (error <= bound).all()


def test_the_converter_bound_is_reached() -> None:
    """An input just below half a step, an output just below half of one, and one that clips."""
    spec = analog_spec(dac_bits=2, adc_bits=None)  # levels -1, 0, 1
    x, w = jnp.asarray([[0.4999]]), jnp.asarray([[2.0]])
    ranges = jnp.ones(1)
    bound = converter_error_bound(x, w, input_range=ranges, adc_bound=12.0, options=spec.options)
    np.testing.assert_allclose(bound, 0.9998, rtol=1e-4)  # it becomes 0
    found = crossbar_matmul(x, w, input_range=ranges, dac_bits=2, adc_bits=None)
    np.testing.assert_allclose(np.abs(found - 0.9998), bound, rtol=1e-4)
    spec = analog_spec(dac_bits=None, adc_bits=2)
    clipped = crossbar_matmul(jnp.asarray([[1.0]]), w, input_range=ranges, dac_bits=None, adc_bits=2, adc_bound=0.25)
    bound = converter_error_bound(jnp.asarray([[1.0]]), w, input_range=ranges, adc_bound=0.25, options=spec.options)
    assert float(clipped[0, 0]) == 0.5
    np.testing.assert_allclose(bound, 1.5 + 0.25, rtol=1e-4)  # half a step beside what is clipped


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x": jnp.ones((2, 3))}, "must equal the first of w"),
        ({"input_range": jnp.ones(3)}, r"input_range has shape \[3\]"),
        ({"adc_bound": 0.0}, "adc_bound=0.0"), ({"w": jnp.full((4, 2), jnp.nan)}, "w has values that are not finite"),
        ({"input_range": jnp.asarray([1.0, jnp.inf])}, "input_range has values that are not finite"),
    ],
)  # fmt: skip
def test_converters_that_cannot_be(changes, said: str) -> None:
    given = {"x": jnp.ones((2, 4)), "w": jnp.ones((4, 2)), "input_range": jnp.ones(2), "adc_bound": 3.0} | changes
    with pytest.raises(InputError, match=said):
        converter_error_bound(**given, options=analog_spec(tile_rows=2).options)
