"""The main job: placements against noise scales over seeds, with means and standard errors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.run import Batches, Totals, evaluate_digital, evaluate_seeds
from hetmoe.models.hf import Model
from hetmoe.placement.plan import Plan, check_plan, place, stack_plans
from hetmoe.placement.scores import score_experts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A named line of the result: one plan for all seeds, or (random placement) one plan per seed."""

    name: str
    plans: Sequence[Plan]  # one, or as many as there are seeds

    @property
    def dense(self) -> bool:
        """Whether attention and LM head may be analog; such placements compile to a program of their own."""
        return self.plans[0].attention is not None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSize:
    """What the sums of an evaluation are divided by."""

    tokens: int
    bytes: int
    questions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One placement at one noise scale. Lists hold one value per seed; `deterministic` points have one."""

    placement: str
    noise_scale: float
    deterministic: bool
    perplexity: list[float]
    bits_per_byte: list[float]
    accuracy: list[float]

    def mean(self, metric: str) -> float:
        """Mean over seeds."""
        return float(np.mean(getattr(self, metric)))

    def standard_error(self, metric: str) -> float | None:
        """Standard error of the mean over seeds; None when there is no spread to estimate it from."""
        values = getattr(self, metric)
        return None if len(values) < 2 else float(np.std(values, ddof=1) / math.sqrt(len(values)))


def random_placement(name: str, model: Model, fraction: float, keys: jax.Array) -> Placement:
    """Experts kept digital at random, drawn anew for every seed, so that the mean is over placements too."""
    plans = [place(score_experts(model, "random", key=key), fraction) for key in keys]
    return Placement(name=name, plans=plans)


def _point(name: str, scale: float, totals: Totals, size: TextSize, *, deterministic: bool) -> Point:
    nll = np.atleast_1d(np.asarray(totals.nll, np.float64))
    correct = np.atleast_1d(np.asarray(totals.correct, np.float64))
    return Point(
        placement=name,
        noise_scale=scale,
        deterministic=deterministic,
        perplexity=np.exp(nll / size.tokens).tolist(),
        bits_per_byte=(nll / math.log(2) / size.bytes).tolist(),
        accuracy=(correct / size.questions).tolist(),
    )


def digital_point(model: Model, batches: Batches, size: TextSize) -> Point:
    """The model without any analog part: what all others are compared with."""
    totals = evaluate_digital(model.params, batches, model.config)
    return _point("all digital", 0.0, totals, size, deterministic=True)


def noise_sweep(
    model: Model,
    spec: AnalogSpec,
    calibration: Calibration | None,
    placements: Sequence[Placement],
    noise_scales: Sequence[float],
    keys: jax.Array,
    batches: Batches,
    size: TextSize,
    *,
    progress: Callable[[int], Any],
) -> list[Point]:
    """Evaluates every placement at every noise scale over all seeds (`keys`).

    At scale 0 of a device without drift or read noise nothing is random but the placement, so one seed is run.

    Args:
        model: the model, in the dtype to run it in.
        spec: analog hardware; its noise scale is replaced by those of the sweep.
        calibration: DAC ranges; None = dynamic.
        placements: lines of the result.
        noise_scales: values of c.
        keys: one noise key per seed.
        batches: text and questions.
        size: what the sums are divided by.
        progress: called with the number of finished (placement, scale, seed) evaluations, after each compiled call.

    Raises:
        InputError: for placements of another model, or a placement with neither one plan nor one per seed.
    """
    seeds = len(keys)
    for placement in placements:
        if len(placement.plans) not in (1, seeds):
            raise InputError(f"placement {placement.name!r} has {len(placement.plans)} plans for {seeds} seeds")
        for plan in placement.plans:
            check_plan(plan, model.config)
    at_once = 2 if seeds % 2 == 0 else 1  # seeds per compiled call: small, so that progress is seen
    points: dict[tuple[str, float], Point] = {}
    for group in ([p for p in placements if not p.dense], [p for p in placements if p.dense]):
        if not group:
            continue
        per_seed = [stack_plans([p.plans[s % len(p.plans)] for p in group]) for s in range(seeds)]
        for scale in noise_scales:
            quiet = scale == 0 and spec.time_s is None and spec.read_noise is None
            scaled = dataclasses.replace(spec, noise_scale=jnp.asarray(scale, jnp.float32))
            parts = []
            for start in range(0, at_once if quiet else seeds, at_once):
                chosen = slice(start, start + at_once)
                plans = stack_plans(per_seed[chosen])
                totals = evaluate_seeds(model.params, keys[chosen], plans, scaled, calibration, batches, model.config)
                parts.append(jax.tree.map(np.asarray, totals))
                progress(at_once * len(group))
            merged = Totals(*(np.concatenate(leaves) for leaves in zip(*parts, strict=True)))
            for index, placement in enumerate(group):
                rows = slice(0, 1) if quiet else slice(None)
                own = Totals(nll=merged.nll[rows, index], correct=merged.correct[rows, index])
                points[placement.name, scale] = _point(placement.name, scale, own, size, deterministic=quiet)
    return [points[placement.name, scale] for placement in placements for scale in noise_scales]


def evaluations(placements: Sequence[Placement], noise_scales: Sequence[float], spec: AnalogSpec, seeds: int) -> int:
    """How many evaluations `noise_sweep` will report to `progress`."""
    quiet = 0.0 in noise_scales and spec.time_s is None and spec.read_noise is None
    at_once = 2 if seeds % 2 == 0 else 1
    return len(placements) * (seeds * len(noise_scales) - (seeds - at_once if quiet else 0))
