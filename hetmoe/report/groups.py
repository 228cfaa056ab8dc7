"""A sweep's results sorted for a report: what was measured where, over which seeds."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import numpy as np

from hetmoe.errors import InputError
from hetmoe.evaluate.statistics import Interval, mean_interval, paired_difference
from hetmoe.sweep.points import same_for_every_seed
from hetmoe.sweep.store import SweepRecord, SweepResult

REFERENCE = "all_digital"  # without noise: one point for the whole sweep
BASELINES = ("experts_analog", "all_analog")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured quantity and how it is shown."""

    name: str  # field of SweepResult
    label: str
    factor: float
    digits: int
    higher_is_better: bool = False


PERPLEXITY = Metric(name="perplexity", label="perplexity per token", factor=1.0, digits=2)
BITS = Metric(name="bits_per_byte", label="bits per byte", factor=1.0, digits=3)
ACCURACY = Metric(name="accuracy", label="next-word accuracy (%)", factor=100.0, digits=2, higher_is_better=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Condition:
    """The hardware of a set of panels."""

    device: str
    time_s: float | None
    bits: int

    @property
    def label(self) -> str:
        """For headings."""
        return f"{self.device}, {time_label(self.time_s)}, {bits_label(self.bits)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A placement: a rule with the share of experts that it keeps digital, or one without a rule (None)."""

    placement: str
    fraction: float | None

    @property
    def label(self) -> str:
        """For legends and tables."""
        return self.placement if self.fraction is None else f"{self.placement}, {percent(self.fraction)}"

    @property
    def order(self) -> tuple[int, str, float]:
        """Placements without a rule come first."""
        rank = BASELINES.index(self.placement) if self.placement in BASELINES else len(BASELINES)
        return rank, self.placement, -1.0 if self.fraction is None else self.fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """The mean over seeds; without an interval where one value is all there is."""

    mean: float
    count: int
    interval: Interval | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """One placement under one condition at one noise scale: a result per seed."""

    by_seed: Mapping[int, SweepResult]

    def values(self, metric: Metric) -> dict[int, float]:
        """By seed index, in the metric's shown unit."""
        return {seed: getattr(r, metric.name) * metric.factor for seed, r in sorted(self.by_seed.items())}

    def estimate(self, metric: Metric) -> Estimate:
        """Mean and interval over seeds."""
        values = list(self.values(metric).values())
        if len(values) == 1:
            return Estimate(mean=values[0], count=1, interval=None)
        interval = mean_interval(values)
        return Estimate(mean=interval.mean, count=interval.count, interval=interval)

    @property
    def digital_share(self) -> float:
        """Share of the crossbar-capable parameters that stay digital."""
        return float(np.mean([r.digital_parameters / r.crossbar_parameters for r in self.by_seed.values()]))

    @property
    def same_for_every_seed(self) -> bool:
        """Nothing is random here: the sweep evaluates such a point for the first seed only."""
        return same_for_every_seed(next(iter(self.by_seed.values())).point)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Groups:
    """All results of a sweep. Absent keys were not evaluated (yet)."""

    digital: SweepResult | None
    tokens_per_byte: float
    metrics: tuple[Metric, ...]
    conditions: tuple[Condition, ...]
    lines: tuple[Line, ...]
    noise_scales: tuple[float, ...]
    fractions: tuple[float, ...]
    measured: Mapping[tuple[Condition, float, Line], Measured]

    @property
    def rules(self) -> tuple[str, ...]:
        """Names of the rules, in the order of their lines."""
        return tuple(dict.fromkeys(line.placement for line in self.lines if line.fraction is not None))

    def scales_of(self, conditions: Iterable[Condition]) -> list[float]:
        """Noise scales with a result under any of these conditions."""
        chosen = set(conditions)
        return sorted({scale for condition, scale, _ in self.measured if condition in chosen})

    def lines_of(self, conditions: Iterable[Condition]) -> list[Line]:
        """Placements with a result under any of these conditions."""
        chosen = set(conditions)
        present = {line for condition, _, line in self.measured if condition in chosen}
        return [line for line in self.lines if line in present]


def time_label(time_s: float | None) -> str:
    """Time since programming."""
    if time_s is None:
        return "just programmed"
    return f"{time_s / 86400:.6g} d" if time_s >= 86400 else f"{time_s:.6g} s"


def bits_label(bits: int) -> str:
    """Converters; 0 bits are ideal ones."""
    return f"{bits}-bit converters" if bits else "ideal converters"


def percent(share: float) -> str:
    """A share as a percentage, without needless digits."""
    return f"{100 * share:.4g} %"


def difference(a: Measured, b: Measured, metric: Metric) -> Estimate | None:
    """The mean of `a - b` over the seeds that both have: the same seed index means the same noise.

    A result that no seed changes stands for every seed. None without a common seed.
    """
    left, right = a.values(metric), b.values(metric)
    if a.same_for_every_seed and not b.same_for_every_seed:
        left = dict.fromkeys(right, next(iter(left.values())))
    elif b.same_for_every_seed and not a.same_for_every_seed:
        right = dict.fromkeys(left, next(iter(right.values())))
    common = [seed for seed in left if seed in right]
    if not common:
        return None
    if len(common) == 1:
        return Estimate(mean=left[common[0]] - right[common[0]], count=1, interval=None)
    found = paired_difference([left[seed] for seed in common], [right[seed] for seed in common])
    return Estimate(mean=found.mean, count=found.count, interval=found)


def group(record: SweepRecord) -> Groups:
    """Sorts the results of a sweep.

    Raises:
        InputError: for a store without results, with a result that is not a finite number, or one of no parameters.
    """
    if not record.results and record.failures:
        raise InputError(
            f"no point of the sweep gave a number ({len(record.failures)} of {record.points} failed): "
            f"{record.failures[0].point.describe()}: {record.failures[0].error}"
        )
    if not record.results:
        raise InputError(f"the sweep has no finished point yet (0 of {record.points}); run `hetmoe sweep` first")
    cells: dict[tuple[Condition, float, Line], dict[int, SweepResult]] = {}
    digital = None
    for result in record.results:
        _check(result)
        point = result.point
        if point.placement == REFERENCE:
            digital = result
            continue
        condition = Condition(device=point.device, time_s=point.time_s, bits=point.bits)
        line = Line(placement=point.placement, fraction=point.fraction)
        cells.setdefault((condition, point.noise_scale, line), {})[point.seed_index] = result
    metrics = (
        (PERPLEXITY, BITS, ACCURACY) if all(r.accuracy is not None for r in record.results) else (PERPLEXITY, BITS)
    )
    conditions = {condition for condition, _, _ in cells}
    swept = record.config.get("grid", {}).get("fractions", [])
    return Groups(
        digital=digital,
        tokens_per_byte=record.results[0].tokens / record.results[0].bytes,
        metrics=metrics,
        conditions=tuple(sorted(conditions, key=_condition_order)),
        lines=tuple(sorted({line for _, _, line in cells}, key=lambda line: line.order)),
        noise_scales=tuple(sorted({scale for _, scale, _ in cells})),
        fractions=tuple(sorted({line.fraction for _, _, line in cells if line.fraction is not None} | set(swept))),
        measured={key: Measured(by_seed=by_seed) for key, by_seed in cells.items()},
    )


def _condition_order(condition: Condition) -> tuple[str, float, float]:
    time_s = -1.0 if condition.time_s is None else condition.time_s
    return condition.device, time_s, condition.bits or math.inf  # ideal converters after real ones


def _check(result: SweepResult) -> None:
    for name in ("perplexity", "bits_per_byte", "accuracy"):
        value = getattr(result, name)
        if value is not None and not math.isfinite(value):
            raise InputError(f"the store holds {name}={value} for {result.point}; evaluate that sweep anew")
    for name in ("tokens", "bytes", "crossbar_parameters"):
        if getattr(result, name) < 1:
            raise InputError(f"the store holds {name}={getattr(result, name)} for {result.point}: it is damaged")
