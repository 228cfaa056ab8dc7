"""Results of a store as lines of a table: seeds gathered, one table for each hardware."""

from collections.abc import Iterable, Iterator

from hetmoe.evaluate.noise_sweep import Point
from hetmoe.sweep.points import ALL_DIGITAL
from hetmoe.sweep.store import SweepRecord, SweepResult


def summarise(record: SweepRecord) -> Iterator[tuple[str, Point | None, list[Point]]]:
    """(what hardware, all digital, placements at all noise scales) for every device, time and number of bits.

    Placements and noise scales come in the order of CONFIG.
    """
    grid = record.config["grid"]
    names = [(name, None) for name in grid["placements"]] + [(r, f) for r in grid["rules"] for f in grid["fractions"]]
    results = [r for r in record.results if r.point.placement != ALL_DIGITAL]
    digital = [r for r in record.results if r.point.placement == ALL_DIGITAL]
    digital_point = _point("all digital", 0.0, digital) if digital else None
    for hardware in dict.fromkeys((r.point.device, r.point.time_s, r.point.bits) for r in results):
        device, time_s, bits = hardware
        here = [r for r in results if (r.point.device, r.point.time_s, r.point.bits) == hardware]
        lines = [
            _point(name if fraction is None else f"{name} {fraction:.1%} digital", scale, chosen)
            for name, fraction in names
            for scale in grid["noise_scales"]
            if (chosen := [r for r in here if _is(r, name, fraction, scale)])
        ]
        when = "programming noise only" if time_s is None else f"{time_s:g} s after programming"
        yield f"{device}, {when}, {f'{bits} bits' if bits else 'ideal converters'}", digital_point, lines


def _is(result: SweepResult, name: str, fraction: float | None, scale: float) -> bool:
    point = result.point
    return (point.placement, point.fraction, point.noise_scale) == (name, fraction, scale)


def _point(name: str, scale: float, results: Iterable[SweepResult]) -> Point:
    by_seed = sorted(results, key=lambda result: result.point.seed_index)
    accuracy = [r.accuracy for r in by_seed if r.accuracy is not None]
    return Point(
        placement=name,
        noise_scale=scale,
        deterministic=len(by_seed) == 1,
        perplexity=[r.perplexity for r in by_seed],
        bits_per_byte=[r.bits_per_byte for r in by_seed],
        accuracy=accuracy or None,
    )
