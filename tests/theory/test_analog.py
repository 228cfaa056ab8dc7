"""Mixtures on crossbars are what hetmoe programs and multiplies; tolerances against a search of all scales."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from hetmoe.analog.devices import DEVICES
from hetmoe.analog.programming import matrix_key, program_matrix
from hetmoe.analog.spec import analog_spec
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from tests.theory.test_model import SPECS, mixture_of
from theory.analog import (
    Bench,
    draw_chip,
    make_bench,
    mixed_accuracy,
    noisy_outputs,
    output_errors,
    program_mixture,
)
from theory.data import DataSpec
from theory.model import ModelSpec, expert_outputs, forward, margins, routing_weights
from theory.tolerance import HALVINGS, SCALES, first_failure, highest, sensitivities, tolerances
from theory.train import TrainSpec, make_test

KEY = jax.random.key(9)
DATA = DataSpec(patterns=6, sequence=4, classes=2, levels=1)
SPEC = SPECS[0]
TRAINED = ModelSpec(dim=6, experts=4, neurons=3, gated=True, trained_output=True)


def bench_of(data: DataSpec = DATA, spec: ModelSpec = SPEC, seed: int = 0) -> tuple[Bench, jax.Array]:
    dictionary = jax.random.orthogonal(jax.random.key(seed), 6)
    test = make_test(KEY, dictionary, TrainSpec(data=data, model=spec, tests=25))
    return make_bench(mixture_of(spec), dictionary, test, data, spec), dictionary


@pytest.mark.parametrize("device", list(DEVICES))
def test_chips_hold_what_hetmoe_programs(device: str) -> None:
    mixture, analog = mixture_of(TRAINED), analog_spec(device, noise_scale=1.7)
    held = program_mixture(mixture, draw_chip(KEY, mixture, TRAINED), TRAINED, analog, analog.noise_scale)
    for name in ("gate", "up", "down"):
        for expert in range(4):
            w = getattr(mixture, name)[expert]
            wanted = program_matrix(matrix_key(KEY, name, 0), w, analog, expert=expert)
            np.testing.assert_allclose(getattr(held, name)[expert], wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(held.router, mixture.router)
    fixed = program_mixture(mixture_of(SPEC), draw_chip(KEY, mixture_of(SPEC), SPEC), SPEC, analog, analog.noise_scale)
    np.testing.assert_array_equal(fixed.down, mixture_of(SPEC).down)  # votes are not on crossbars


def test_products_pass_the_converters() -> None:
    mixture, analog = mixture_of(SPEC), analog_spec("pcm", dac_bits=4, adc_bits=5, adc_bound=2.0)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6)), jnp.float32)
    draws = draw_chip(KEY, mixture, SPEC)
    held = program_mixture(mixture, draws, SPEC, analog, jnp.float32(0.5))
    found = noisy_outputs(mixture, draws, x, SPEC, analog, jnp.float32(0.5))
    for expert in range(4):
        products = crossbar_matmul(x, held.up[expert], dac_bits=4, adc_bits=5, adc_bound=2.0)
        wanted = np.maximum(np.asarray(products), 0) @ np.asarray(mixture.down[expert])
        np.testing.assert_allclose(found[:, expert], wanted, rtol=1e-5, atol=1e-6)


def token_weights(test: Any) -> np.ndarray:
    """`[levels, count, sequence, experts]`."""
    router = mixture_of(SPEC).router
    return np.asarray(jax.vmap(lambda tokens: routing_weights(router, tokens, SPEC))(test.tokens))


def of_tokens(made: np.ndarray, test: Any) -> np.ndarray:
    """What experts made of all tokens, `[levels, count, sequence, ...]`, looked up if it is of patterns."""
    return made if test.tokens.ids is None else made[np.asarray(test.drawn.ids)]


@pytest.mark.parametrize("data", [DATA, DataSpec(patterns=6, sequence=4, levels=1, token_noise=0.2)])
def test_a_bench_is_the_model(data: DataSpec) -> None:
    """Without noise, and with a noisy expert whose outputs are put in by hand."""
    bench, dictionary = bench_of(data)
    mixture = mixture_of(SPEC)
    test = make_test(KEY, dictionary, TrainSpec(data=data, model=SPEC, tests=25))
    outputs = jax.vmap(lambda tokens: forward(mixture, tokens, SPEC))(test.tokens)
    clean = np.mean(np.asarray(margins(outputs, test.drawn.label)) > 0, axis=1)
    nothing, everything = jnp.zeros(4, bool), jnp.ones(4, bool)
    np.testing.assert_allclose(mixed_accuracy(bench, bench.clean[None], nothing[None])[0], clean)
    noisy = bench.clean[None] + jnp.asarray(np.random.default_rng(1).normal(size=(3, *bench.clean.shape)), jnp.float32)
    np.testing.assert_allclose(mixed_accuracy(bench, noisy, everything[None])[0], clean)
    one = jnp.asarray([True, True, False, True])
    wanted = []
    for made in np.asarray(noisy):
        mixed = np.asarray(bench.clean).copy()
        mixed[..., 2, :] = made[..., 2, :]
        out = np.einsum("lbje,lbje->lb", token_weights(test), of_tokens(mixed, test)[..., 0])
        wanted.append(((out * (2 * np.asarray(bench.label) - 1)) > 0).mean(axis=1))
    both = jnp.stack([nothing, one])
    np.testing.assert_allclose(mixed_accuracy(bench, noisy, both)[1], np.mean(wanted, axis=0), rtol=1e-6)


def test_errors_of_single_experts() -> None:
    bench, dictionary = bench_of()
    test = make_test(KEY, dictionary, TrainSpec(data=DATA, model=SPEC, tests=25))
    noisy = bench.clean[None] + jnp.asarray(np.random.default_rng(1).normal(size=(3, *bench.clean.shape)), jnp.float32)
    found = output_errors(bench, noisy)
    for expert in range(4):
        off = np.stack([of_tokens(made - np.asarray(bench.clean), test)[..., expert, 0] for made in np.asarray(noisy)])
        wanted = np.square((token_weights(test)[..., expert] * off).sum(axis=-1)).mean()
        np.testing.assert_allclose(found[expert], wanted, rtol=1e-5)
    analog = analog_spec("additive", noise_scale=0.3, dac_bits=None, adc_bits=None)
    mixture, chips = mixture_of(SPEC), jax.random.split(KEY, 3)
    stacked = jax.tree.map(lambda leaf: leaf[None], (mixture, bench))
    made = jnp.stack(
        [
            noisy_outputs(mixture, draw_chip(chip, mixture, SPEC), bench.inputs, SPEC, analog, analog.noise_scale)
            for chip in chips
        ]
    )
    whole = sensitivities(*stacked, chips[None], SPEC, analog)[0]
    np.testing.assert_allclose(whole, output_errors(bench, made), rtol=1e-4)


def fitted(seed: int) -> tuple[Bench, object]:
    """A mixture that is right about all of its test sequences: labels are what it says of them."""
    bench, _ = bench_of()
    mixture = mixture_of(SPEC, seed)
    clean = expert_outputs(mixture, bench.inputs, SPEC)
    out = jnp.einsum("lbpe,peo->lbo", bench.weights, clean)
    return bench._replace(clean=clean, label=(out[..., 0] > 0).astype(bench.label.dtype)), mixture


@pytest.mark.parametrize("device", ["additive", "pcm"])
def test_tolerance_is_the_first_scale_that_fails(device: str) -> None:
    analog = analog_spec(device, dac_bits=None, adc_bits=None)
    chips = jax.random.split(KEY, (3, 4))
    digital = jnp.asarray([[False] * 4, [True, False, False, False], [True] * 4])
    runs = [fitted(seed) for seed in (1, 2, 3)]
    benches, mixtures = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts) for parts in zip(*runs, strict=True))
    found = tolerances(mixtures, benches, chips, jnp.broadcast_to(digital, (3, 3, 4)), SPEC, analog)
    assert np.isinf(np.asarray(found)[:, 2]).all()  # nothing is noisy

    @jax.jit
    def accuracies(scale, mixture, bench, chips, where):
        made = jax.vmap(
            lambda chip: noisy_outputs(mixture, draw_chip(chip, mixture, SPEC), bench.inputs, SPEC, analog, scale)
        )(chips)
        return mixed_accuracy(bench, made, where[None]).min()

    width = 2 ** (0.5 / 2**HALVINGS)
    for run, (bench, mixture) in enumerate(runs):
        for place in range(2):
            c = float(found[run, place])
            grid = [s for s in SCALES if s < c / width]
            assert all(
                float(accuracies(jnp.float32(s), mixture, bench, chips[run], digital[place])) >= 0.99 for s in grid
            )
            # Just above the bisected end it fails, and just below it does not.
            assert float(accuracies(jnp.float32(c * width), mixture, bench, chips[run], digital[place])) < 0.99
            assert float(accuracies(jnp.float32(c / width), mixture, bench, chips[run], digital[place])) >= 0.99


def test_the_first_failure_goes_up_and_stops_at_the_first() -> None:
    """Of failures that end again at larger scales; to 1.1 %."""
    digital = jnp.eye(6, dtype=bool)
    # By placement: [from, to] where it fails, besides everything above `last`.
    begin, end = jnp.asarray([2.0, 0.3, 700.0, 5e3, 0.0, 0.004]), jnp.asarray([4.0, 0.6, 1e9, 1e9, 1e9, 1e9])
    last = jnp.asarray([100.0, 50.0, 1e9, 1e9, 1e9, 1e9])

    def fails(scale: Array, digital: Array) -> Array:
        pick = jnp.argmax(digital, axis=1)
        return ((begin[pick] <= scale) & (scale <= end[pick])) | (scale >= last[pick])

    found = np.asarray(jax.jit(lambda d: first_failure(fails, d))(digital))
    np.testing.assert_allclose(found[:3], [2.0, 0.3, 700.0], rtol=0.011)
    assert np.isinf(found[3]) and found[4] == 0 and found[5] == 0  # never; without noise; below the first scale
    assert SCALES[0] == 0.01 and 1000 < SCALES[-1] < 2000


def test_every_level_counts() -> None:
    """Two levels, of which only the second is wrong."""
    data = DataSpec(patterns=6, sequence=4, levels=2)
    bench, _ = bench_of(data)
    mixture = mixture_of(SPEC)
    out = jnp.einsum("lbpe,peo->lbo", bench.weights, bench.clean)
    right = (out[..., 0] > 0).astype(bench.label.dtype)
    for wrong, wanted in ((0, 0.0), (1, 0.0), (None, np.inf)):
        label = right if wrong is None else right.at[wrong].set(1 - right[wrong])
        stacked = jax.tree.map(lambda leaf: leaf[None], (mixture, bench._replace(label=label)))
        everything = jnp.ones((1, 1, 4), bool)
        found = tolerances(*stacked, jax.random.split(KEY, (1, 2)), everything, SPEC, analog_spec("additive"))
        assert float(found[0, 0]) == wanted


def test_a_mixture_that_is_wrong_without_noise_has_no_tolerance() -> None:
    bench, mixture = fitted(1)
    bench = bench._replace(label=1 - bench.label)
    stacked = jax.tree.map(lambda leaf: leaf[None], (mixture, bench))
    found = tolerances(
        *stacked, jax.random.split(KEY, (1, 2)), jnp.zeros((1, 1, 4), bool), SPEC, analog_spec("additive")
    )
    assert float(found[0, 0]) == 0.0


def test_the_highest() -> None:
    scores = jnp.asarray([[3.0, 1.0, 3.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    assert np.asarray(highest(scores, 2)).tolist() == [[True, False, True, False], [True, True, False, False]]
