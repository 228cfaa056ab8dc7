"""Second moments of noisy outputs: exact for one matrix, never exceeded for an expert, tight where they can be."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from hetmoe.analog.noise_moments import programming_moments
from hetmoe.analog.second_moment import (
    MOST_CURVED,
    ExpertNoise,
    Moments,
    expert_second_moment,
    linear_second_moment,
    sum_second_moment,
)
from hetmoe.analog.spec import analog_spec
from hetmoe.quantize.bounds.expert import Expert, activations
from hetmoe.quantize.bounds.silu import silu


def drawn(rng: np.random.Generator, size: tuple[int, int], spread: float, bias: float) -> Moments:
    return Moments(bias * rng.normal(size=size), spread * rng.random(size) ** 2)


def sample(rng: np.random.Generator, noise: Moments, count: int) -> np.ndarray:
    """Deviations `[count, K, N]`: neither Gaussian nor symmetric, of these moments."""
    skew = rng.exponential(size=(count, *noise.mean.shape)) - 1
    return noise.mean + np.sqrt(noise.variance) * skew


def run(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    a = x @ gate
    return (a * expit(a) * (x @ up)) @ down


def test_one_matrix_is_exact() -> None:
    rng = np.random.default_rng(0)
    noise, x = drawn(rng, (6, 4), 0.3, 0.2), rng.normal(size=(3, 6))
    squares = np.square(np.einsum("tk,ckn->ctn", x, sample(rng, noise, 100_000)))
    wanted = linear_second_moment(x, noise)
    error = squares.std(axis=0) / np.sqrt(len(squares))
    np.testing.assert_array_less(np.abs(squares.mean(axis=0) - wanted), 5 * error)
    assert (error < 0.02 * wanted).all()
    unbiased = linear_second_moment(x, Moments(np.zeros((6, 4)), noise.variance))
    assert np.abs(squares.mean(axis=0) / unbiased - 1).max() > 0.1  # the mean counts


def test_the_curvature_of_silu_is_at_most_a_half() -> None:
    z = np.linspace(-20, 20, 400_001)
    s = expit(z)
    curved = s * (1 - s) * (2 + z * (1 - 2 * s))
    assert np.abs(curved).max() <= MOST_CURVED == curved[200_000]
    numeric = (silu(z + 1e-4) - 2 * silu(z) + silu(z - 1e-4)) / 1e-8
    np.testing.assert_allclose(numeric, curved, atol=1e-5)  # rounding of 20 u / 1e-8


@dataclasses.dataclass
class Case:
    x: np.ndarray
    expert: Expert
    noise: ExpertNoise

    def bounds(self):
        return expert_second_moment(self.x, activations(self.x, self.expert), self.expert, self.noise)

    def measured(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(|mean change|, mean square, its standard error)."""
        parts = [sample(rng, getattr(self.noise, n), count) for n in ("gate", "up", "down")]
        noisy = [w + d for w, d in zip(self.expert.matrices, parts, strict=True)]
        a = np.einsum("tk,ckn->ctn", self.x, noisy[0])
        h = a * expit(a) * np.einsum("tk,ckn->ctn", self.x, noisy[1])
        change = np.einsum("ctn,cnm->ctm", h, noisy[2]) - run(self.x, *self.expert.matrices)
        squares = np.square(change).sum(axis=2)
        return np.linalg.norm(change.mean(axis=0), axis=1), squares.mean(axis=0), squares.std(axis=0) / np.sqrt(count)


def made(seed: int, hidden: int, inner: int, weight: float, spread: float, bias: float, size: float) -> Case:
    rng = np.random.default_rng(seed)
    shapes = ((hidden, inner), (hidden, inner), (inner, hidden))
    expert = Expert(*(weight * rng.normal(size=s) / np.sqrt(s[0]) for s in shapes))
    noise = ExpertNoise(
        *(drawn(rng, s, spread * weight / np.sqrt(s[0]), bias * weight / np.sqrt(s[0])) for s in shapes)
    )
    return Case(size * rng.normal(size=(4, hidden)), expert, noise)


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31), hidden=st.integers(1, 9), inner=st.integers(1, 9), weight=st.floats(0.1, 8),
    spread=st.floats(0, 2), bias=st.floats(0, 1), size=st.floats(0.01, 10),
)  # fmt: skip
def test_no_mean_square_is_above_its_bound(
    seed: int, hidden: int, inner: int, weight: float, spread: float, bias: float, size: float
) -> None:
    case = made(seed, hidden, inner, weight, spread, bias, size)
    bounds = case.bounds()
    _, square, error = case.measured(np.random.default_rng(seed + 1), 2000)
    rounding = 1e-13 * np.abs(case.x).sum() ** 2 * np.prod([np.abs(w).sum() for w in case.expert.matrices])
    assert (square - 5 * error <= np.square(bounds.rms + rounding)).all()
    assert (bounds.mean <= bounds.rms * (1 + 1e-12)).all()


def test_the_mean_change_is_below_its_bound() -> None:
    for seed in range(5):
        case = made(seed, 6, 8, 1.0, 0.05, 0.02, 1.0)
        mean, square, _ = case.measured(np.random.default_rng(seed), 40_000)
        # The norm of a mean of n samples is above the true one by at most about rms / sqrt(n).
        assert (mean - 5 * np.sqrt(square / 40_000) <= case.bounds().mean).all()
        assert (case.bounds().mean < 0.9 * case.bounds().rms).any()


def only(case: Case, name: str) -> Case:
    """Noise of one matrix, without its mean."""
    parts = {n: getattr(case.noise, n) for n in ("gate", "up", "down")}
    kept = {n: Moments(0 * m.mean, m.variance * (n == name)) for n, m in parts.items()}
    return dataclasses.replace(case, noise=ExpertNoise(**kept))


@pytest.mark.parametrize("name", ["up", "down"])
def test_it_is_exact_where_the_output_is_linear_in_the_noise(name: str) -> None:
    """Noise of up or down alone, without mean: independent terms, whose variances add up."""
    case = only(made(3, 7, 5, 1.0, 0.3, 0.0, 1.0), name)
    before = activations(case.x, case.expert)
    if name == "down":
        wanted = np.square(before.hidden) @ case.noise.down.variance.sum(axis=1)
    else:
        spread = np.square(silu(before.gate)) * (np.square(case.x) @ case.noise.up.variance)
        wanted = spread @ np.square(case.expert.down).sum(axis=1)
    np.testing.assert_allclose(np.square(case.bounds().rms), wanted, rtol=1e-6)


def test_small_noise_of_gate_is_bounded_by_the_steepest_slope_only() -> None:
    case = only(made(4, 7, 5, 1.0, 1e-6, 0.0, 1.0), "gate")
    _, square, _ = case.measured(np.random.default_rng(0), 20_000)
    ratio = np.sqrt(square) / case.bounds().rms
    assert (ratio > 0.15).all() and (ratio <= 1).all()


def test_every_term_is_needed() -> None:
    """Cases in which one term of the bounds is all that there is, or without which they would be violated."""
    case = made(5, 6, 5, 1.0, 0.6, 0.0, 1.0)
    gate, up, down = case.expert.matrices
    # Down is noise alone: what moves are h + dh.
    noise_alone = dataclasses.replace(case, expert=Expert(gate * 0.05, up * 0.05, 0 * down))
    _, square, error = noise_alone.measured(np.random.default_rng(0), 20_000)
    assert (square + 5 * error <= np.square(noise_alone.bounds().rms)).all()
    quiet = activations(noise_alone.x, noise_alone.expert).hidden
    assert (square - 5 * error > np.square(quiet) @ case.noise.down.variance.sum(axis=1)).all()
    # Noise of gate without mean: SiLU's curvature moves the output on average.
    curved = only(made(6, 6, 5, 1.0, 2.0, 0.0, 2.0), "gate")
    mean, square, _ = curved.measured(np.random.default_rng(0), 100_000)
    assert (mean <= curved.bounds().mean).all() and (mean > 10 * np.sqrt(square / 100_000)).any()
    # Down is moved by a mean alone: |B^T h|, exactly.
    zero = Moments(0 * gate, 0 * gate)
    moved = dataclasses.replace(case, noise=ExpertNoise(zero, zero, Moments(0.3 * down, 0 * down)))
    wanted = np.linalg.norm(activations(case.x, case.expert).hidden @ (0.3 * down), axis=1)
    for found in dataclasses.astuple(moved.bounds()):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    # Gate and up are noise alone: only the product of both deviations is left.
    both = dataclasses.replace(
        case, expert=Expert(0 * gate, 0 * up, down),
        noise=ExpertNoise(case.noise.gate, case.noise.up, Moments(0 * down, 0 * down)),
    )  # fmt: skip
    _, square, error = both.measured(np.random.default_rng(0), 20_000)
    assert (square > 5 * error).all() and (square <= np.square(both.bounds().rms)).all()


def test_sums_of_experts() -> None:
    rng = np.random.default_rng(5)
    cases = [made(s, 5, 6, 1.0, 0.2, 0.1, 1.0) for s in (1, 2, 3)]
    x = cases[0].x
    cases = [dataclasses.replace(case, x=x) for case in cases]
    weights = rng.random((4, 3))
    changes = []
    for case in cases:
        parts = [sample(rng, getattr(case.noise, n), 4000) for n in ("gate", "up", "down")]
        noisy = [w + d for w, d in zip(case.expert.matrices, parts, strict=True)]
        a = np.einsum("tk,ckn->ctn", x, noisy[0])
        h = a * expit(a) * np.einsum("tk,ckn->ctn", x, noisy[1])
        changes.append(np.einsum("ctn,cnm->ctm", h, noisy[2]) - run(x, *case.expert.matrices))
    together = np.einsum("te,ectm->ctm", weights, np.stack(changes))
    square = np.square(together).sum(axis=2)
    bounds = [case.bounds() for case in cases]
    mean, rms = (np.stack([getattr(b, n) for b in bounds], axis=1) for n in ("mean", "rms"))
    bound = sum_second_moment(weights, mean, rms)
    assert (square.mean(axis=0) - 5 * square.std(axis=0) / np.sqrt(4000) <= np.square(bound)).all()
    assert (bound < np.sum(weights * rms, axis=1)).all()  # independence helps
    fixed = sum_second_moment(weights, rms, 0 * rms)
    np.testing.assert_allclose(fixed, np.sum(weights * rms, axis=1), rtol=1e-8)


@pytest.mark.parametrize("device", ["pcm", "hermes", "afm", "additive", "proportional", "reram_cmo"])
def test_published_devices(device: str) -> None:
    """Their own draws: programming of an expert, against bounds from its moments."""
    import jax.numpy as jnp

    from hetmoe.analog.programming import program_matrix

    rng = np.random.default_rng(7)
    spec = analog_spec(device, noise_scale=2.0)
    expert = Expert(
        *(rng.normal(size=s).astype(np.float32).astype(np.float64) / 4 for s in ((12, 10), (12, 10), (10, 12)))
    )
    x = rng.normal(size=(3, 12))
    noise = ExpertNoise(*(
        Moments(*(np.asarray(m, np.float64) for m in (f.mean, f.variance)))
        for f in (programming_moments(jnp.asarray(w, jnp.float32), spec) for w in expert.matrices)
    ))  # fmt: skip
    bound = expert_second_moment(x, activations(x, expert), expert, noise).rms

    @jax.jit
    def programmed(key: jax.Array) -> list[jax.Array]:
        return [
            program_matrix(jax.random.fold_in(key, n), jnp.asarray(w, jnp.float32), spec, expert=0)
            for n, w in enumerate(expert.matrices)
        ]

    chips = [programmed(key) for key in jax.random.split(jax.random.key(0), 400)]
    clean = run(x, *expert.matrices)
    square = np.stack([
        np.square(run(x, *(np.asarray(w, np.float64) for w in chip)) - clean).sum(axis=1) for chip in chips
    ])  # fmt: skip
    error = square.std(axis=0) / np.sqrt(len(chips))
    assert (square.mean(axis=0) - 5 * error <= np.square(bound)).all()
    assert (np.sqrt(square.mean(axis=0)) > 0.2 * bound).all()  # within a factor of 5
