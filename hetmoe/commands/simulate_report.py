"""What `hetmoe simulate` prints and writes."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hetmoe.commands.common import write_json
from hetmoe.commands.hardware_tables import amount, description_record
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import make_directory, write_bytes, write_text
from hetmoe.hardware.description import Description
from hetmoe.report.render import to_files, with_settings
from hetmoe.serving.adaptive import Look
from hetmoe.serving.figure import draw_run
from hetmoe.serving.loop import Run
from hetmoe.serving.requests import Request, total_tokens
from hetmoe.serving.summary import LATENCIES, PERCENTILES
from hetmoe.serving.timeline import Span


def print_offered(console: Console, requests: Sequence[Request]) -> None:
    """What is asked for."""
    prompts, outputs = total_tokens(requests)
    last = max(requests[-1].arrival_s, 1e-9)
    console.print(
        f"{len(requests):,} requests in {last:,.4g} s: {prompts:,} tokens of prompts, {outputs:,} to generate "
        f"({outputs / last:,.4g} per second)",
        highlight=False,
    )


def print_span(console: Console, span: Span) -> None:
    """One line of the timeline."""
    row = span.record()
    loss = "" if row["expected_loss"] is None else f", {row['digital']:.1%} digital, loss +{row['expected_loss']:.4f}"
    console.print(
        f"{row['end_s']:>10,.4g} s: {row['tokens_per_s']:>11,.4g} tokens/s, {row['running']:6.1f} running, "
        f"{row['waiting']:6.1f} waiting, {amount(row['power_w'], 'W'):>9}{loss}",
        highlight=False,
    )


def print_summary(console: Console, summary: dict[str, Any], looks: Sequence[Look]) -> None:
    """Totals, percentiles, and what the policy did."""
    console.print(
        f"generated {summary['generated_tokens']:,} tokens in {summary['seconds']:,.4g} s: "
        f"{summary['tokens_per_s']:,.4g} tokens per second, {amount(summary['joules_per_token'], 'J')} per token, "
        f"{amount(summary['power_w'], 'W')}; busy {summary['busy']:.1%} of the time, with {summary['running']:.1f} "
        "requests at a time while busy",
        highlight=False,
    )
    table = Table(title="requests", title_justify="left")
    table.add_column("")
    for percentile in PERCENTILES:
        table.add_column(f"{percentile} %", justify="right")
    for name, label in LATENCIES.items():
        found = summary["latencies"][name]
        cells = ["-"] * len(PERCENTILES) if found is None else [amount(value, "s") for value in found.values()]
        table.add_row(label, *cells)
    console.print(table)
    if looks:
        changed = [look for look in looks if look.moved]
        console.print(
            f"the policy looked {len(looks)} times: it changed the plan {len(changed)} times "
            f"({sum(look.moved for look in looks)} moves), programmed {sum(look.reprogrammed for look in looks)} "
            f"experts again and corrected {sum(look.recompensated for look in looks)} scales of matrices, for "
            f"{amount(summary['action_j'], 'J')}",
            highlight=False,
        )


def write_run(
    options: dict[str, Any], output: Path, model: str, plan: str, hardware: Sequence[Description], served: Run,
    summary: dict[str, Any], looks: Sequence[Look], facts: dict[str, Any],
) -> None:  # fmt: skip
    """A record, the figure, and the times of every request."""
    make_directory(output)
    record = {
        "format": "hetmoe-simulation-1", "provenance": provenance(), "model": model, "plan": plan, "options": options,
        "hardware": [description_record(part) for part in hardware], **facts, "summary": summary,
        "spans": [span.record() for span in served.spans], "looks": [dataclasses.asdict(look) for look in looks],
    }  # fmt: skip
    write_json(output / "simulation.json", record)
    lines = io.StringIO()
    rows = csv.writer(lines, lineterminator="\n")
    rows.writerow(["arrival_s", "prompt_tokens", "output_tokens", "started_s", "first_token_s", "finished_s"])
    for one in sorted(served.served, key=lambda s: s.request.arrival_s):
        rows.writerow([*one.request, one.started_s, one.first_s, one.finished_s])
    write_text(output / "requests.csv", lines.getvalue())
    png, svg = with_settings(lambda: to_files(draw_run(f"{model}, {plan}", served, looks)))
    write_bytes(output / "simulation.png", png)
    write_bytes(output / "simulation.svg", svg)
