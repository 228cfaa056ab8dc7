"""Tails of experts, by hand."""

import numpy as np

from hetmoe.analog.error_tail import linear_tail
from hetmoe.analog.expert_tail import ExpertSlopes, TwoLayerSlopes, expert_tail, two_layer_tail
from hetmoe.analog.second_moment import ExpertNoise, Moments
from hetmoe.analog.two_layer import (
    TwoLayer,
    TwoLayerNoise,
)  # fmt: skip
from hetmoe.quantize.bounds.expert import Expert


def test_tails_of_experts_by_hand() -> None:
    """One neuron, one input: every term is a number."""
    one, still = np.ones((1, 1)), np.zeros((1, 1))
    x, expert = np.array([[2.0]]), TwoLayer(3 * one, -4 * one)
    reach = np.sqrt(2 * np.log(4 / 0.1))
    noise, slopes = TwoLayerNoise(Moments(still, 0.01 * one), Moments(0.2 * one, 0.04 * one)), (0.1 * one, 0.2 * one)
    moved = 2 * 0.1 * (1 + reach)
    last = 6 * np.sqrt(0.04 + 0.04) + reach * 6 * 0.2 + moved * (np.sqrt(0.04 + 0.04) + reach * 0.2)
    found = two_layer_tail(x, expert, noise, TwoLayerSlopes(*slopes), 0.1)
    np.testing.assert_allclose(found, 4 * moved + last, rtol=1e-6)
    gated = Expert(3 * one, 5 * one, -4 * one)
    noises = ExpertNoise(Moments(still, 0.04 * one), Moments(still, 0.01 * one), noise.down)
    reach, silu = np.sqrt(2 * np.log(6 / 0.1)), 6 / (1 + np.exp(-6))
    da, du, steepest = 2 * 0.2 * (1 + reach), 2 * 0.1 * (1 + reach), 1.09984
    moved = steepest * da * 10 + silu * du + steepest * da * du
    last = silu * 10 * (np.sqrt(0.08) + reach * 0.2) + moved * (np.sqrt(0.08) + reach * 0.2)
    found = expert_tail(x, gated, noises, ExpertSlopes(0.2 * one, *slopes), 0.1)
    np.testing.assert_allclose(found, 4 * moved + last, rtol=1e-6)


def test_the_moment_of_the_kept_part_lowers_the_tail_of_a_two_layer_expert() -> None:
    """Many neurons that are off: they do not move to first order, though their inputs do."""
    rng = np.random.default_rng(0)
    expert = TwoLayer(np.concatenate([np.full((1, 50), -5.0), np.ones((1, 1))], axis=1), rng.normal(size=(51, 51)))
    noise = TwoLayerNoise(Moments(np.zeros((1, 51)), np.full((1, 51), 1e-4)), Moments(*np.zeros((2, 51, 51))))
    slopes = TwoLayerSlopes(np.full((1, 51), 1e-2), np.zeros((51, 51)))
    norm, x = np.linalg.norm(expert.down, 2), np.ones((1, 1))
    by_norm = norm * linear_tail(x, noise.up, slopes.up, 0.1 / 4)
    assert two_layer_tail(x, expert, noise, slopes, 0.1)[0] < by_norm[0]
