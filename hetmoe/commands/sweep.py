"""`hetmoe sweep`: from a CONFIG to a store of results, and a summary."""

from pathlib import Path
from typing import Any

from rich.console import Console

from hetmoe.commands.common import make_console
from hetmoe.commands.progress import show_progress
from hetmoe.commands.tables import metric_tables
from hetmoe.errors import InputError, Interrupted
from hetmoe.sweep.config import SweepConfig, read_config
from hetmoe.sweep.ledger import open_ledger
from hetmoe.sweep.points import SweepPoint, expand, group_points
from hetmoe.sweep.setup import activation_frequencies, early_identity, load_for_sweep, make_setup, model_identity
from hetmoe.sweep.store import read_status, read_sweep
from hetmoe.sweep.summary import summarise
from hetmoe.sweep.worker import work


def run(config_file: Path, output: Path | None, *, extend: bool, retry_failed: bool, status: bool) -> None:
    """Evaluates what is left, or only counts it."""
    if status and retry_failed:
        raise InputError("--status only counts: leave out --retry-failed")
    config = read_config(config_file)
    directory = config_file.with_suffix("") if output is None else output
    points = expand(config)
    identity = early_identity(config)
    counts = read_status(directory, identity, points, extend=extend)
    console = make_console()
    if status:
        failed = f"{counts.failed} failed, " if counts.failed else ""
        console.print(
            f"{directory}: {counts.finished} of {counts.points} points finished, {failed}{counts.claimed} claimed by "
            f"processes that run, {counts.open} open"
        )
        return
    try:
        _evaluate(config, directory, points, identity, extend=extend, retry_failed=retry_failed, console=console)
    except KeyboardInterrupt:
        counts = read_status(directory, identity, points, extend=extend)
        stored = counts.finished + counts.failed
        raise Interrupted(
            f"{stored} of {len(points)} points are stored in {directory}; the same command goes on"
        ) from None
    _print_summary(directory, console)


def _evaluate(
    config: SweepConfig, directory: Path, points: list[SweepPoint], identity: dict[str, Any], *, extend: bool,
    retry_failed: bool, console: Console,
) -> None:  # fmt: skip
    model = load_for_sweep(config)
    setup = make_setup(config, model)
    identity = identity | {"model": model_identity(model)}
    with open_ledger(directory, identity, group_points(points), extend=extend) as ledger:
        frequencies = activation_frequencies(setup)
        ledger.write_scores(
            {rule: scores.tolist() for rule, scores in setup.scores.items()},
            None if frequencies is None else frequencies.tolist(),
        )
        if retry_failed:
            ledger.retry_failed()
        seen = ledger.finished_count()
        console.print(
            f"[bold]{model.name}[/bold]: {len(points)} points, {seen} finished; {setup.text.size.tokens:,} tokens each"
        )
        with show_progress(console, "points", "points", len(points), seen) as advance:

            def show(finished: int) -> None:
                nonlocal seen
                advance(finished - seen)
                seen = finished

            work(setup, ledger, show)


def _print_summary(directory: Path, console: Console) -> None:
    """Perplexity of every placement at every noise scale, for each device, time and number of bits."""
    record = read_sweep(directory)
    for title, digital, lines in summarise(record):
        for table in metric_tables(f"Perplexity per token, {title}", "perplexity", 1.0, digital, lines, console):
            console.print(table)
    console.print(f"mean ± standard error over seeds; results: {directory}")
    if record.failures:
        first = record.failures[0]
        console.print(
            f"{len(record.failures)} points failed and are in no mean; --retry-failed evaluates them again. The first: "
            f"{first.point.describe()}: {first.error}",
            markup=False,
        )
