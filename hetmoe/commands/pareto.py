"""`hetmoe pareto`: which deployments no other beats in quality, energy and throughput."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.analog.spec import describe
from hetmoe.checkpoint.load import load_model
from hetmoe.commands.common import make_console, write_json
from hetmoe.commands.hardware_tables import amount, description_record, print_descriptions
from hetmoe.commands.pareto_measure import ParetoRequest, measure
from hetmoe.errors import InputError
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import make_directory, write_bytes, write_text
from hetmoe.hardware.description import open_description
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.parts import PART_NAMES
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.report.render import to_files, with_settings
from hetmoe.sweep.store import read_sweep
from hetmoe.technologies.from_store import config_of, tried_in
from hetmoe.technologies.front_figure import draw_front
from hetmoe.technologies.tried import Point, front_of, points_of


def run(request: ParetoRequest) -> None:
    """Measures or reads, estimates, and writes tables and figures."""
    output = request.check()
    hardware = (
        open_description(request.processor, "digital"), open_description(request.chip, "analog"),
        open_description(request.link, "link"),
    )  # fmt: skip
    console = make_console()
    if request.is_store:
        record = read_sweep(Path(request.source))
        config, frequency = config_of(record), record.frequencies
        frequency = uniform_frequency(config) if frequency is None else np.asarray(frequency, np.float64)
        groups = {c.slug: (c.name, tried) for c, tried in tried_in(record, config).items()}
        model_name, facts = str(record.model.get("name")), {"sweep": record.config}
        if not groups:
            raise InputError(f"{request.source}: the sweep has no finished point with analog experts yet")
    else:
        model = load_model(request.source, "float32")
        tried, frequency = measure(request, model, hardware, console)
        config, model_name, facts = model.config, model.name, {"analog": describe(request.spec())}
        groups = {"pareto": (f"{request.device}, c = {request.noise_scale:g}, {request.seeds} seeds", tried)}
    context = config.max_position_embeddings if request.context is None else request.context
    context = min(context, 1024) if request.context is None else context
    print_descriptions(console, dict(zip(("digital unit", "chips", "link"), hardware, strict=True)))
    written: dict[str, Any] = {}
    for slug, (title, tried) in groups.items():
        points = points_of(
            config, tried, frequency, request.batches, context, system_of(*hardware), request.schedule  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        front = front_of(points)
        _print_front(console, f"{model_name}: {title}, {request.schedule}, context {context}", points, front)
        _write(output, slug, f"{model_name}: {title}", points, front)
        written[slug] = {"title": title, "points": [p.record() for p in points], "front": [p.record() for p in front]}
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(request).items()}
    write_json(
        output / "pareto.json",
        {
            "format": "hetmoe-pareto-1", "provenance": provenance(), "model": model_name, "options": options,
            "context": context, "hardware": [description_record(part) for part in hardware], **facts, "groups": written,
        },
    )  # fmt: skip
    console.print(f"tables and figures: {output}")


def _print_front(console: Console, title: str, points: Sequence[Point], front: Sequence[Point]) -> None:
    beaten = f"{len(front)} of {len(points)} points are beaten by none (perplexity, energy, throughput)"
    unfit = sum(not p.fits for p in points)
    table = Table(title=f"{title}\n{beaten}" + (f"; {unfit} do not fit the hardware" if unfit else ""),
                  title_justify="left")  # fmt: skip
    for heading in (
        "deployment",
        "batch",
        "perplexity",
        "accuracy",
        "tokens/s",
        "J/token",
        "memory",
        "tiles",
        "most of the time",
    ):
        table.add_column(heading, justify="left" if heading in ("deployment", "most of the time") else "right")
    for point in front:
        error = "" if point.perplexity_error is None else f" ± {point.perplexity_error:.2f}"
        table.add_row(
            point.tried.name, str(point.batch), f"{point.perplexity:.2f}{error}",
            "-" if point.accuracy is None else f"{point.accuracy:.2%}", f"{point.tokens_per_s:,.0f}",
            amount(point.joules_per_token, "J"), amount(point.memory_used, "B"), f"{point.tiles:,.0f}",
            PART_NAMES[point.bound],
        )  # fmt: skip
    console.print(table)


def _write(output: Path, slug: str, title: str, points: Sequence[Point], front: Sequence[Point]) -> None:
    make_directory(output)
    for name, rows in ((f"{slug}.csv", points), (f"{slug}-front.csv", front)):
        text = io.StringIO()
        records = [point.record() for point in rows]
        writer = csv.DictWriter(text, fieldnames=list(points[0].record()), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        write_text(output / name, text.getvalue())
    png, svg = with_settings(lambda: to_files(draw_front(title, points, front)))
    write_bytes(output / f"{slug}.png", png)
    write_bytes(output / f"{slug}.svg", svg)
