"""From one setting's runs to findings on every claim."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

from theory.claims import Claim, Criterion, Finding
from theory.experiment import STOPS, Measured
from theory.growth import Growth, growth, linear_looks, pattern_frequency
from theory.specialisation import all_held, held_apart, holders, served_frequency
from theory.statistics import (
    Statistic,
    by_seed,
    known_runs,
    log_of_mean,
    mean,
    median,
    rank_correlations,
    ratio_of_means,
    share,
    slope_on,
)  # fmt: skip

LEVELS = ("frequent", "rare", "rarest")
SLOPE_OF_ONE, AT_LEAST_ONE = Criterion(0.8, 1.2), Criterion(0.8)  # to a fifth


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
            measured="share of trained mixtures", criterion=Criterion(0.9), findings=held,
        ),
        Claim(
            name="1b experts specialise",
            statement="Rare patterns are held by other experts than frequent ones.",
            measured="share of trained mixtures", criterion=Criterion(0.9), findings=apart,
        ),
    ]  # fmt: skip


def growth_of(measured: Measured, looks: Int[np.ndarray, "gammas seeds levels"]) -> Growth:
    """Growth of all runs over their first looks, means over classes: `[gammas, seeds, levels]`."""
    plan, seen = measured.plan, measured.looks
    levels = plan.train.data.levels
    found = growth(
        _flat(seen.along), _flat(seen.norm), _flat(seen.weight), _frequency(measured), _flat(looks), plan.train
    )

    def of_levels(values: np.ndarray) -> np.ndarray:
        return _mean_of(values.reshape(len(plan.gammas), plan.seeds, -1, levels), axis=2)

    return Growth(**{field.name: of_levels(getattr(found, field.name)) for field in dataclasses.fields(Growth)})


def _frequency(measured: Measured) -> np.ndarray:
    """Probabilities of relevant patterns, `[runs, relevant]`."""
    levels = np.repeat(measured.frequencies, measured.plan.seeds, axis=0)
    return pattern_frequency(levels, measured.plan.train.data.classes)


def growth_claims(measured: Measured) -> list[Claim]:
    """Step 2: neurons grow with the frequency of what they serve."""
    plan = measured.plan
    linear = linear_looks(_flat(measured.looks.active)).reshape(len(plan.gammas), plan.seeds, -1)
    # One time for a seed at all frequencies: when the first of its levels leaves the linear part of the loss.
    first = linear.min(axis=(0, 2))
    own = growth_of(measured, linear)
    at_once = growth_of(measured, np.broadcast_to(first[None, :, None], linear.shape)).measured
    seen = np.asarray(measured.looks.margin, np.float64)
    margin = seen[:, np.arange(plan.seeds), first] - seen[:, :, 0]
    margin[:, first == 0] = np.nan
    rates, norms, slopes, margins = (list[Finding]() for _ in range(4))
    for level in range(plan.train.data.levels):
        for row, gamma in enumerate(plan.gammas):
            where, only = (f"gamma {gamma:g}", LEVELS[level]), slice(row, row + 1)
            for findings, grown, expected in (
                (rates, own.measured, own.predicted), (norms, own.square, own.square_predicted),
            ):  # fmt: skip
                pair = np.stack([grown[only, :, level], expected[only, :, level]], axis=-1)
                findings.append(_finding(*where, pair, ratio_of_means))
        if level > 0:
            slope = slope_on(np.log(measured.frequencies[:, level]), log_of_mean, min(3, plan.seeds))
            slopes.append(_finding("all gammas", LEVELS[level], at_once[:, :, level], slope))
            margins.append(_finding("all gammas", LEVELS[level], margin[:, :, level], slope))
    derived = not plan.train.model.gated
    return [
        Claim(
            name="2a rate of growth",
            statement="While the loss is linear, a neuron's component along its pattern grows by rate x slope x "
            "P(pattern) x routing weight per step.",
            measured="measured over predicted growth, of all mixtures together", criterion=Criterion(0.9, 1.1),
            findings=rates if derived else [],
        ),
        Claim(
            name="2b growth against frequency",
            statement="At one time of a seed, in the linear regime, growth is proportional to the pattern's frequency: "
            "the slope of its logarithm is 1.",
            measured="slope of log mean growth on log frequency", criterion=SLOPE_OF_ONE,
            findings=slopes if derived else [],
        ),
        Claim(
            name="2c margin against frequency",
            statement="At that time the rare pattern's margin has grown in proportion to its frequency (for step 3).",
            measured="slope of log mean margin on log frequency", criterion=SLOPE_OF_ONE, findings=margins,
        ),
        Claim(
            name="2d norms follow components",
            statement="Until its pattern leaves the linear regime, a neuron's squared norm grows by what its component "
            "along the pattern makes.",
            measured="growth of the squared norm over what the predicted component makes", criterion=SLOPE_OF_ONE,
            findings=norms if derived else [],
        ),
    ]  # fmt: skip


def order_claim(measured: Measured) -> Claim:
    """Step 2: MaxNNScore orders experts by the frequency of what they serve."""
    plan, findings, frequency = measured.plan, list[Finding](), _frequency(measured)
    for stop in STOPS:
        served = served_frequency(_flat(measured.look(stop).weight).astype(np.float64), frequency)
        order = rank_correlations(_flat(measured.scores[stop]), served).reshape(len(plan.gammas), plan.seeds)
        order[~measured.learned[stop]] = np.nan
        for row, gamma in enumerate(plan.gammas):
            findings.append(_finding(f"gamma {gamma:g}", stop, order[row : row + 1], mean))
    return Claim(
        name="2e score orders by frequency",
        statement="MaxNNScore orders a mixture's experts by the frequency of the relevant tokens that they serve.",
        measured="Spearman correlation over experts, mean over mixtures", criterion=Criterion(0.5), findings=findings,
    )  # fmt: skip


def remainder_claim(measured: Measured) -> Claim:
    """Step 4's premise: what is left to be noisy is small."""
    plan, findings = measured.plan, list[Finding]()
    slope = slope_on(np.log(measured.frequencies[:, -1]), least=min(3, plan.seeds))
    for stop in STOPS:
        largest_left = np.sort(measured.scores[stop], axis=-1)[..., -1 - plan.digital]
        left = np.where(measured.learned[stop], _log(largest_left), np.nan)
        findings.append(_finding("all gammas", stop, left, slope))
    return Claim(
        name="2f what stays analog is small",
        statement="With the experts of the highest scores digital, the largest score that is left is of order gamma: "
        "the slope of its logarithm on that of the rarest pattern's frequency is at least 1 (for step 4).",
        measured="slope of log score on log frequency", criterion=AT_LEAST_ONE, findings=findings,
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
        measured="Spearman correlation over experts at c = 1, mean over mixtures", criterion=Criterion(0.5),
        findings=findings,
    )  # fmt: skip


def tolerance_claims(measured: Measured) -> list[Claim]:
    """Step 4: tolerances, all analog and with the experts of the highest scores digital.

    Medians: mixtures that fail at the first scale or bear all scales count by that.
    """
    log_rarity = -np.log(measured.frequencies[:, -1])
    slope_of = slope_on(log_rarity, median, min(3, measured.plan.seeds))
    analog, ratio, slope, over_random = (list[Finding]() for _ in range(4))
    for (stop, hardware), found in measured.tolerances.items():
        where = hardware.name, stop
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.where(measured.learned[stop][..., None], np.log(found), np.nan)
            gain, beyond = logs[..., 1] - logs[..., 0], logs[..., 1] - logs[..., 2]
        analog.append(_finding(*where, -logs[..., 0], slope_of))
        ratio.append(_finding(*where, gain, _median_factor))
        slope.append(_finding(*where, gain, slope_of))
        over_random.append(_finding(*where, beyond, _median_factor))
    return [
        Claim(
            name="4a tolerance falls with rarity",
            statement="All analog, the tolerance c* is of order p, the frequency of the rarest pattern (gamma): the "
            "slope of log(1 / c*) on log(1 / p) is at least 1.",
            measured="slope of medians", criterion=AT_LEAST_ONE, findings=analog,
        ),
        Claim(
            name="4b digital experts raise it",
            statement="With the experts of the highest scores digital, c* is larger than all analog.",
            measured="c*(heterogeneous) / c*(analog), median", criterion=Criterion(1.0), findings=ratio,
        ),
        Claim(
            name="4c by a factor of order 1 / gamma",
            statement="The slope of log(c*(heterogeneous) / c*(analog)) on log(1 / p) is at least 1.",
            measured="slope of medians", criterion=AT_LEAST_ONE, findings=slope,
        ),
        Claim(
            name="4d more than any experts would",
            statement="Those of the highest scores raise c* more than as many random ones.",
            measured="c*(high scores digital) / c*(random digital), median", criterion=Criterion(1.0),
            findings=over_random,
        ),
    ]  # fmt: skip


def _finding(row: str, column: str, values: np.ndarray, statistic: Statistic) -> Finding:
    return Finding(
        row=row, column=column, estimate=by_seed(values, statistic), excluded=int((~known_runs(values)).sum())
    )  # fmt: skip


def _median_factor(logs: np.ndarray) -> np.ndarray:
    return np.exp(median(logs))


def _log(values: np.ndarray) -> np.ndarray:
    """NaN where a value is not positive and finite."""
    usable = (values > 0) & np.isfinite(values)
    return np.where(usable, np.log(np.where(usable, values, 1.0)), np.nan)


def _mean_of(values: np.ndarray, axis: int) -> np.ndarray:
    """Mean of the known values along an axis; NaN where there is none."""
    known = np.isfinite(values)
    count = known.sum(axis=axis)
    return np.where(count > 0, np.where(known, values, 0.0).sum(axis=axis) / np.maximum(count, 1), np.nan)
