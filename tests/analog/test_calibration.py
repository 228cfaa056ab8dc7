"""Input ranges from what really reaches a matrix."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.calibration import InputStatistics, RangeMethod, calibration_from, input_ranges
from hetmoe.analog.moments import Moments, observe_inputs
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.models.hardware import LayerHardware
from hetmoe.models.matrices import MATRICES
from tests.models.analog_tiny import SITE_OF

GROUPS, BLOCKS, SLOTS, ROWS, TILE_ROWS = 4, 6, 5, 10, 4
TILES = [slice(0, 4), slice(4, 7), slice(7, 10)]
GROUP = np.array([0, 0, 1, 1, 3, 3], np.int32)  # group 2 gets no block; the second block of 3 is all padding
RESOLUTION = 2.0 ** (1 / 16)  # of the histogram, as its comment states
observe = jax.jit(observe_inputs, static_argnames=("groups", "tile_rows", "histogram"))


def routed(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(x, which rows are real); padding holds numbers that no statistic may contain."""
    rng = np.random.default_rng(seed)
    scale = np.exp2(rng.integers(-3, 4, (BLOCKS, 1, 1)))
    x = (0.3 + rng.standard_normal((BLOCKS, SLOTS, ROWS)) * scale).astype(np.float32)
    real = rng.random((BLOCKS, SLOTS)) < 0.7
    real[5], real[0, 0] = False, True
    x[~real] = 1e6
    return x, real


def observed(x: np.ndarray, real: np.ndarray, group: np.ndarray = GROUP, *, histogram: bool = False) -> Moments:
    arrays = jnp.asarray(x), jnp.asarray(real), jnp.asarray(group)
    found = observe(*arrays, groups=GROUPS, tile_rows=TILE_ROWS, histogram=histogram)
    return jax.tree.map(np.asarray, found)


def seen_by(x: np.ndarray, real: np.ndarray, group: int, tile: slice) -> np.ndarray:
    """Inputs of one row-block from the tokens of one group, float64."""
    return x[GROUP == group][real[GROUP == group]][:, tile].astype(np.float64).ravel()


def test_moments_of_the_routed_tokens_only() -> None:
    x, real = routed()
    found = observed(x, real)
    assert found.histogram is None and found.count.shape == (GROUPS, len(TILES))
    for group in range(GROUPS):
        for index, tile in enumerate(TILES):
            values = seen_by(x, real, group, tile)
            here = group, index
            assert found.count[here] == values.size
            # Sums of fewer than 64 float32 numbers: a relative error of 64 roundings of their magnitudes at most.
            sum_error = 64 * 2.0**-24
            assert abs(found.total[here] - values.sum()) <= sum_error * np.abs(values).sum()
            np.testing.assert_allclose(found.square[here], np.square(values).sum(), rtol=sum_error)
            assert found.maximum[here] == np.abs(values).max(initial=0)
            spread = values.std() if values.size else 0.0
            np.testing.assert_allclose(np.asarray(found.std())[here], spread, rtol=1e-5)
    assert not found.count[2].any() and found.count[3].all()


def test_bf16_inputs_are_counted_in_float32() -> None:
    x, real = routed()
    low = jnp.asarray(x, jnp.bfloat16)
    found, wide = observed(low, real), observed(np.asarray(low.astype(jnp.float32)), real)
    assert found.square.dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, found, wide)


def test_histogram_counts_every_input_once() -> None:
    x, real = routed()
    x[0, 0, :2] = [0.0, 3e5]  # below the lowest and above the highest bin
    found = observed(x, real, histogram=True)
    assert found.histogram is not None and found.histogram.shape == (GROUPS, 3, 640)
    np.testing.assert_array_equal(found.histogram.sum(axis=-1), found.count)
    edges = 2.0 ** (np.arange(1, 640) / 16 - 24)
    for group in range(GROUPS):
        for index, tile in enumerate(TILES):
            magnitudes = np.abs(seen_by(x, real, group, tile))
            assert (
                np.abs(np.log2(edges[:, None] / np.maximum(magnitudes, 1e-9))).min(initial=1) > 1e-6
            )  # clear of edges
            wanted = np.bincount(np.searchsorted(edges, magnitudes), minlength=640)
            np.testing.assert_array_equal(found.histogram[group, index], wanted)


def made_moments(std: np.ndarray, count: np.ndarray, maximum: np.ndarray | None = None) -> Moments:
    """Moments with given standard deviations (mean 0.5)."""
    count, std = count.astype(np.float32), std.astype(np.float32)
    return Moments(
        count=jnp.asarray(count),
        total=jnp.asarray(count / 2),
        square=jnp.asarray(count * (std**2 + np.float32(0.25))),
        maximum=jnp.asarray(std if maximum is None else maximum.astype(np.float32)),
        histogram=None,
    )


def stacked(batches: list[Moments]) -> Moments:
    return jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *batches)


def pooled_std(batch: Moments) -> np.ndarray:
    """Standard deviation over all groups of a layer together, float64."""
    count, total, square = (np.asarray(v, np.float64).sum(axis=-2) for v in (batch.count, batch.total, batch.square))
    return np.sqrt(square / count - (total / count) ** 2)


@pytest.mark.parametrize("decay", [0.99, 0.5, 0.0])
def test_moving_average_skips_batches_without_tokens(decay: float) -> None:
    """Group 0 is always seen, 1 from the second batch on, 2 in the first and third, 3 never; two layers, two tiles."""
    rng = np.random.default_rng(1)
    present = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]], bool)
    stds = rng.uniform(0.5, 2.0, (4, 2, GROUPS, 2))  # batch, layer, group, tile
    counts = [np.broadcast_to(10.0 * (batch + 1) * present[:, batch][:, None], (2, GROUPS, 2)) for batch in range(4)]
    batches = [made_moments(np.where(count > 0, std, 9.0), count) for std, count in zip(stds, counts, strict=True)]
    ranges = input_ranges(stacked(batches), RangeMethod(k=8.0, decay=decay))

    def average(history: Any) -> Any:
        value, *rest = history
        for new in rest:
            value = decay * value + (1 - decay) * new
        return value

    for layer, group, tile in np.ndindex(2, 3, 2):
        expected = 8.0 * average(stds[present[group], layer, group, tile])
        np.testing.assert_allclose(ranges[layer, group, tile], expected, rtol=1e-5)  # the std is float32
    # A group that never got a token takes the range of all tokens of its layer and tile.
    np.testing.assert_allclose(ranges[:, 3], 8.0 * average([pooled_std(b) for b in batches]), rtol=1e-5)


def test_nothing_seen_gives_zero() -> None:
    nothing = made_moments(np.ones((3, 2)), np.zeros((3, 2)), np.zeros((3, 2)))
    for how in (RangeMethod(), RangeMethod(method="max")):
        assert not input_ranges(stacked([nothing]), how).any()


def test_maximum_over_all_batches() -> None:
    rng = np.random.default_rng(2)
    largest = rng.uniform(0.1, 5.0, (3, GROUPS, 2)).astype(np.float32)
    count = np.ones((GROUPS, 2))
    count[3] = 0
    batches = [made_moments(np.ones((GROUPS, 2)), count, value * (count > 0)) for value in largest]
    ranges = input_ranges(stacked(batches), RangeMethod(method="max"))
    np.testing.assert_array_equal(ranges[:3], largest.max(axis=0)[:3])
    np.testing.assert_array_equal(ranges[3], largest.max(axis=0)[:3].max(axis=0))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-12, 8), quantile=st.floats(0.01, 1.0))
def test_quantile_within_the_resolution_of_the_histogram(seed: int, exponent: int, quantile: float) -> None:
    """The range is at least the quantile of |x| over all batches, and at most one bin (4.4 %) above it."""
    batches = [routed(seed), routed(seed + 1)]
    batches = [(np.where(real[..., None], np.ldexp(x, exponent), x), real) for x, real in batches]
    moments = stacked([observed(x, real, histogram=True) for x, real in batches])
    ranges = input_ranges(moments, RangeMethod(method="quantile", quantile=quantile))
    for index, tile in enumerate(TILES):
        seen = {g: np.concatenate([seen_by(x, real, g, tile) for x, real in batches]) for g in (0, 1, 3)}
        # The group without tokens takes the quantile of all tokens of the layer.
        for group, values in {**seen, 2: np.concatenate(list(seen.values()))}.items():
            magnitudes = np.sort(np.abs(values))
            # The smallest value that a share of `quantile` does not exceed; log2 may round it over a bin's edge.
            exact = magnitudes[int(np.argmax(np.arange(1, magnitudes.size + 1) >= quantile * magnitudes.size))]
            assert exact * (1 - 1e-6) <= ranges[group, index] <= exact * RESOLUTION * (1 + 1e-6)
            assert ranges[group, index] <= magnitudes[-1]


def statistics(tokens: list[float]) -> InputStatistics:
    """One layer whose experts saw `tokens` tokens of 4 inputs in one tile, in one batch, with spreads 1, 2, 3, ..."""
    count = np.array(tokens)[:, None] * 4
    moments = stacked([made_moments(np.arange(1.0, len(tokens) + 1)[:, None], count)])
    with_layer = jax.tree.map(lambda leaf: leaf[:, None], moments)
    head = jax.tree.map(lambda leaf: leaf[:, :1], moments)
    return InputStatistics(
        layers={"experts_in": with_layer, "attention_in": jax.tree.map(lambda leaf: leaf[:, :, :1], with_layer)},
        dense_layers={},
        lm_head=head,
        tokens_seen=np.array([tokens]),
        tile_rows=512,
    )


def test_experts_with_few_tokens_take_the_range_of_their_layer() -> None:
    given = statistics([100.0, 31.0, 32.0, 0.0])
    found = calibration_from(given, RangeMethod(k=2.0, min_tokens=32))
    together = 2.0 * pooled_std(jax.tree.map(lambda leaf: leaf[0, 0], given.layers["experts_in"]))
    expected = np.stack([[2.0], together, [6.0], together])
    np.testing.assert_allclose(found.layers["experts_in"][0], expected, rtol=1e-6)
    np.testing.assert_array_equal(found.tokens_seen, [[100, 31, 32, 0]])
    np.testing.assert_allclose(found.layers["attention_in"], [[2.0]], rtol=1e-6)  # dense: however few
    assert float(calibration_from(given, RangeMethod(k=2.0, min_tokens=31)).layers["experts_in"][0, 1, 0]) == 4.0


def test_quantiles_need_histograms() -> None:
    with pytest.raises(InputError, match="'quantile' needs statistics with histograms"):
        calibration_from(statistics([9.0, 9.0]), RangeMethod(method="quantile"))


def test_matrices_that_share_an_input_share_its_range() -> None:
    sites = sorted(set(SITE_OF.values()))
    ranges = {site: jnp.full((1,), float(index)) for index, site in enumerate(sites)}
    hardware = LayerHardware(
        experts=None,
        dense={},
        programmed={},
        ranges=ranges,
        read_key=None,
        spec=analog_spec(tile_rows=TILE_ROWS),
        implementation=None,
    )
    assert {name: sites[int(hardware.input_range(name)[0])] for name in MATRICES} == SITE_OF
    assert dataclasses.replace(hardware, ranges=None).input_range("q") is None


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"method": "mean"}, "calibration method 'mean' is unknown; choose one of ema_std, quantile, max"),
        ({"k": 0.0}, "calibration k=0.0 must be positive and finite"),
        ({"k": float("inf")}, "calibration k=inf must be positive and finite"),
        ({"k": float("nan")}, "calibration k=nan must be positive"),
        ({"decay": 1.0}, r"calibration decay=1.0 must be within \[0, 1\)"),
        ({"decay": -0.1}, "calibration decay=-0.1 must be within"),
        ({"quantile": 0.0}, r"calibration quantile=0.0 must be within \(0, 1\]"),
        ({"quantile": 1.1}, "calibration quantile=1.1 must be within"),
        ({"min_tokens": 0}, "calibration min_tokens=0 must be a whole number of at least 1"),
        ({"min_tokens": 1.5}, "calibration min_tokens=1.5 must be a whole number"),
    ],
)
def test_bad_methods_are_refused(monkeypatch: pytest.MonkeyPatch, bad: dict[str, Any], message: str) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # it would refuse an unknown method itself
    with pytest.raises(InputError, match=message):
        RangeMethod(**bad)
