"""Tables of placements against noise scales."""

import dataclasses
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from hetmoe.evaluate.noise_sweep import Point
from hetmoe.evaluate.statistics import Interval, paired_difference

_ABSENT = "-"  # a point that failed

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def metric_tables(
    title: str, metric: str, factor: float, digital: Point | None, points: list[Point], console: Console
) -> list[Table]:
    """One table, or several where the terminal is too narrow for all noise scales."""
    digits = 3 if metric == "bits_per_byte" else 2

    def cell(point: Point) -> str:
        error = point.standard_error(metric)
        spread = "" if error is None else f" ± {error * factor:.{digits}f}"
        return f"{point.mean(metric) * factor:.{digits}f}{spread}"

    top = None if digital is None else ("all digital", f"{digital.mean(metric) * factor:.{digits}f}")
    return _tables(title, "placement", top, {(p.placement, p.noise_scale): cell(p) for p in points}, console)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one metric between two placements on the same chips; `interval` is None where neither differs by seed."""

    placement: str
    minus: str
    noise_scale: float
    mean: float
    interval: Interval | None


def differences(metric: str, points: Sequence[Point], pairs: Sequence[tuple[str, str]]) -> list[Difference]:
    """Mean paired difference over seeds with its 95 % interval, for every pair at every noise scale.

    A placement that has one value for all seeds (no noise) stands for each of them.
    """
    by_name = {(p.placement, p.noise_scale): p for p in points}
    found: list[Difference] = []
    for first, second in pairs:
        for scale in dict.fromkeys(p.noise_scale for p in points):
            a, b = (list(getattr(by_name[name, scale], metric)) for name in (first, second))
            count = max(len(a), len(b))
            a, b = a * (count // len(a)), b * (count // len(b))
            interval = None if count < 2 else paired_difference(a, b)
            mean = a[0] - b[0] if interval is None else interval.mean
            found.append(Difference(placement=first, minus=second, noise_scale=scale, mean=mean, interval=interval))
    return found


def difference_tables(title: str, found: Sequence[Difference], console: Console) -> list[Table]:
    """Differences and their intervals; a star marks intervals that exclude 0."""

    def cell(d: Difference) -> str:
        if d.interval is None:
            return f"{d.mean:+.2f}"
        star = "*" if d.interval.low > 0 or d.interval.high < 0 else ""
        return f"{d.mean:+.2f} [{d.interval.low:+.2f}, {d.interval.high:+.2f}]{star}"

    cells = {(f"{d.placement} - {d.minus}", d.noise_scale): cell(d) for d in found}
    return _tables(title, "difference", None, cells, console)


def _tables(
    title: str, first: str, top: tuple[str, str] | None, cells: dict[tuple[str, float], str], console: Console
) -> list[Table]:
    """Rows by name, a column per noise scale; `top` is a row of one value for all scales."""
    names, scales = list(dict.fromkeys(n for n, _ in cells)), list(dict.fromkeys(s for _, s in cells))
    if not names:  # nothing is analog
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        if top is not None:
            table.add_row(*top)
        return [] if top is None else [table]
    widths = {s: max(len(f"c = {s:g}"), *(len(cells.get((n, s), _ABSENT)) for n in names)) + 3 for s in scales}
    room = console.width - max(len(n) for n in names) - 4
    parts: list[list[float]] = []
    for scale in scales:
        if parts and sum(widths[s] for s in parts[-1]) + widths[scale] <= room:
            parts[-1].append(scale)
        else:
            parts.append([scale])

    tables: list[Table] = []
    for part in parts:
        table = Table(title=title, title_justify="left", title_style="bold")
        table.add_column(first, no_wrap=True)
        for scale in part:
            table.add_column(f"c = {scale:g}", justify="right", no_wrap=True)
        if top is not None:
            table.add_row(top[0], *[top[1]] * len(part))
        for name in names:
            table.add_row(name, *(cells.get((name, scale), _ABSENT) for scale in part))
        tables.append(table)
    return tables


def bytes_text(count: float) -> str:
    """Bytes in the unit that leaves one to four digits before the point."""
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:,.{0 if unit == 0 else 2}f} {_UNITS[unit]}"
