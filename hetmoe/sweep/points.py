"""The points of a sweep: what identifies one, the product of the grid's axes, and which are evaluated together."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator

from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.evaluate.noise_sweep import is_quiet
from hetmoe.placement.scores import DEVICE_RULES, RANDOM
from hetmoe.sweep.config import SweepConfig

ALL_DIGITAL, ALL_ANALOG = "all_digital", "all_analog"
MOST_POINTS = 1_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One placement on one piece of hardware with one noise seed."""

    placement: str  # "all_digital", "experts_analog", "all_analog", or a rule's name
    fraction: float | None  # digital fraction; None for placements without a rule
    device: str
    noise_scale: float
    time_s: float | None  # None = programming noise only
    bits: int  # of DACs and ADCs; 0 = ideal converters
    seed_index: int

    def describe(self) -> str:
        """For messages."""
        share = "" if self.fraction is None else f" at fraction {self.fraction:g}"
        time = "" if self.time_s is None else f", {self.time_s:g} s"
        noise = f"c = {self.noise_scale:g}"
        return f"{self.placement}{share} on {self.device}, {noise}{time}, {self.bits} bits, seed {self.seed_index}"


_DIGITAL = SweepPoint(
    placement=ALL_DIGITAL, fraction=None, device="none", noise_scale=0.0, time_s=None, bits=0, seed_index=0
)


def point_id(point: SweepPoint) -> str:
    """Identity of a point: a hash of its canonical JSON."""
    content = json.dumps(dataclasses.asdict(point), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:32]


def same_for_every_seed(point: SweepPoint) -> bool:
    """Whether no seed changes anything: a placement that is not drawn, on hardware where nothing is random."""
    if point.placement in {ALL_DIGITAL, RANDOM}:
        return point.placement == ALL_DIGITAL
    return _quiet(point.device, point.noise_scale, point.time_s)


def _quiet(device: str, noise_scale: float, time_s: float | None) -> bool:
    return is_quiet(noise_scale, analog_spec(device, noise_scale=noise_scale, time_s=time_s))


def score_name(rule: str, device: str) -> str:
    """Which scores place a point: those of its rule, for its device where that matters."""
    return f"{rule} ({device})" if rule in DEVICE_RULES else rule


def scored_rule(name: str) -> str:
    """The rule of a `score_name`."""
    return next((rule for rule in DEVICE_RULES if name.startswith(f"{rule} (")), name)


def expand(config: SweepConfig) -> list[SweepPoint]:
    """All points of the grid, those of one compiled program side by side.

    Where nothing is random (`same_for_every_seed`) only seed 0 exists; without analog parts there is a single point.

    Raises:
        InputError: for a grid beyond `MOST_POINTS`.
    """
    grid = config.grid
    lines = len(grid.placements) + len(grid.rules) * len(grid.fractions)
    most = lines * len(grid.devices) * len(grid.noise_scales) * len(grid.times) * len(grid.bits) * grid.seeds
    if most > MOST_POINTS:
        raise InputError(f"{config.source}: [grid] has {most:,} points; at most {MOST_POINTS:,} are possible")
    return ([_DIGITAL] if ALL_DIGITAL in grid.placements else []) + list(_analog_points(config))


def _analog_points(config: SweepConfig) -> Iterator[SweepPoint]:
    grid = config.grid
    plain = [(name, None) for name in grid.placements if name not in {ALL_DIGITAL, ALL_ANALOG}]
    without_dense = [*plain, *itertools.product(grid.rules, grid.fractions)]
    with_dense = [(ALL_ANALOG, None)] if ALL_ANALOG in grid.placements else []
    hardware = itertools.product(grid.devices, grid.bits, grid.times, (without_dense, with_dense), grid.noise_scales)
    for device, bits, time_s, lines, scale in hardware:
        quiet = _quiet(device, scale, time_s)
        for seed in range(grid.seeds):
            for placement, fraction in lines:
                if seed == 0 or not quiet or placement == RANDOM:
                    yield SweepPoint(
                        placement=placement, fraction=fraction, device=device, noise_scale=scale, time_s=time_s,
                        bits=bits, seed_index=seed,
                    )  # fmt: skip


def group_points(points: Iterable[SweepPoint]) -> list[list[SweepPoint]]:
    """Points that share one programming of the crossbars; those with dense modules on them are apart."""
    groups: dict[tuple[object, ...], list[SweepPoint]] = {}
    for point in points:
        dense = point.placement == ALL_ANALOG
        key = (point.device, point.bits, point.time_s, dense, point.noise_scale, point.seed_index)
        groups.setdefault(key, []).append(point)
    return list(groups.values())
