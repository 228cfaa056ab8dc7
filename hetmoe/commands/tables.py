"""Tables of placements against noise scales."""

from rich.console import Console
from rich.table import Table

from hetmoe.evaluate.noise_sweep import Point


def metric_tables(
    title: str, metric: str, factor: float, digital: Point | None, points: list[Point], console: Console
) -> list[Table]:
    """One table, or several where the terminal is too narrow for all noise scales."""
    scales = list(dict.fromkeys(p.noise_scale for p in points))
    names = list(dict.fromkeys(p.placement for p in points))
    digits = 3 if metric == "bits_per_byte" else 2

    def cell(point: Point) -> str:
        error = point.standard_error(metric)
        spread = "" if error is None else f" ± {error * factor:.{digits}f}"
        return f"{point.mean(metric) * factor:.{digits}f}{spread}"

    cells = {(p.placement, p.noise_scale): cell(p) for p in points}
    widths = {s: max(len(f"c = {s:g}"), *(len(cells[n, s]) for n in names)) + 3 for s in scales}
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
        table.add_column("placement", no_wrap=True)
        for scale in part:
            table.add_column(f"c = {scale:g}", justify="right", no_wrap=True)
        if digital is not None:
            table.add_row("all digital", *[f"{digital.mean(metric) * factor:.{digits}f}"] * len(part))
        for name in names:
            table.add_row(name, *(cells[name, scale] for scale in part))
        tables.append(table)
    return tables
