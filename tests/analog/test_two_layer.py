"""Bounds of two-layer experts: cases in which they are reached, and a search."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetmoe.analog.gaussian_moments import two_layer_exact
from hetmoe.analog.second_moment import Moments
from hetmoe.analog.two_layer import (
    TwoLayer,
    TwoLayerNoise,
    two_layer,
    two_layer_change_bound,
    two_layer_second_moment,
)  # fmt: skip
from hetmoe.errors import InputError

SEEDS = st.integers(0, 2**31)


def test_a_neuron_that_stays_active_reaches_the_bound() -> None:
    """`df = V^T dW^T x` then, whose second moment is exact; with a noisy last layer both parts add up."""
    x, expert = np.array([[1.0, 2.0]]), TwoLayer(np.array([[5.0], [6.0]]), np.array([[2.0, -1.0]]))
    none, small = Moments(np.zeros((2, 1)), np.zeros((2, 1))), Moments(np.zeros((2, 1)), np.array([[0.02], [0.03]]))
    square = 0.02 * 1 + 0.03 * 4
    last = Moments(np.zeros((1, 2)), np.array([[0.1, 0.2]]))
    for up, down, wanted in (
        (small, Moments(np.zeros((1, 2)), np.zeros((1, 2))), square * 5),
        (none, last, 17**2 * 0.3), (small, last, square * 5 + (17**2 + square) * 0.3),
    ):  # fmt: skip
        found = two_layer_second_moment(x, expert, TwoLayerNoise(up, down)).rms[0]
        assert 1 <= found / np.sqrt(wanted) < 1.03
        np.testing.assert_allclose(two_layer_exact(x, expert, TwoLayerNoise(up, down)), np.sqrt(wanted), rtol=1e-9)


def test_bias_of_an_active_neuron_reaches_the_bound() -> None:
    """No spread, one neuron: `df = V b x`, whether it pushes the neuron up or down; and the mean's bound as well."""
    x, expert, none = np.array([[2.0]]), TwoLayer(np.array([[3.0]]), np.array([[1.5]])), np.zeros((1, 1))
    for bias in (0.1, -0.1):
        noise = TwoLayerNoise(Moments(np.array([[bias]]), none), Moments(none, none))
        found = two_layer_second_moment(x, expert, noise)
        wanted = 1.5 * 0.1 * 2
        # Mean and variance are bounded each by the mean square: sqrt(2), and not more.
        assert wanted <= found.rms[0] <= np.sqrt(2) * wanted * (1 + 1e-6)
        # The remainder E da^2 / (4 |a|), 1 / 120 of the move itself, is cut off at the root mean square.
        np.testing.assert_allclose(found.mean, wanted, rtol=1e-6)
        np.testing.assert_allclose(two_layer_exact(x, expert, noise), wanted, rtol=1e-9)


@pytest.mark.parametrize("active", [0.5, -0.5])
def test_the_remainder_of_a_relu(active: float) -> None:
    """Noise of two points +-2|a|, at which the remainder is exactly E da^2 / (4 |a|): the mean's bound is reached."""
    x, expert, none = np.array([[1.0]]), TwoLayer(np.array([[active]]), np.array([[1.0]])), np.zeros((1, 1))
    noise = TwoLayerNoise(Moments(none, np.ones((1, 1))), Moments(none, none))  # da = +-1
    moved = np.mean([max(active + da, 0) - max(active, 0) for da in (1, -1)])
    found = two_layer_second_moment(x, expert, noise)
    assert moved == 0.25 and found.mean[0] >= moved
    np.testing.assert_allclose(found.mean, 1 / (4 * 0.5), rtol=1e-6)


@settings(max_examples=30)
@given(seed=SEEDS)
def test_no_two_layer_expert_moves_by_more_than_its_weights_allow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inputs, neurons, outputs = rng.integers(1, 9, 3)
    x, sizes = rng.normal(size=(4, inputs)), 10 ** rng.uniform(-3, 1, 2)
    expert = TwoLayer(rng.normal(size=(inputs, neurons)), rng.normal(size=(neurons, outputs)))
    limits = [size * rng.random(w.shape) for size, w in zip(sizes, (expert.up, expert.down), strict=True)]
    moves = [limit * rng.uniform(-1, 1, limit.shape) for limit in limits]
    moved = TwoLayer(expert.up + moves[0], expert.down + moves[1])
    off = np.linalg.norm(two_layer(x, moved) - two_layer(x, expert), axis=1)
    assert (off <= two_layer_change_bound(x, expert, *limits)).all()


def test_a_changed_two_layer_expert_reaches_its_bound() -> None:
    one = np.ones((1, 1))
    expert, moved = TwoLayer(2 * one, 3 * one), TwoLayer(2.5 * one, 3.25 * one)
    x = np.array([[1.0]])
    np.testing.assert_allclose(
        two_layer_change_bound(x, expert, 0.5 * one, 0.25 * one), two_layer(x, moved)[0] - two_layer(x, expert)[0]
    )
    with pytest.raises(InputError, match="up_change has a negative value"):
        two_layer_change_bound(x, expert, -one, one)
