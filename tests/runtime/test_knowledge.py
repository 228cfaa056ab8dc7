"""What is known beforehand, against chips that are drawn and numbers worked out by hand."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.programming import program
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.placement.noise_sensitivity import noise_sensitivity
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.deploy import deployed_weights, fresh_chips
from hetmoe.runtime.knowledge import AGES, Costs, Shrunk, fresh_noise, make_knowledge, noise_growth
from tests.models.tiny import random_tokens
from tests.runtime.small import CONFIG, DESCRIBED, SPEC, frequency, knowledge, model

WEIGHTS = 3 * 24 * 40


def parts(w: np.ndarray, held: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(|W|^2, <W, W'>, |W'|^2) of every expert, float64."""
    w, held = w.astype(np.float64), held.astype(np.float64)
    return tuple(np.sum(product, axis=(-2, -1)) for product in (w * w, w * held, held * held))  # type: ignore[return-value]


def test_expected_noise_is_that_of_drawn_chips() -> None:
    spec = dataclasses.replace(SPEC, time_s=None)
    found = fresh_noise(model().params, SPEC)
    targets = crossbar_matrices(model().params.layers, dense=False)
    chips = 24
    rest, off, size = (np.zeros((chips, 2, 4)) for _ in range(3))
    drawn = jax.jit(lambda key: program(key, model().params, spec, dense=False).layers)
    for number in range(chips):
        held = drawn(jax.random.key(number))
        each = [parts(np.asarray(targets[name]), np.asarray(held[name].w)) for name in EXPERT_MATRICES]
        size[number], along, square = np.sum(each, axis=0)
        scale = along / size[number]
        rest[number], off[number] = square / size[number] - scale**2, scale - 1
    np.testing.assert_allclose(found.size, size[0], rtol=1e-6)
    for values, wanted in ((rest, found.rest), (off, found.off)):
        error = values.std(axis=0, ddof=1) / np.sqrt(chips)
        assert (np.abs(values.mean(axis=0) - wanted) < 5 * error + 2e-3 * np.abs(wanted)).all()
    assert (found.rest > 0.01).all()


def test_growth_is_that_of_the_chip() -> None:
    fresh = fresh_noise(model().params, SPEC)
    key, age = jax.random.key(2), 86400.0
    found = noise_growth(key, model().params, SPEC, fresh, ages=(0.0, age))
    chips = fresh_chips(2, 4)
    held = deployed_weights(key, model().params, SPEC, chips.replace(age=jnp.full((2, 4), age))).layers
    targets, total = crossbar_matrices(model().params.layers, dense=False), 0.0
    for name in EXPERT_MATRICES:
        size, along, square = parts(np.asarray(targets[name]), np.asarray(held[name].w))
        total += np.sum(square / (along / size) ** 2 - size)
    np.testing.assert_allclose(found[1], total / np.sum(fresh.rest * fresh.size), rtol=1e-4)
    assert 0.9 < found[0] < found[1]


def test_losses_by_the_two_estimates() -> None:
    know = knowledge()
    label_key, _ = jax.random.split(jax.random.key(5))
    tokens = random_tokens(CONFIG, 1, (4, 12))
    spec = dataclasses.replace(SPEC, time_s=None)
    noise = noise_sensitivity(model(), tokens, spec, key=label_key, dense=False)
    assert (np.asarray(know.noise_loss) >= np.asarray(noise.variance.experts) * (1 - 1e-5)).all()
    total = np.asarray(noise.variance.experts + noise.bias.experts)
    assert (np.asarray(know.noise_loss) <= total * (1 + 1e-5)).all()
    off = np.square(fresh_noise(model().params, SPEC).off)
    beyond = np.maximum(np.asarray(noise.bias.experts) - np.asarray(know.scale_loss) * off, 0)
    np.testing.assert_allclose(know.noise_loss, np.asarray(noise.variance.experts) + beyond, rtol=1e-4)
    # What a change of scale loses goes with its square, whatever share it was measured at.
    small, large = (
        np.asarray(
            noise_sensitivity(
                model(), tokens, analog_spec(Shrunk(), noise_scale=share), key=label_key, dense=False
            ).bias.experts
        )
        for share in (0.05, 0.2)
    )
    np.testing.assert_allclose(large, 16 * small, rtol=1e-4)
    np.testing.assert_allclose(know.scale_loss, small / 0.05**2, rtol=1e-4)
    assert (np.asarray(know.scale_loss) > 0).all()


def test_energies_by_hand() -> None:
    know, analog, link = knowledge(), DESCRIBED["analog"], DESCRIBED["link"]
    tiles = 3  # each matrix fits one of 512 x 512
    assert CONFIG.hidden_size <= 512 and CONFIG.expert_intermediate_size <= 512
    np.testing.assert_allclose(know.move_energy, 2 * WEIGHTS * link.entries["link.energy"].value, rtol=1e-6)
    program = analog.entries["tile.programming_energy"].value
    operation = analog.entries["tile.operation_energy"].value
    np.testing.assert_allclose(know.program_energy, tiles * program, rtol=1e-6)
    np.testing.assert_allclose(know.probe_energy, 8 * tiles * operation, rtol=1e-6)
    np.testing.assert_allclose(know.analog_energy, np.full((2, 4), 0.5 * tiles * operation), rtol=1e-6)
    digital = DESCRIBED["digital"].entries
    bandwidth = digital["memory.bandwidth"].value * digital["memory.utilisation"].value
    read = (1 - 0.5**4) / 4  # a token's part of reading an expert that half of 4 tokens choose: bytes bind, not FLOPs
    wanted = digital["power.busy"].value * read * 2 * WEIGHTS / bandwidth
    np.testing.assert_allclose(know.digital_energy, np.full((2, 4), wanted), rtol=1e-5)
    price = np.sum(know.digital_energy - know.analog_energy) / np.sum(know.noise_loss)
    np.testing.assert_allclose(know.joules_per_nat, price, rtol=1e-5)
    assert np.asarray(know.ages).tolist() == [np.float32(age) for age in AGES]
    given = make(costs=Costs(batch=4, joules_per_nat=3.0))
    assert float(given.joules_per_nat) == 3.0


def make(**changes: Any) -> Any:
    given = DESCRIBED | {"costs": Costs(batch=4), "key": jax.random.key(5)} | changes
    spec = given.pop("spec", SPEC)
    return make_knowledge(model(), random_tokens(CONFIG, 1, (4, 12)), spec, frequency(), **given)


def test_what_a_policy_cannot_know() -> None:
    with pytest.raises(InputError, match="no drift model"):
        make(spec=analog_spec("additive"))
    analog = DESCRIBED["analog"]
    entries = {name: entry for name, entry in analog.entries.items() if name != "tile.programming_energy"}
    with pytest.raises(InputError, match="programming_energy"):
        make(analog=dataclasses.replace(analog, entries=entries))


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch": 0}, {"weight_bytes": -1.0}, {"probes": 0}, {"horizon_tokens": float("inf")}, {"margin": -0.1},
        {"stale": float("nan")}, {"dwell_s": -1.0}, {"action_share": float("inf")}, {"memory": 0.0}, {"memory": 1.5},
        {"joules_per_nat": 0.0},
    ],
)  # fmt: skip
def test_costs_out_of_range(wrong: dict[str, Any]) -> None:
    name = next(iter(wrong))
    with pytest.raises(InputError, match=name):
        Costs(**wrong)
