"""What `hetmoe eval` prints and writes of its results."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from hetmoe.commands.common import write_json
from hetmoe.commands.mesh_options import load_table
from hetmoe.commands.tables import Difference, difference_tables, differences, metric_tables
from hetmoe.evaluate.noise_sweep import Point, TextSize
from hetmoe.evaluate.plot import plot_sweep
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import write_bytes
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.quantize.layout import layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Results:
    """All that an evaluation found.

    Attributes:
        model: what was evaluated.
        size: of the text.
        files: of the text.
        digital: the model without any analog part.
        points: placements at noise scales.
        load: token copies of the digital pass, `[layers, experts]`.
        pairs: placements to compare chip by chip.
        seeds: noise seeds.
        seconds: that all took.
    """

    model: Model
    size: TextSize
    files: list[Path]
    digital: Point
    points: list[Point]
    load: np.ndarray
    pairs: list[tuple[str, str]]
    seeds: int
    seconds: float

    def differences(self) -> list[Difference]:
        """Paired differences of perplexity."""
        return differences("perplexity", self.points, self.pairs)


def print_results(results: Results, console: Console) -> None:
    """Tables of all metrics, of differences and, on a mesh, of the load."""
    if results.model.mesh is not None:
        console.print(load_table(results.load, results.model.mesh))
    for metric, title, factor in (
        ("perplexity", "Perplexity per token", 1.0),
        ("bits_per_byte", "Bits per byte", 1.0),
        ("accuracy", "Next-word accuracy, % of questions with 4 answers", 100.0),
    ):
        if getattr(results.digital, metric) is None:
            console.print("no next-word accuracy: the text has too few different words that are one token")
            continue
        for table in metric_tables(title, metric, factor, results.digital, results.points, console):
            console.print(table)
    title = "Perplexity, paired differences: mean [95 % interval]"
    for table in difference_tables(title, results.differences(), console):
        console.print(table)
    if results.points:
        console.print(f"mean ± standard error over {results.seeds} seeds; done in {results.seconds:.0f} s")


def write_results(
    results: Results, title: str, plot: Path | None, json_file: Path | None, settings: dict[str, Any], console: Console
) -> None:
    """Writes the figure and the record that are asked for.

    Args:
        results: of the evaluation.
        title: of the figure.
        plot: where to write the figure; None = nowhere.
        json_file: where to write the record.
        settings: entries of the record that say how the results were made.
        console: tells of both.
    """
    if plot is not None and not results.points:
        console.print("no figure: nothing is analog")
    elif plot is not None:
        write_bytes(plot, plot_sweep(results.digital, results.points, title))
        console.print(f"figure: {plot}")
    if json_file is not None:
        write_json(json_file, _record(results, settings))
        console.print(f"results: {json_file}")


def _record(results: Results, settings: dict[str, Any]) -> dict[str, Any]:
    model, layout = results.model, layout_of(results.model.params.layers.moe.experts)
    paired = [dataclasses.asdict(difference) for difference in results.differences()]
    return {
        "format": "hetmoe-eval-1",
        "provenance": provenance(),
        "model": {
            "name": model.name,
            "fingerprint": model_fingerprint(model),
            "config": dataclasses.asdict(model.config),
            "quantization": None if layout is None else layout.to_json(),
        },
        "text": {"files": [f.name for f in results.files], **dataclasses.asdict(results.size)},
        **settings,
        "digital": dataclasses.asdict(results.digital),
        "points": [dataclasses.asdict(p) for p in results.points],
        "expert_load": results.load.tolist(),
        "paired_differences": {"metric": "perplexity", "of": paired},
        "seconds": round(results.seconds, 1),
    }
