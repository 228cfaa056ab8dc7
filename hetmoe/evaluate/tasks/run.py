"""Tasks on the digital model and on one chip per noise seed."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, program
from hetmoe.analog.spec import AnalogSpec
from hetmoe.evaluate.noise_sweep import Placement, is_quiet
from hetmoe.evaluate.run import READ_STREAM
from hetmoe.evaluate.tasks.batching import Request
from hetmoe.evaluate.tasks.names import Metrics
from hetmoe.evaluate.tasks.score import Chip, Score, score_requests
from hetmoe.evaluate.tasks.store import Store, digest_of
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.placement.plan import Plan

DIGITAL = "digital"


class Questions(Protocol):
    """What a run needs to know of a task (`harness.PreparedTask`)."""

    @property
    def name(self) -> str:
        """Of the task."""
        ...

    @property
    def requests(self) -> list[Request]:
        """All that is to be scored."""
        ...

    @property
    def digest(self) -> str:
        """Of all questions and token ids."""
        ...

    def metrics(self, scores: Sequence[Score]) -> Metrics:
        """Of all requests' scores."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analog:
    """The analog side of a run; one chip is programmed per key."""

    spec: AnalogSpec
    calibration: Calibration | None
    placement: Placement
    keys: jax.Array  # one per noise seed


def chips_to_run(analog: Analog) -> int:
    """How many chips differ: none where nothing is analog, one where nothing is random, else one per seed."""
    plans = analog.placement.plans
    if not any(bool(np.any(np.asarray(leaf))) for plan in plans for leaf in jax.tree.leaves(plan)):
        return 0
    return 1 if len(plans) == 1 and is_quiet(float(analog.spec.noise_scale), analog.spec) else len(analog.keys)


@functools.partial(jax.jit, static_argnames="dense")
def _program(key: jax.Array, params: Params, spec: AnalogSpec, dense: bool) -> ProgrammedWeights:
    return program(key, params, spec, dense=dense)


def _chip(model: Model, analog: Analog, seed: int, implementation: str) -> Chip:
    plan, key = _plan(analog, seed), analog.keys[seed]
    return Chip(
        plan=plan,
        spec=analog.spec,
        programmed=_program(key, model.params, analog.spec, plan.switches_dense),
        calibration=analog.calibration,
        read_key=None if analog.spec.read_noise is None else jax.random.fold_in(key, READ_STREAM),
        implementation=implementation,
    )


def _plan(analog: Analog, seed: int) -> Plan:
    return analog.placement.plans[seed % len(analog.placement.plans)]


def _identity(task: Questions, analog: Analog, seed: int | None) -> dict[str, Any]:
    """What a result depends on, beside the settings of its folder."""
    if seed is None:
        return {"questions": task.digest}
    plan = {
        str(path): np.asarray(leaf).tolist() for path, leaf in jax.tree_util.tree_leaves_with_path(_plan(analog, seed))
    }
    return {
        "questions": task.digest,
        "placement": digest_of(plan),
        "seed": np.asarray(jax.random.key_data(analog.keys[seed])).tolist(),
    }


def run_tasks(
    model: Model,
    tasks: Sequence[Questions],
    analog: Analog,
    store: Store,
    *,
    tokens_per_batch: int,
    implementation: str,
    progress: Callable[[str, str, Metrics, bool], Any],
) -> dict[str, list[Metrics]]:
    """Metrics of every task under `digital` (one) and under `analog` (one per chip).

    A chip is programmed once and runs all tasks; every result is kept as soon as it is there, and results that the
    store holds already are not computed again.

    Args:
        model: the model.
        tasks: with their requests built.
        analog: spec, placement and seeds.
        store: open.
        tokens_per_batch: tokens run at once, padding included.
        implementation: as in `hetmoe.forward`.
        progress: called with (chip, task, metrics, whether just computed) for every result.

    Returns:
        `{f"{task}": [digital, seed 0, seed 1, ...]}`.
    """
    results: dict[str, list[Metrics]] = {task.name: [] for task in tasks}
    for seed in (None, *range(chips_to_run(analog))):
        name = DIGITAL if seed is None else f"seed{seed}"
        kept = {task.name: store.read(task.name, name, _identity(task, analog, seed)) for task in tasks}
        chip: Chip | None = None
        for task in tasks:
            metrics = kept[task.name]
            fresh = metrics is None
            if metrics is None:
                started = time.perf_counter()
                if chip is None:
                    digital = Chip(implementation=implementation)
                    chip = digital if seed is None else _chip(model, analog, seed, implementation)
                metrics = task.metrics(score_requests(model, task.requests, chip, tokens_per_batch))
                seconds = time.perf_counter() - started
                store.write(task.name, name, _identity(task, analog, seed), metrics, seconds)
            results[task.name].append(metrics)
            progress(name, task.name, metrics, fresh)
    return results
