"""One process's share of a sweep: claim a group of points, evaluate it in one compiled call, write it, and go on."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from hetmoe.evaluate.noise_sweep import analog_on_devices, make_point, not_a_number
from hetmoe.evaluate.run import Totals, evaluate_digital, evaluate_seeds, on_devices
from hetmoe.placement.parameters import digital_parameters
from hetmoe.placement.plan import PLACEMENTS, Plan, place, stack_plans
from hetmoe.placement.scores import RANDOM, score_experts
from hetmoe.sweep.ledger import Ledger, Timing, now_utc
from hetmoe.sweep.points import ALL_DIGITAL, SweepPoint, score_name
from hetmoe.sweep.setup import Setup
from hetmoe.sweep.shared_ledger import SharedLedger
from hetmoe.sweep.store import Failure, Measurement

SECONDS_BETWEEN_LOOKS = 1.0  # for points that others have claimed


def work(
    setup: Setup,
    ledger: Ledger | SharedLedger,
    progress: Callable[[int], Any],
    *,
    pause: Callable[[float], Any] = time.sleep,
) -> None:
    """Evaluates points until none is left, waiting for those that other workers have claimed.

    Args:
        setup: model, text and the like.
        ledger: the store.
        progress: called with the number of finished points, those of other workers included.
        pause: waits some seconds.

    Raises:
        InputError: if the store cannot be written.
    """
    while (finished := ledger.finished_count()) < ledger.total:
        progress(finished)
        points = ledger.claim()
        if points:
            started, clock = now_utc(), time.perf_counter()
            outcomes = evaluate_group(setup, points)
            timing = Timing(
                started_utc=started,
                ended_utc=now_utc(),
                seconds=round(time.perf_counter() - clock, 4),
                key_words=np.asarray(jax.random.key_data(setup.noise_keys[points[0].seed_index])).tolist(),
            )
            ledger.write(outcomes, timing)
        else:
            pause(SECONDS_BETWEEN_LOOKS)
    progress(finished)


def make_plan(setup: Setup, point: SweepPoint) -> Plan:
    """Which modules of a point are analog."""
    if point.fraction is None:
        return PLACEMENTS[point.placement](setup.model.config)
    if point.placement == RANDOM:
        key = setup.placement_keys[point.seed_index]
        scores = np.asarray(score_experts(setup.model, RANDOM, key=key))
    else:
        scores = setup.scores[score_name(point.placement, point.device)]
    return place(scores, point.fraction)


def evaluate_group(setup: Setup, points: Sequence[SweepPoint]) -> list[Measurement | Failure]:
    """Evaluates points that share one programming of the crossbars (`group_points`) in one compiled call.

    It compiles once for each device, time or none, bits, kind of plan and number of points; noise scale, seed and plans
    are values. A point whose log-likelihood is not a number has failed.
    """
    plans = [make_plan(setup, point) for point in points]
    totals = _totals(setup, points[0], plans)
    return [
        _measure(setup, point, plan, Totals(nll=nll, correct=correct))
        for point, plan, nll, correct in zip(points, plans, totals.nll, totals.correct, strict=True)
    ]


def _totals(setup: Setup, point: SweepPoint, plans: list[Plan]) -> Totals:
    """Totals `[plans]` on the hardware of `point`."""
    params, config, mesh = setup.model.params, setup.model.config, setup.model.mesh
    execution, batches = setup.config.execution, on_devices(setup.text.batches, mesh)
    if point.placement == ALL_DIGITAL:
        return jax.tree.map(np.atleast_1d, evaluate_digital(params, batches, config, execution.implementation, mesh))
    spec = setup.config.spec(point.device, point.noise_scale, point.time_s, point.bits)
    key = setup.noise_keys[point.seed_index : point.seed_index + 1]
    stacked = stack_plans([stack_plans(plans)])
    analog = analog_on_devices((key, stacked, spec, setup.calibration), mesh)
    totals = evaluate_seeds(params, *analog, batches, config, execution.weights, execution.implementation, mesh=mesh)
    return jax.tree.map(lambda sums: np.asarray(sums)[0], totals)


def _measure(setup: Setup, point: SweepPoint, plan: Plan, totals: Totals) -> Measurement | Failure:
    size = setup.text.size
    if (reason := not_a_number(totals.nll)) is not None:
        return Failure(point=point, error=reason)
    result = make_point(point.placement, point.noise_scale, totals, size, deterministic=True)
    digital, of = digital_parameters(plan, setup.model.config)
    return Measurement(
        point=point,
        nll=float(totals.nll),
        correct=float(totals.correct),
        tokens=size.tokens,
        bytes=size.bytes,
        questions=size.questions,
        perplexity=result.perplexity[0],
        bits_per_byte=result.bits_per_byte[0],
        accuracy=None if result.accuracy is None else result.accuracy[0],
        digital_parameters=digital,
        crossbar_parameters=of,
    )
