"""Every implementation of the crossbar matmul under one signature, and how far one may be from the numpy reference.

A new kernel joins all tests of `test_crossbar_*.py` when it is entered in the `IMPLEMENTATIONS` of the public api.
Those of other devices run interpreted.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.tiles import block_max
from hetmoe.ops.crossbar_matmul import api
from hetmoe.ops.crossbar_matmul import reference as written_for_reading
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar.api import IMPLEMENTATIONS as PUBLIC_NAMES
from tests.numpy_reference import Float32, Tile, boundary_distance, crossbar_tiles

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "crossbar.npz"
STATIC = ("dac_bits", "adc_bits", "bound_axis", "tile_rows")
UNIT_ROUNDOFF = 2.0**-24  # of float32


def reference(
    x: jax.Array,
    w: jax.Array,
    *,
    input_range: jax.Array | None = None,
    dac_bits: int | None = 8,
    adc_bits: int | None = 8,
    adc_bound: jax.Array | float = 12.0,
    bound_axis: Any = "tile",
    tile_rows: int = 512,
    weight_max: jax.Array | None = None,
) -> jax.Array:
    """The reference implementation under the public signature (without read noise, which it does not have)."""
    options = CrossbarOptions(dac_bits=dac_bits, adc_bits=adc_bits, bound_axis=bound_axis, tile_rows=tile_rows)
    if weight_max is None:
        weight_max = block_max(w, tile_rows, per_column=bound_axis == "column")
    y = written_for_reading.crossbar_matmul(
        x.reshape(-1, w.shape[0]), w, input_range, jnp.float32(adc_bound), weight_max.astype(jnp.float32), options
    )
    return y.reshape(*x.shape[:-1], w.shape[1])


IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference,
    **{n: functools.partial(api.crossbar_matmul, implementation=n) for n in PUBLIC_NAMES if n != "pallas"},
}
KERNELS = ("interpret_tpu", "interpret_cuda")
COMPILED = {name: jax.jit(run, static_argnames=STATIC) for name, run in IMPLEMENTATIONS.items()}


def run(name: str, x: np.ndarray, w: np.ndarray, *, eager: bool = False, **arguments: Any) -> np.ndarray:
    """One implementation on numpy arrays, compiled unless `eager`."""
    traced = {k: None if v is None else jnp.asarray(v, jnp.float32) for k, v in arguments.items() if k not in STATIC}
    static = {k: v for k, v in arguments.items() if k in STATIC}
    function = (IMPLEMENTATIONS if eager else COMPILED)[name]
    return np.asarray(function(jnp.asarray(x), jnp.asarray(w), **traced, **static))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expected:
    """The numpy reference's output and how far another float32 implementation may be from it."""

    value: Float32
    rounding: np.ndarray  # bound of the difference where no ADC code moved
    near: np.ndarray  # whether the rounding of a sum may move an ADC code
    one_code: np.ndarray  # what moving one code in every tile changes


def sum_error(rows: int) -> float:
    """Bound of the error of a float32 sum of `rows` products, relative to the sum of their magnitudes.

    The worst case over all orders is `rows * u`; with independent roundings it is `l * sqrt(rows) * u`, but for a
    probability of `2 rows exp(-l**2 / 2)`, 1e-11 at l = 8 (Higham and Mary 2019, SIAM J. Sci. Comput. 41, A2815).
    """
    return min(rows, 8 * rows**0.5) * UNIT_ROUNDOFF


def expectation(x: Float32, w: Float32, *, implementations: int = 1, **arguments: Any) -> Expected:
    """The reference's output on float32 arrays.

    Args:
        x: inputs.
        w: weights.
        implementations: how many of the two compared results sum in float32 (the reference sums in float64).
        arguments: those of `tests.numpy_reference.crossbar_tiles`, all of them.
    """
    tiles = crossbar_tiles(x, w, **arguments)
    value = functools.reduce(np.add, [tile.output for tile in tiles])
    total = sum(np.abs(tile.output).astype(np.float64) for tile in tiles)
    # Each tile's output is one product, and each addition to the running sum one rounding (or both, fused).
    rounding = 2 * implementations * UNIT_ROUNDOFF * len(tiles) * total
    near, one_code, start = np.zeros(value.shape, bool), np.zeros(value.shape), 0
    for tile in tiles:
        stop = start + tile.dac_codes.shape[-1]
        error = implementations * _tile_error(tile, w[start:stop])
        start = stop
        if tile.adc_step is None or tile.adc_position is None:
            rounding = rounding + error
        else:
            # The position is a rounded quotient by a rounded step: two more roundings.
            distance = error + 2 * UNIT_ROUNDOFF * np.abs(tile.sums)
            near |= boundary_distance([tile]) * tile.adc_step.astype(np.float64) <= distance
            near &= tile.adc_step > 0
            one_code = one_code + tile.adc_step.astype(np.float64)
    return Expected(value=value, rounding=np.asarray(rounding), near=near, one_code=np.asarray(one_code))


def _tile_error(tile: Tile, weights: Float32) -> np.ndarray:
    magnitudes = np.abs(tile.dac_codes.astype(np.float64) * tile.dac_step) @ np.abs(weights.astype(np.float64))
    # Two more roundings: DAC code times step, and the reference's own from float64.
    return (sum_error(weights.shape[0]) + 2 * UNIT_ROUNDOFF) * magnitudes


def assert_matches(actual: np.ndarray, expected: Expected, *, value: np.ndarray | None = None) -> int:
    """Compares with `value` (default: the reference's); returns how many elements are codes apart.

    Raises:
        AssertionError: for a difference beyond rounding, and beyond one code per tile where a code may move.
    """
    wanted = expected.value if value is None else value
    assert actual.shape == wanted.shape and actual.dtype == np.float32, (actual.shape, wanted.shape, actual.dtype)
    difference = np.abs(actual.astype(np.float64) - wanted)
    allowed = expected.rounding + np.where(expected.near, expected.one_code, 0)
    worst = np.argmax(difference - allowed)
    assert np.all(difference <= allowed), (
        f"{np.sum(~(difference <= allowed))} of {difference.size} elements differ; "
        f"worst: {actual.flat[worst]} instead of {wanted.flat[worst]}, allowed {allowed.flat[worst]}"
    )
    return int(np.sum(difference > expected.rounding))


def golden_cases() -> list[dict[str, Any]]:
    """Description of every golden case."""
    with np.load(GOLDEN) as file:
        return json.loads(str(file["metadata"]))["cases"]


def golden_arrays(case: dict[str, Any]) -> tuple[Float32, Float32, Float32 | None, Float32]:
    """(x, w, input range or None, output of aihwkit-lightning)."""
    with np.load(GOLDEN) as file:
        ranges = None if case["input_range"] is None else file[case["input_range"]]
        return file[case["x"]], file[case["w"]], ranges, file[case["output"]]
