"""The main job: placements against noise scales over seeds, with means and standard errors."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.evaluate.progress import Progress, open_in_memory
from hetmoe.evaluate.run import (
    Batches,
    Totals,
    chunks,
    evaluate_digital_and_load,
    evaluate_seeds,
    on_devices,
)  # fmt: skip
from hetmoe.models.analog_arguments import check_quantized
from hetmoe.models.model import Model
from hetmoe.parallel.mesh import shard_of
from hetmoe.parallel.rules import calibration_specs, plan_specs, put
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
    """`digital_result` without the load."""
    return digital_result(model, batches, size, implementation)[0]


def digital_result(
    model: Model,
    batches: Batches,
    size: TextSize,
    implementation: str | None = None,
    store: Progress | None = None,
) -> tuple[Point, np.ndarray]:
    """The model without any analog part, what all others are compared with, and the load of its experts.

    The load `[layers, experts]` counts token copies, those of windows that only fill the last batch left out.
    Arguments as of `noise_sweep`.
    """
    store = open_in_memory() if store is None else store
    found: list[dict[str, np.ndarray]] = []
    for number, (_, part) in enumerate(chunks(batches, store.chunk or len(batches.tokens))):

        def run(part: Batches = part) -> dict[str, Any]:
            totals, load = evaluate_digital_and_load(
                model.params, on_devices(part, model.mesh), model.config, implementation, model.mesh
            )
            return {"nll": totals.nll, "correct": totals.correct, "load": load}

        found.append(store.sums(f"digital/{number}", run))
    sums = {name: np.sum([part[name] for part in found], axis=0) for name in found[0]}
    totals = Totals(nll=sums["nll"], correct=sums["correct"])
    return make_point("all digital", 0.0, totals, size, deterministic=True), sums["load"].astype(np.int64)


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
    progress: Callable[[float], Any],
    weights: str = "stored",
    implementation: str | None = None,
    store: Progress | None = None,
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
            times as well as XLA's own threads do with one; results do not depend on it. 1 for a model on a mesh.
        progress: called with the number of finished (placement, scale, seed) evaluations, or the part of it that was
            done, after each compiled call.
        weights: when they are programmed, as in `evaluate_seeds`.
        implementation: as in `forward`.
        store: keeps the sums of finished parts of the text; None = all text at once, for this run only. Crossbars are
            programmed anew for every part.

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
    mesh, store = model.mesh, open_in_memory() if store is None else store
    if mesh is not None and jobs != 1:
        raise InputError(f"jobs={jobs}: a mesh runs one program at a time: use jobs=1")
    text = [(first, on_devices(part, mesh)) for first, part in chunks(batches, store.chunk or len(batches.tokens))]
    at_once = seeds_at_once(len(keys), weights, mesh)
    points: dict[tuple[str, float], Point] = {}
    with ThreadPoolExecutor(jobs) as executor:
        for index, group in enumerate(_groups(placements)):
            per_seed = [stack_plans([p.plans[s % len(p.plans)] for p in group]) for s in range(len(keys))]

            def arguments(start: int, spec: AnalogSpec, number: int, per_seed: Any = per_seed) -> tuple[Any, ...]:
                chosen = slice(start, start + at_once)
                analog = (keys[chosen], stack_plans(per_seed[chosen]), spec, calibration)
                return model.params, *analog_on_devices(analog, mesh), text[number][1]

            compiled = evaluate_seeds.lower(
                *arguments(0, spec, 0), model.config, weights, implementation, mesh=mesh, first_batch=0
            ).compile()  # once for all scales, seeds, plans and parts of the text, before threads start
            for scale in noise_scales:
                scaled = dataclasses.replace(spec, noise_scale=jnp.asarray(scale, jnp.float32))

                def run(
                    part: tuple[int, int], compiled: Any = compiled, arguments: Any = arguments, scaled: Any = scaled,
                    name: str = f"{index}/{scale!r}",
                ) -> dict[str, np.ndarray]:  # fmt: skip
                    start, number = part

                    def evaluate() -> dict[str, Any]:
                        totals = compiled(*arguments(start, scaled, number), first_batch=text[number][0])
                        return {"nll": totals.nll, "correct": totals.correct}

                    sums = store.sums(f"{name}/{start}/{number}", evaluate)
                    progress(sums["nll"].size / len(text))
                    return sums

                quiet = is_quiet(scale, spec)
                needed = _seeds_needed(group, quiet=quiet, seeds=len(keys))
                starts = range(0, needed, at_once)
                parts = list(executor.map(run, [(start, n) for start in starts for n in range(len(text))]))
                nll, correct = (_of_seeds([part[name] for part in parts], len(starts)) for name in ("nll", "correct"))
                for column, placement in enumerate(group):
                    alone = quiet and len(placement.plans) == 1
                    rows = slice(0, 1) if alone else slice(None)
                    totals = Totals(nll=nll[rows, column], correct=correct[rows, column])
                    points[placement.name, scale] = make_point(placement.name, scale, totals, size, deterministic=alone)
    return [points[placement.name, scale] for placement in placements for scale in noise_scales]


def analog_on_devices(
    analog: tuple[jax.Array, Plan, AnalogSpec, Calibration | None], mesh: jax.sharding.Mesh | None
) -> tuple[Any, ...]:
    """Keys `[seeds]`, plans `[seeds, placements]`, hardware and ranges where a mesh wants them."""
    if mesh is None:
        return analog
    keys, plans, spec, calibration = analog
    specs = (P("seed"), plan_specs(plans, "seed", None), jax.tree.map(lambda _: P(), spec))
    ranges = None if calibration is None else put(calibration, calibration_specs(calibration), mesh)
    return *put((keys, plans, spec), specs, mesh), ranges


def _of_seeds(parts: list[np.ndarray], starts: int) -> np.ndarray:
    """Sums `[seeds, placements]` over the text, of parts `[seeds at once, placements]` that follow each other in it."""
    together = np.stack(parts).reshape(starts, -1, *parts[0].shape).sum(axis=1)
    return together.reshape(-1, together.shape[-1])


def _groups(placements: Sequence[Placement]) -> list[list[Placement]]:
    """Placements that share a compiled program: those whose plans have the same structure."""
    groups: dict[Any, list[Placement]] = {}
    for placement in placements:
        groups.setdefault(jax.tree.structure(placement.plans[0]), []).append(placement)
    return list(groups.values())


def _seeds_needed(group: Sequence[Placement], *, quiet: bool, seeds: int) -> int:
    """One seed is enough where nothing is random, neither the noise nor the placement."""
    return 1 if quiet and all(len(p.plans) == 1 for p in group) else seeds


def seeds_at_once(seeds: int, weights: str, mesh: jax.sharding.Mesh | None = None) -> int:
    """Seeds per compiled call: all if they run together, else few, to see progress and share threads evenly.

    On a mesh as many as its axis `seed` has parts.
    """
    if weights == "kernel":
        return seeds
    if mesh is not None:
        return shard_of(mesh).seed
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
    mesh: jax.sharding.Mesh | None = None,
) -> int:
    """How many evaluations `noise_sweep` will report to `progress`."""
    total = 0
    for group in _groups(placements):
        for scale in noise_scales:
            needed = _seeds_needed(group, quiet=is_quiet(scale, spec), seeds=seeds)
            total += len(group) * max(needed, seeds_at_once(seeds, weights, mesh))
    return total
