"""The crossbar matmul against aihwkit-lightning (recorded) and against the numpy reference (random)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.tiles import row_blocks
from tests.ops.crossbar_battery import (
    IMPLEMENTATIONS,
    KERNELS,
    assert_matches,
    expectation,
    golden_arrays,
    golden_cases,
    run,
)

CASES = golden_cases()
EXACT = [case for case in CASES if case["exact"]]
# Elements of the 28 cases whose sum lies within the bound of float32 rounding of a code's boundary.
MOST_NEAR_A_BOUNDARY = 3


@functools.cache
def compiled_outputs(name: str) -> dict[str, np.ndarray]:
    """Outputs of every case from one compiled program: half the time of compiling each alone."""

    def every_case(arrays: dict[str, tuple[jax.Array, jax.Array, jax.Array | None]]) -> dict[str, jax.Array]:
        return {
            case["name"]: IMPLEMENTATIONS[name](x, w, input_range=ranges, **case["arguments"])
            for case in CASES
            for x, w, ranges in [arrays[case["name"]]]
        }

    arrays = {case["name"]: jax.tree.map(jnp.asarray, golden_arrays(case)[:3]) for case in CASES}
    return jax.tree.map(np.asarray, jax.jit(every_case)(arrays))


def assert_ties(name: str, case: dict[str, Any], actual: np.ndarray, wanted: np.ndarray) -> None:
    """Every tie goes the same way; where a kernel's division is a bit off, ties of quotients go to either code."""
    if name in KERNELS and case["name"].startswith("quotient"):
        assert np.abs(actual - wanted).max() <= 1.001 * np.diff(np.unique(wanted)).max()
    else:
        np.testing.assert_array_equal(actual, wanted)


def test_golden_file_holds_what_the_tests_rely_on() -> None:
    assert len(CASES) == 28
    assert len(EXACT) == 7
    assert all(sum(case["counts"][event] for case in CASES) > 50 for event in CASES[0]["counts"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_equals_lightning(name: str, case: dict[str, Any]) -> None:
    x, w, ranges, wanted = golden_arrays(case)
    arguments = {"input_range": ranges, **case["arguments"]}
    assert [size for _, size in row_blocks(w.shape[0], arguments["tile_rows"])] == case["in_sizes"]
    actual = compiled_outputs(name)[case["name"]]
    if case["exact"]:
        assert_ties(name, case, actual, wanted)
    else:
        expected = expectation(x, w, implementations=2, **arguments)  # lightning sums in float32 as well
        assert expected.near.sum() <= MOST_NEAR_A_BOUNDARY
        assert assert_matches(actual, expected, value=wanted) <= case["moved_codes"] + expected.near.sum()
        assert assert_matches(actual, expected) <= expected.near.sum()


@pytest.mark.parametrize("case", EXACT[1:3] + EXACT[-2:], ids=lambda case: case["name"])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_eager_equals_lightning_on_ties(name: str, case: dict[str, Any]) -> None:
    x, w, ranges, wanted = golden_arrays(case)
    assert_ties(name, case, run(name, x, w, eager=True, input_range=ranges, **case["arguments"]), wanted)


BITS = st.none() | st.integers(2, 16)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([(), (1,), (2, 3)]),
    rows=st.integers(1, 70),
    columns=st.integers(1, 9),
    tiles=st.integers(1, 5),
    dac_bits=BITS,
    adc_bits=BITS,
    adc_bound=st.sampled_from([0.3, 2.0, 12.0]),
    bound_axis=st.sampled_from(["tile", "column"]),
    static=st.booleans(),
)
def test_equals_numpy_on_random_sizes(
    name: str,
    seed: int,
    batch: tuple[int, ...],
    rows: int,
    columns: int,
    tiles: int,
    dac_bits: int | None,
    adc_bits: int | None,
    adc_bound: float,
    bound_axis: str,
    static: bool,
) -> None:
    rng = np.random.default_rng(seed)
    tile_rows = -(-rows // tiles)  # at most five row-blocks, most of the time not dividing the rows
    x = (rng.standard_normal((*batch, rows)) * np.exp2(rng.integers(-4, 5))).astype(np.float32)
    w = (rng.standard_normal((rows, columns)) * np.exp2(rng.integers(-8, 3))).astype(np.float32)
    spread = np.float32(np.std(x) + 0.1)
    blocks = len(row_blocks(rows, tile_rows))
    ranges = (rng.uniform(0.8, 2.5, blocks).astype(np.float32) * spread) if static else None
    arguments: dict[str, Any] = {
        "input_range": ranges,
        "dac_bits": dac_bits,
        "adc_bits": adc_bits,
        "adc_bound": adc_bound,
        "bound_axis": bound_axis,
        "tile_rows": tile_rows,
    }
    assert_matches(run(name, x, w, **arguments), expectation(x, w, **arguments))
