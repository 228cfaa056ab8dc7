"""The main job: placements against noise scales over seeds, with means and standard errors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.run import Batches, Totals, evaluate_digital, evaluate_seeds
from hetmoe.models.analog_arguments import check_quantized
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, check_plan, place, stack_plans
from hetmoe.placement.scores import score_experts
from hetmoe.quantize.layout import layout_of

_LARGEST_LOG = 700.0  # nats per token beyond which a perplexity would overflow: it is reported as exp(700)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """A named line of the result: one plan for all seeds, or (random placement) one plan per seed."""

    name: str
    plans: Sequence[Plan]  # one, or as many as there are seeds


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSize:
    """What the sums of an evaluation are divided by."""

    tokens: int
    bytes: int
    questions: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One placement at one noise scale. Lists hold one value per seed; `deterministic` points have one.

    `accuracy` is None where the text gave no questions.
    """

    placement: str
    noise_scale: float
    deterministic: bool
    perplexity: list[float]
    bits_per_byte: list[float]
    accuracy: list[float] | None

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


def not_a_number(nll: Any) -> str | None:
    """Why log-likelihoods are no results, or None if all are finite."""
    values = np.atleast_1d(np.asarray(nll, np.float64))
    if np.isfinite(values).all():
        return None
    return (
        f"the log-likelihood of the text is {values[~np.isfinite(values)][0]}; weights or activations are NaN or "
        "overflow, in 16 bits perhaps for lack of range"
    )


def make_point(name: str, scale: float, totals: Totals, size: TextSize, *, deterministic: bool) -> Point:
    """A placement at one noise scale, from totals of all seeds or of one. Raises InputError for NaN and infinity."""
    nll = np.atleast_1d(np.asarray(totals.nll, np.float64))
    correct = np.atleast_1d(np.asarray(totals.correct, np.float64))
    if (reason := not_a_number(nll)) is not None:
        raise InputError(f"{name!r} at noise scale {scale:g}: {reason}")
    return Point(
        placement=name,
        noise_scale=scale,
        deterministic=deterministic,
        perplexity=np.exp(np.minimum(nll / size.tokens, _LARGEST_LOG)).tolist(),
        bits_per_byte=(nll / math.log(2) / size.bytes).tolist(),
        accuracy=(correct / size.questions).tolist() if size.questions else None,
    )


def digital_point(model: Model, batches: Batches, size: TextSize, implementation: str | None = None) -> Point:
    """The model without any analog part: what all others are compared with; `implementation` as in `forward`."""
    totals = evaluate_digital(model.params, batches, model.config, implementation)
    return make_point("all digital", 0.0, totals, size, deterministic=True)


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
    jobs: int,
    progress: Callable[[int], Any],
    weights: str = "stored",
    implementation: str | None = None,
) -> list[Point]:
    """Evaluates every placement at every noise scale over all seeds (`keys`).

    At scale 0 of a device without drift or read noise only a random placement is random: others have one value there.

    Args:
        model: the model, in the dtype to run it in.
        spec: analog hardware; its noise scale is replaced by those of the sweep.
        calibration: DAC ranges; None = dynamic.
        placements: lines of the result.
        noise_scales: values of c.
        keys: one noise key per seed.
        batches: text and questions.
        size: what the sums are divided by.
        jobs: seeds run side by side, each in a thread with programmed weights of its own. Two use two CPU cores 1.4
            times as well as XLA's own threads do with one; results do not depend on it.
        progress: called with the number of finished (placement, scale, seed) evaluations, after each compiled call.
        weights: when they are programmed, as in `evaluate_seeds`.
        implementation: as in `forward`.

    Raises:
        InputError: for placements of another model or with quantized experts on crossbars, a placement with neither
            one plan nor one per seed, or a log-likelihood that is not a number.
    """
    if weights != "stored" and layout_of(model.params.layers.moe.experts) is not None:
        raise InputError(f"weights {weights!r}: beside quantized experts programmed weights must be 'stored'")
    for placement in placements:
        if len(placement.plans) not in {1, len(keys)}:
            raise InputError(f"placement {placement.name!r} has {len(placement.plans)} plans for {len(keys)} seeds")
        for plan in placement.plans:
            check_plan(plan, model.config)
            check_quantized(model.params, plan)
    at_once = seeds_at_once(len(keys), weights)
    points: dict[tuple[str, float], Point] = {}
    with ThreadPoolExecutor(jobs) as executor:
        for group in _groups(placements):
            per_seed = [stack_plans([p.plans[s % len(p.plans)] for p in group]) for s in range(len(keys))]
            first = stack_plans(per_seed[:at_once])
            compiled = evaluate_seeds.lower(
                model.params, keys[:at_once], first, spec, calibration, batches, model.config, weights, implementation
            ).compile()  # once for all scales, seeds and plans, before threads start
            for scale in noise_scales:
                scaled = dataclasses.replace(spec, noise_scale=jnp.asarray(scale, jnp.float32))

                def run(start: int, compiled: Any = compiled, per_seed: Any = per_seed, scaled: Any = scaled) -> Totals:
                    chosen = slice(start, start + at_once)
                    plans = stack_plans(per_seed[chosen])
                    totals = compiled(model.params, keys[chosen], plans, scaled, calibration, batches)
                    totals = jax.tree.map(np.asarray, totals)
                    progress(totals.nll.size)
                    return totals

                quiet = is_quiet(scale, spec)
                needed = _seeds_needed(group, quiet=quiet, seeds=len(keys))
                parts = list(executor.map(run, range(0, needed, at_once)))
                nll, correct = (np.concatenate(sums) for sums in zip(*parts, strict=True))
                for column, placement in enumerate(group):
                    alone = quiet and len(placement.plans) == 1
                    rows = slice(0, 1) if alone else slice(None)
                    totals = Totals(nll=nll[rows, column], correct=correct[rows, column])
                    points[placement.name, scale] = make_point(placement.name, scale, totals, size, deterministic=alone)
    return [points[placement.name, scale] for placement in placements for scale in noise_scales]


def _groups(placements: Sequence[Placement]) -> list[list[Placement]]:
    """Placements that share a compiled program: those whose plans have the same structure."""
    groups: dict[Any, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(jax.tree.structure(placement.plans[0]), []).append(placement)
    return list(groups.values())


def _seeds_needed(group: Sequence[Placement], *, quiet: bool, seeds: int) -> int:
    """One seed is enough where nothing is random, neither the noise nor the placement."""
    return 1 if quiet and all(len(p.plans) == 1 for p in group) else seeds


def seeds_at_once(seeds: int, weights: str) -> int:
    """Seeds per compiled call: all if they run together, else few, to see progress and share threads evenly."""
    if weights == "kernel":
        return seeds
    return 2 if seeds % 2 == 0 else 1


def is_quiet(scale: float, spec: AnalogSpec) -> bool:
    """Whether the noise is not random at this scale: no programming noise, drift or read noise."""
    return scale == 0 and spec.time_s is None and spec.read_noise is None


def evaluations(
    placements: Sequence[Placement],
    noise_scales: Sequence[float],
    spec: AnalogSpec,
    seeds: int,
    weights: str = "stored",
) -> int:
    """How many evaluations `noise_sweep` will report to `progress`."""
    total = 0
    for group in _groups(placements):
        for scale in noise_scales:
            needed = _seeds_needed(group, quiet=is_quiet(scale, spec), seeds=seeds)
            total += len(group) * max(needed, seeds_at_once(seeds, weights))
    return total
