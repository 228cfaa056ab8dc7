"""Bounds in neuron norms: where they are reached, and neurons at their threshold."""

import numpy as np
import pytest

from hetmoe.analog.gaussian_moments import two_layer_exact
from hetmoe.analog.neuron_norm import expert_neuron_norm_bound, neuron_norm_bound
from hetmoe.analog.second_moment import Moments, linear_second_moment
from hetmoe.analog.two_layer import (
    TwoLayer,
    TwoLayerNoise,
    two_layer_second_moment,
)  # fmt: skip
from hetmoe.errors import InputError


def test_neuron_norms() -> None:
    """Reached where all inputs are equal: `c |x| sqrt(sum |w|^2)`; and of one active neuron."""
    w, x = np.array([[3.0, 0.0], [4.0, 1.0]]), np.array([[2.0, -2.0], [0.0, 1.0]])
    noise = Moments(np.zeros((2, 2)), np.square(0.1 * w))
    found = neuron_norm_bound(x, w, 0.1)
    np.testing.assert_allclose(found, [0.1 * 2 * np.sqrt(26), 0.1 * np.sqrt(26)], rtol=1e-8)
    np.testing.assert_allclose(np.sqrt(linear_second_moment(x[:1], noise).sum(axis=1)), found[:1], rtol=1e-8)
    expert = TwoLayer(np.array([[3.0], [4.0]]), np.array([[2.0, 1.0]]))
    found = expert_neuron_norm_bound(np.ones((1, 2)), expert, 0.1)
    np.testing.assert_allclose(found, 0.1 * 5 * np.sqrt(5), rtol=1e-6)
    # Of neurons that share an output norms add up, `sum |w_i| |V_i|`, or all go by the spectral norm.
    shared = TwoLayer(np.array([[3.0, 1.0], [4.0, 0.0]]), np.array([[1.0], [1.0]]))
    np.testing.assert_allclose(expert_neuron_norm_bound(np.ones((1, 2)), shared, 0.1), 0.1 * 6, rtol=1e-6)
    apart = TwoLayer(np.array([[3.0, 1.0], [4.0, 0.0]]), np.eye(2))
    np.testing.assert_allclose(expert_neuron_norm_bound(np.ones((1, 2)), apart, 0.1), 0.1 * np.sqrt(26), rtol=1e-6)
    for c in (-1.0, float("nan")):
        with pytest.raises(InputError, match="noise_scale="):
            neuron_norm_bound(x, w, c)


def test_neurons_at_their_threshold_stay_below_neuron_norms() -> None:
    """Eight neurons with w.x = 0 and one vote: noise of any size moves them all one way."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(6, 8))
    x = np.ones((1, 6))
    w -= w.mean(axis=0)
    expert, still = TwoLayer(w, np.ones((8, 1))), Moments(np.zeros((8, 1)), np.zeros((8, 1)))
    for c in (1e-3, 1.0):
        noise = TwoLayerNoise(Moments(np.zeros(w.shape), np.square(c * w)), still)
        exact = two_layer_exact(x, expert, noise)
        assert exact[0] > c * np.sqrt(np.square(w).sum()) > 0  # more than independent errors would make
        assert exact <= expert_neuron_norm_bound(x, expert, c)
        assert exact <= two_layer_second_moment(x, expert, noise).rms
