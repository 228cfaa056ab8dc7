"""From one setting's runs to findings on every claim."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from theory.claims import Claim, Finding, above, at_least, within
from theory.experiment import STOPS, Measured
from theory.growth import Growth, growth, linear_looks, pattern_frequency
from theory.specialisation import all_held, held_apart, holders, served_frequency
from theory.statistics import by_seed, known_runs, mean, rank_correlations, ratio_of_means, share, slope_on

LEVELS = ("frequent", "rare", "rarest")


def all_claims(measured: Measured) -> list[Claim]:
    """Every claim with its findings in this setting."""
    return [
        *specialisation_claims(measured), *growth_claims(measured), order_claim(measured), remainder_claim(measured),
        sensitivity_claim(measured), *tolerance_claims(measured),
    ]  # fmt: skip


def _flat(values: Any) -> np.ndarray:
    return np.asarray(values).reshape(-1, *values.shape[2:])


def specialisation_claims(measured: Measured) -> list[Claim]:
    """Step 1: routers specialise."""
    plan = measured.plan.train
    held, apart = list[Finding](), list[Finding]()
    for stop in STOPS:
        look = measured.look(stop)
        for row, gamma in enumerate(measured.plan.gammas):
            able = measured.learned[stop][row]
            holder = holders(np.asarray(look.along[row]), np.asarray(look.chosen[row]), plan.model, plan.data.levels)[
                able
            ]
            row_name, excluded = f"gamma {gamma:g}", int((~able).sum())
            some = able.any()
            held.append(
                Finding(
                    row=row_name, column=stop, excluded=excluded, estimate=share(all_held(holder)) if some else None
                )
            )
            parts = share(held_apart(holder, plan.data.levels)) if some else None
            apart.append(Finding(row=row_name, column=stop, excluded=excluded, estimate=parts))
    return [
        Claim(
            name="1a routers find the patterns",
            statement="For every relevant pattern, frequent or rare, there is an expert that votes for its class and "
            "takes it (in at least 90 % of the sequences that hold it).",
            measured="share of trained mixtures", criterion=above(0.9), findings=held,
        ),
        Claim(
            name="1b experts specialise",
            statement="Rare patterns are held by other experts than frequent ones.",
            measured="share of trained mixtures", criterion=above(0.9), findings=apart,
        ),
    ]  # fmt: skip


def growth_of(measured: Measured, looks: Int[np.ndarray, "runs levels"]) -> Growth:
    """Growth of all runs, in the order `[gammas * seeds]`, over their first looks."""
    plan, seen = measured.plan, measured.looks
    levels = np.repeat(measured.frequencies, plan.seeds, axis=0)
    frequency = pattern_frequency(levels, plan.train.data.classes)
    return growth(_flat(seen.along), _flat(seen.weight), frequency, looks, plan.train)


def growth_claims(measured: Measured) -> list[Claim]:
    """Step 2: neurons grow with the frequency of what they serve."""
    plan, linear = measured.plan, linear_looks(_flat(measured.looks.active))
    levels, least, first = plan.train.data.levels, min(3, plan.seeds), int(linear.min())
    own, common = growth_of(measured, linear), growth_of(measured, np.full_like(linear, first))
    # [gammas, seeds, levels]: means over classes
    grown, expected, at_once = (
        _mean_of(values.reshape(len(plan.gammas), plan.seeds, -1, levels), axis=2)
        for values in (own.measured, own.predicted, common.measured)
    )
    margins_seen = np.asarray(measured.looks.margin, np.float64)
    margin = margins_seen[:, :, first] - margins_seen[:, :, 0]
    ratios, slopes, margins = list[Finding](), list[Finding](), list[Finding]()
    for level in range(levels):
        pair = np.stack([grown[:, :, level], expected[:, :, level]], axis=-1)
        for row, gamma in enumerate(plan.gammas):
            ratios.append(_finding(f"gamma {gamma:g}", LEVELS[level], pair[row : row + 1], ratio_of_means))
        if level > 0:
            slope = slope_on(np.log(measured.frequencies[:, level]), least)
            slopes.append(_finding("all gammas", LEVELS[level], _log(at_once[:, :, level]), slope))
            margins.append(_finding("all gammas", LEVELS[level], _log(margin[:, :, level]), slope))
    return [
        Claim(
            name="2a rate of growth",
            statement="While the loss is linear, a neuron's component along its pattern grows by rate x slope x "
            "P(pattern) x routing weight per step.",
            measured="measured over predicted growth, of all mixtures together", criterion=within(0.9, 1.1),
            findings=ratios,
        ),
        Claim(
            name="2b growth against frequency",
            statement="At one time, in the linear regime, growth is proportional to the pattern's frequency: the slope "
            "of its logarithm is 1.",
            measured="slope of log growth on log frequency", criterion=within(0.8, 1.2), findings=slopes,
        ),
        Claim(
            name="2c margin against frequency",
            statement="At that time the rare pattern's margin has grown in proportion to its frequency (for step 3).",
            measured="slope of log margin on log frequency", criterion=within(0.8, 1.2), findings=margins,
        ),
    ]  # fmt: skip


def order_claim(measured: Measured) -> Claim:
    """Step 2: MaxNNScore orders experts by the frequency of what they serve."""
    plan, findings = measured.plan, list[Finding]()
    frequency = pattern_frequency(np.repeat(measured.frequencies, plan.seeds, axis=0), plan.train.data.classes)
    for stop in STOPS:
        served = served_frequency(_flat(measured.look(stop).weight).astype(np.float64), frequency)
        order = rank_correlations(_flat(measured.scores[stop]), served).reshape(len(plan.gammas), plan.seeds)
        order[~measured.learned[stop]] = np.nan
        for row, gamma in enumerate(plan.gammas):
            findings.append(_finding(f"gamma {gamma:g}", stop, order[row : row + 1], mean))
    return Claim(
        name="2d score orders by frequency",
        statement="MaxNNScore orders a mixture's experts by the frequency of the relevant tokens that they serve.",
        measured="Spearman correlation over experts, mean over mixtures", criterion=above(0.5), findings=findings,
    )  # fmt: skip


def remainder_claim(measured: Measured) -> Claim:
    """Step 4's premise: what is left to be noisy is small."""
    plan, findings = measured.plan, list[Finding]()
    slope = slope_on(np.log(measured.frequencies[:, -1]), min(3, plan.seeds))
    for stop in STOPS:
        largest_left = np.sort(measured.scores[stop], axis=-1)[..., -1 - plan.digital]
        left = np.where(measured.learned[stop], _log(largest_left), np.nan)
        findings.append(_finding("all gammas", stop, left, slope))
    return Claim(
        name="2e what stays analog is small",
        statement="With the experts of the highest scores digital, the largest score that is left is of order gamma: "
        "the slope of its logarithm on log gamma is at least 1 (for step 4).",
        measured="slope of log score on log frequency", criterion=at_least(1.0), findings=findings,
    )  # fmt: skip


def sensitivity_claim(measured: Measured) -> Claim:
    """Step 3: MaxNNScore orders experts by what their noise does."""
    findings = list[Finding]()
    for (stop, hardware), errors in measured.errors.items():
        order = rank_correlations(_flat(measured.scores[stop]), _flat(errors)).reshape(errors.shape[:2])
        order[~measured.learned[stop]] = np.nan
        findings.append(_finding(hardware.name, stop, order, mean))
    return Claim(
        name="3 score orders by sensitivity",
        statement="MaxNNScore orders a mixture's experts by the mean square change of outputs that the noise of each "
        "alone makes.",
        measured="Spearman correlation over experts at c = 1, mean over mixtures", criterion=above(0.5),
        findings=findings,
    )  # fmt: skip


def tolerance_claims(measured: Measured) -> list[Claim]:
    """Step 4: tolerances, all analog and with the experts of the highest scores digital."""
    log_rarity = np.log(1 / measured.frequencies[:, -1])
    least = min(3, measured.plan.seeds)
    analog, ratio, slope, over_random = (list[Finding]() for _ in range(4))
    for (stop, hardware), found in measured.tolerances.items():
        where = hardware.name, stop
        logs = np.where(measured.learned[stop][..., None], _log(found), np.nan)
        gain = logs[..., 1] - logs[..., 0]
        analog.append(_finding(*where, -logs[..., 0], slope_on(log_rarity, least)))
        ratio.append(_finding(*where, gain, _geometric))
        slope.append(_finding(*where, gain, slope_on(log_rarity, least)))
        over_random.append(_finding(*where, logs[..., 1] - logs[..., 2], _geometric))
    return [
        Claim(
            name="4a tolerance falls with rarity",
            statement="All analog, the tolerance c* is of order gamma: the slope of log(1 / c*) on log(1 / gamma) is "
            "at least 1.",
            measured="slope", criterion=at_least(1.0), findings=analog,
        ),
        Claim(
            name="4b digital experts raise it",
            statement="With the experts of the highest scores digital, c* is larger than all analog.",
            measured="c*(heterogeneous) / c*(analog), geometric mean", criterion=above(1.0), findings=ratio,
        ),
        Claim(
            name="4c by a factor of order 1 / gamma",
            statement="The slope of log(c*(heterogeneous) / c*(analog)) on log(1 / gamma) is at least 1.",
            measured="slope", criterion=at_least(1.0), findings=slope,
        ),
        Claim(
            name="4d more than any experts would",
            statement="Those of the highest scores raise c* more than as many random ones.",
            measured="c*(high scores digital) / c*(random digital), geometric mean", criterion=above(1.0),
            findings=over_random,
        ),
    ]  # fmt: skip


def _finding(row: str, column: str, values: np.ndarray, statistic: Callable[[np.ndarray], float]) -> Finding:
    return Finding(
        row=row, column=column, estimate=by_seed(values, statistic), excluded=int((~known_runs(values)).sum())
    )  # fmt: skip


def _geometric(logs: np.ndarray) -> float:
    return float(np.exp(mean(logs)))


def _log(values: np.ndarray) -> np.ndarray:
    """NaN where a value is not positive and finite."""
    usable = (values > 0) & np.isfinite(values)
    return np.where(usable, np.log(np.where(usable, values, 1.0)), np.nan)


def _mean_of(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the known values along an axis; NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=axis) / np.maximum(count, 1), np.nan)


def named(claims: Sequence[Claim], name: str) -> Claim:
    """The claim whose name begins so."""
    return next(claim for claim in claims if claim.name.startswith(name))
