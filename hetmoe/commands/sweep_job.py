"""What the ways to run `hetmoe sweep` share: alone, in parts, and by Ray."""

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from hetmoe.checkpoint.load import parse_dtype
from hetmoe.commands.described_model import describe_model
from hetmoe.commands.mesh_options import MeshOptions
from hetmoe.commands.progress import show_progress
from hetmoe.commands.tables import metric_tables
from hetmoe.errors import Interrupted
from hetmoe.models.model import Model
from hetmoe.parallel.memory import Workload
from hetmoe.placement.scores import DEVICE_RULES
from hetmoe.sweep.collect import Collection
from hetmoe.sweep.config import SweepConfig
from hetmoe.sweep.ledger import Ledger
from hetmoe.sweep.points import SweepPoint
from hetmoe.sweep.setup import activation_frequencies, make_setup
from hetmoe.sweep.shared_ledger import SharedLedger
from hetmoe.sweep.store import read_sweep
from hetmoe.sweep.summary import summarise
from hetmoe.sweep.survey import read_status
from hetmoe.sweep.worker import work

MOST_DIFFERENCES = 5  # lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepJob:
    """A checked CONFIG, its grid, and how to go about it."""

    config: SweepConfig
    directory: Path
    points: list[SweepPoint]
    groups: list[list[SweepPoint]]
    identity: dict[str, Any]  # what is known without the model
    extend: bool
    retry_failed: bool
    console: Console
    devices: MeshOptions

    def mesh(self) -> jax.sharding.Mesh | None:
        """The mesh to load the model onto, or None.

        Raises:
            InputError: see `MeshOptions.choose`.
        """
        config, one = self.config, None
        described = describe_model(config.model, config.dtype, load=False)
        if described.layout is not None:
            one = f"{config.model}: a model with quantized experts"
        elif rules := [rule for rule in config.grid.rules if rule in DEVICE_RULES]:
            one = f"rule {rules[0]}"
        elif config.execution.weights == "kernel":
            one = "[execution] weights kernel"
        run = Workload(
            batch=config.text.batch, seq=config.text.seq, seeds=1, dtype=parse_dtype(config.dtype),
            weights=config.execution.weights, dense=True,
            calibrated=config.hardware.range_method() is not None and config.calibration_file() is None,
        )  # fmt: skip
        return self.devices.choose(described.config, run, self.console, one=one)


@contextlib.contextmanager
def goes_on(job: SweepJob) -> Generator[None]:
    """Says at Ctrl-C what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        counts = read_status(job.directory, job.identity, job.points, extend=job.extend)
        stored = counts.finished + counts.failed
        raise Interrupted(
            f"{stored} of {counts.points} points are stored in {job.directory}; the same command goes on"
        ) from None


def evaluate(
    job: SweepJob,
    model: Model,
    open_store: Callable[[], contextlib.AbstractContextManager[Ledger | SharedLedger]],
    title: str,
) -> None:
    """Evaluates what is left in a store."""
    setup = make_setup(job.config, model)
    with open_store() as ledger:
        frequencies = activation_frequencies(setup)
        ledger.write_scores(
            {rule: scores.tolist() for rule, scores in setup.scores.items()},
            None if frequencies is None else frequencies.tolist(),
        )
        if job.retry_failed:
            ledger.retry_failed()
        seen = ledger.finished_count()
        job.console.print(
            f"[bold]{title}[/bold]: {ledger.total} points, {seen} finished; {setup.text.size.tokens:,} tokens each"
        )
        with show_progress(job.console, "points", "points", ledger.total, seen) as advance:

            def show(finished: int) -> None:
                nonlocal seen
                advance(finished - seen)
                seen = finished

            work(setup, ledger, show)


def print_collection(job: SweepJob, collection: Collection) -> None:
    """What parts brought, and where they disagree with what was there."""
    if not collection.parts:
        return
    job.console.print(f"collected {collection.added} new points from {collection.parts} parts", markup=False)
    for line in collection.differences[:MOST_DIFFERENCES]:
        job.console.print(f"warning: {line}", markup=False, soft_wrap=True)
    if collection.differences:
        more = len(collection.differences) - MOST_DIFFERENCES
        job.console.print(
            f"warning: {f'{more} more such differences; ' if more > 0 else ''}machines of different kinds round "
            "differently: use one kind for points that are to be compared (column device_kind of the view results)",
            markup=False,
            soft_wrap=True,
        )


def print_summary(job: SweepJob) -> None:
    """Perplexity of every placement at every noise scale, for each device, time and number of bits."""
    record, console = read_sweep(job.directory), job.console
    for title, digital, lines in summarise(record):
        for table in metric_tables(f"Perplexity per token, {title}", "perplexity", 1.0, digital, lines, console):
            console.print(table)
    missing = len(job.points) - len(record.results) - len(record.failures)
    left = f"; {missing} of {len(job.points)} points are not there yet" if missing > 0 else ""
    console.print(f"mean ± standard error over seeds; results: {job.directory}{left}")
    if record.failures:
        first = record.failures[0]
        console.print(
            f"{len(record.failures)} points failed and are in no mean; --retry-failed evaluates them again. The first: "
            f"{first.point.describe()}: {first.error}",
            markup=False,
        )
