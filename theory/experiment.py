"""One setting: training over frequencies and seeds, and tolerances at three times of stopping, on some hardware."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.errors import InputError
from theory.analog import Bench, make_bench
from theory.data import level_probabilities
from theory.model import Mixture, neuron_norm_scores
from theory.tolerance import highest, sensitivities, tolerances
from theory.train import Look, Test, TrainSpec, learned, train

# When training stops: at the first look at which a mixture has learned all levels; at the first at which those of its
# seed have at all frequencies; after all steps.
STOPS = ("early", "together", "saturated")
PLACEMENTS = ("all analog", "high scores digital", "random digital")


class Hardware(NamedTuple):
    """A device, with or without 8-bit converters."""

    device: str
    converters: bool

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.device}, {'with' if self.converters else 'without'} converters"

    def spec(self, scale: float = 1.0) -> AnalogSpec:
        """As hetmoe takes it, with dynamic DAC ranges."""
        bits = 8 if self.converters else None
        return analog_spec(self.device, noise_scale=scale, dac_bits=bits, adc_bits=bits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is run.

    Attributes:
        train: data, structure and training.
        gammas: probabilities of the rare pattern, falling.
        seeds: number.
        seed: of all keys.
        chips: noise seeds of a mixture's tolerance.
        hardware: on which tolerances are found.
        digital: experts that are digital in the placements beside all analog.

    Raises:
        InputError: for values out of range.
    """

    train: TrainSpec = dataclasses.field(default_factory=TrainSpec)
    gammas: tuple[float, ...] = (0.4, 0.2, 0.1, 0.05, 0.025)
    seeds: int = 16
    seed: int = 0
    chips: int = 16
    hardware: tuple[Hardware, ...] = (Hardware("proportional", False),)
    digital: int = 4

    def __post_init__(self) -> None:
        if not self.gammas or any(not 0 < gamma < 1 for gamma in self.gammas):
            raise InputError(f"gammas={self.gammas} must be probabilities between 0 and 1")
        if self.seeds < 2 or self.chips < 1 or self.seed < 0:
            raise InputError(
                f"seeds={self.seeds} must be at least 2, chips={self.chips} at least 1 and seed={self.seed} at least 0"
            )
        if self.train.data.levels < 2:
            raise InputError(f"levels={self.train.data.levels} must be at least 2: a frequent and a rare one")
        if not 0 < self.digital < self.train.model.experts:
            raise InputError(f"digital={self.digital} must be from 1 to {self.train.model.experts - 1}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Of all runs; arrays are `[gammas, seeds, ...]`.

    Attributes:
        plan: what was run.
        looks: at every mixture while it was trained.
        stopped: look at which each mixture stops, by stopping rule; the last where it never learns.
        learned: whether it has learned by then, by stopping rule; of `together` all mixtures of its seed.
        scores: MaxNNScore of every expert, by stopping rule.
        tolerances: c* of `PLACEMENTS`, by stopping rule and hardware.
        errors: mean square change of outputs by each expert's noise, by stopping rule and hardware.
    """

    plan: Plan
    looks: Look
    stopped: dict[str, Int[np.ndarray, "gammas seeds"]]
    learned: dict[str, Bool[np.ndarray, "gammas seeds"]]
    scores: dict[str, Float[np.ndarray, "gammas seeds experts"]]
    tolerances: dict[tuple[str, Hardware], Float[np.ndarray, "gammas seeds placements"]]
    errors: dict[tuple[str, Hardware], Float[np.ndarray, "gammas seeds experts"]]

    @property
    def frequencies(self) -> Float[np.ndarray, "gammas levels"]:
        """Probabilities of the levels."""
        levels = self.plan.train.data.levels
        return np.stack([np.asarray(level_probabilities(g, levels), np.float64) for g in self.plan.gammas])

    def look(self, stop: str) -> Look:
        """At the time of a stopping rule."""
        rows, columns = np.indices(self.stopped[stop].shape)
        return Look(*(values[rows, columns, self.stopped[stop]] for values in self.looks))


def stops(accuracy: Float[np.ndarray, "gammas seeds looks levels"]) -> dict[str, Int[np.ndarray, "gammas seeds"]]:
    """The look of every stopping rule for every mixture; the last look where a mixture does not learn."""
    good = np.asarray(learned(jnp.asarray(accuracy)))
    last = np.full(good.shape[:2], good.shape[2] - 1)
    early = np.where(good.any(axis=2), good.argmax(axis=2), last)
    return {"early": early, "together": np.broadcast_to(early.max(axis=0), early.shape), "saturated": last}


def measure(plan: Plan) -> Measured:
    """Trains and measures."""
    keys = jax.random.split(jax.random.key(plan.seed), 3)
    trained = train(jax.random.split(keys[0], plan.seeds), jnp.asarray(plan.gammas, jnp.float32), plan.train)
    looks = jax.tree.map(np.asarray, trained.looks)
    shape, stopped = looks.accuracy.shape[:2], stops(looks.accuracy)
    # A seed has chips of its own, the same at all frequencies and times.
    chips = jax.vmap(lambda key: jax.random.split(key, plan.chips))(jax.random.split(keys[1], plan.seeds))
    chips = jnp.tile(chips, (len(plan.gammas), 1))
    rows, columns = np.indices(shape)
    able, scores, found, errors = {}, {}, {}, {}
    for stop in STOPS:
        able[stop] = np.asarray(learned(jnp.asarray(looks.accuracy[rows, columns, stopped[stop]])))
        if stop == "together":
            able[stop] = np.broadcast_to(able[stop].all(axis=0), shape)
        mixtures = jax.tree.map(lambda leaf, at=stopped[stop]: _runs(leaf[rows, columns, at]), trained.mixtures)
        benches = _benches(mixtures, _runs(trained.dictionary), jax.tree.map(_runs, trained.test), plan.train)
        score = jax.vmap(neuron_norm_scores)(mixtures)
        scores[stop] = _rows(score, shape)
        digital = jnp.stack(
            [
                jnp.zeros(score.shape, bool), highest(score, plan.digital),
                highest(jax.random.uniform(keys[2], score.shape), plan.digital),
            ],
            axis=1,
        )  # fmt: skip
        for hardware in plan.hardware:
            spec = hardware.spec()
            each = tolerances(mixtures, benches, chips, digital, plan.train.model, spec)
            found[stop, hardware] = _rows(each, shape)
            errors[stop, hardware] = _rows(sensitivities(mixtures, benches, chips, plan.train.model, spec), shape)
    return Measured(
        plan=plan, looks=looks, stopped=stopped, learned=able, scores=scores, tolerances=found, errors=errors
    )  # fmt: skip


@partial(jax.jit, static_argnames="spec")
def _benches(mixtures: Mixture, dictionaries: Array, tests: Test, spec: TrainSpec) -> Bench:
    return jax.vmap(lambda m, d, t: make_bench(m, d, t, spec.data, spec.model))(mixtures, dictionaries, tests)


def _runs(leaf: Array) -> Array:
    return leaf.reshape(-1, *leaf.shape[2:])


def _rows(values: Any, shape: Sequence[int]) -> np.ndarray:
    return np.asarray(values, np.float64).reshape(*shape, *values.shape[1:])
