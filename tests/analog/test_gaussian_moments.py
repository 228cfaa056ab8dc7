"""Moments of experts with Gaussian noise against draws, first order, and another quadrature."""

import numpy as np
import pytest
from scipy import integrate
from scipy.special import expit

from hetmoe.analog.gaussian_moments import relu_moves, swiglu_exact, two_layer_exact
from hetmoe.analog.second_moment import ExpertNoise, Moments, expert_second_moment
from hetmoe.analog.two_layer import (
    TwoLayer,
    TwoLayerNoise,
    two_layer,
    two_layer_second_moment,
)  # fmt: skip
from hetmoe.quantize.bounds.expert import Expert, activations
from theory.cases import root_mean_square

CHIPS = 100_000


@pytest.mark.parametrize("kind", ["two-layer", "gated"])
def test_exact_moments_of_gaussian_noise(kind: str) -> None:
    """With biases as well: noise whose mean is not 0 is put in by hand."""
    rng = np.random.default_rng(3)
    x, shapes = rng.normal(size=(2, 5)), [(5, 4), (5, 4), (4, 5)]
    clean = [rng.normal(size=shape) for shape in shapes]
    noise = [Moments(0.3 * rng.normal(size=s), rng.uniform(0.01, 0.5, s)) for s in shapes]
    held = [
        w + n.mean + np.sqrt(n.variance) * rng.normal(size=(CHIPS, *w.shape)) for w, n in zip(clean, noise, strict=True)
    ]
    up, gate = (np.einsum("tk,ckn->ctn", x, part) for part in (held[1], held[0]))
    if kind == "two-layer":
        expert, of_noise = TwoLayer(*clean[1:]), TwoLayerNoise(*noise[1:])
        exact, bound = two_layer_exact(x, expert, of_noise), two_layer_second_moment(x, expert, of_noise).rms
        hidden, out = np.maximum(up, 0), two_layer(x, expert)
    else:
        expert, of_noise = Expert(*clean), ExpertNoise(*noise)
        exact = swiglu_exact(x, expert, of_noise)
        bound = expert_second_moment(x, activations(x, expert), expert, of_noise).rms
        hidden, out = gate / (1 + np.exp(-gate)) * up, activations(x, expert).out
    root, error = root_mean_square(np.einsum("ctn,cno->cto", hidden, held[2]) - out)
    assert (np.abs(root - exact) < 5 * error).all() and (error < 0.01 * root).all()
    assert (exact <= bound).all()


def test_moments_of_relu() -> None:
    mean, std = np.array([-1.0, 0.0, 2.0, 0.7, 3.0, -3.0, 0.0]), np.array([1.0, 0.5, 0.1, 2.0, 0.0, 0.0, 0.0])
    moved, variance = relu_moves(mean, std)
    z = np.maximum(mean + std * np.random.default_rng(0).normal(size=(400_000, 7)), 0)
    np.testing.assert_allclose(moved + np.maximum(mean, 0), z.mean(axis=0), atol=5 * 2.0 / np.sqrt(400_000))
    np.testing.assert_allclose(variance, z.var(axis=0), atol=5 * 4.0 / np.sqrt(400_000))
    assert not moved[4:].any() and not variance[4:].any()


@pytest.mark.parametrize("size", [1e-4, 1e-7, 1e-10])
def test_small_gaussian_noise_is_not_lost_in_rounding(size: float) -> None:
    """To first order it is linear, and its second moment that of the slopes."""
    rng = np.random.default_rng(4)
    x, (gate, up, down) = rng.normal(size=(3, 5)), (rng.normal(size=shape) for shape in ((5, 4), (5, 4), (4, 5)))
    noise = [Moments(np.zeros(w.shape), np.square(size * w)) for w in (gate, up, down)]
    a, u = x @ gate, x @ up
    s = 1 / (1 + np.exp(-a))
    spread = [np.square(x) @ one.variance for one in noise[:2]]

    def of_last(variance, hidden):
        return np.sqrt(variance @ np.square(down).sum(axis=1) + np.square(hidden) @ noise[2].variance.sum(axis=1))

    wanted = of_last(np.where(u > 0, spread[1], 0), np.maximum(u, 0))
    np.testing.assert_allclose(two_layer_exact(x, TwoLayer(up, down), TwoLayerNoise(*noise[1:])), wanted, rtol=1e-3)
    slope = s * (1 + a * (1 - s))
    wanted = of_last(np.square(slope * u) * spread[0] + np.square(a * s) * spread[1], a * s * u)
    np.testing.assert_allclose(swiglu_exact(x, Expert(gate, up, down), ExpertNoise(*noise)), wanted, rtol=1e-3)


@pytest.mark.parametrize("gate", [-3.0, 0.7, 5.0])
@pytest.mark.parametrize(("std", "accuracy"), [(0.1, 1e-9), (3.0, 1e-6), (10.0, 1e-3)])
def test_moments_of_silu(gate: float, std: float, accuracy: float) -> None:
    """One neuron, whose gate is noisy: against adaptive quadrature, to what `NODES` says."""
    one, none, up, down = np.ones((1, 1)), np.zeros((1, 1)), 2.0, 3.0
    noise = ExpertNoise(Moments(none, std**2 * one), Moments(none, none), Moments(none, none))

    def squared_move(z: float) -> float:
        noisy = gate + std * z
        return (noisy * expit(noisy) - gate * expit(gate)) ** 2 * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi)

    wanted = (
        np.sqrt(integrate.quad(squared_move, -12, 12, limit=400, points=[0.0], epsabs=0, epsrel=1e-11)[0]) * up * down
    )
    found = swiglu_exact(one, Expert(gate * one, up * one, down * one), noise)
    np.testing.assert_allclose(found, wanted, rtol=accuracy)
