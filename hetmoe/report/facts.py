"""The head of a report: model, grid, progress, seeds, and where the numbers come from."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from hetmoe.sweep.points import SweepPoint
from hetmoe.sweep.store import SweepRecord

Facts = list[tuple[str, str]]

_SIZES = (
    ("num_layers", "layers"),
    ("hidden_size", "hidden size"),
    ("num_experts", "experts per layer"),
    ("experts_per_token", "experts per token"),
    ("expert_intermediate_size", "hidden size of an expert"),
    ("vocab_size", "vocabulary"),
)
_TIMES = "_utc"  # of names that end so, the range is of interest
_OF_A_POINT = ("seconds", "evaluated_together")  # how long a call took says nothing about the sweep
_MOST_VALUES = 5
_MOST_FAILURES = 20


def progress(record: SweepRecord) -> str:
    """How much of the grid is done."""
    done = len(record.results) + len(record.failures)
    failed = ""
    if record.failures:
        failed = f"; {len(record.failures):,} points failed: they are in no mean, and are listed below"
    if done >= record.points:
        return f"complete: all {record.points:,} points of the grid are done{failed}"
    return (
        f"unfinished: {done:,} of {record.points:,} points of the grid are done; means and intervals are over the "
        f"seeds done so far, and placements that are not done are absent{failed}"
    )


def model_facts(record: SweepRecord) -> Facts:
    """Name, fingerprint and sizes."""
    config = record.model.get("config", {})
    result = record.results[0]
    facts = [("name", str(record.model.get("name"))), ("fingerprint", str(record.model.get("fingerprint")))]
    facts += [(label, f"{config[name]:,}") for name, label in _SIZES if isinstance(config.get(name), int)]
    facts.append(("parameters of crossbar-capable modules", f"{result.crossbar_parameters:,}"))
    text = f"{result.tokens:,} tokens, {result.bytes:,} bytes, {result.questions:,} next-word questions"
    return [*facts, ("text", text)]


def sweep_facts(record: SweepRecord) -> Facts:
    """The configuration, flattened."""
    return list(_flatten(record.config))


def failure_facts(record: SweepRecord) -> Facts:
    """Which points failed, seeds of one placement and hardware together, and why."""
    seeds: dict[tuple[SweepPoint, str], list[int]] = {}
    for failure in record.failures:
        of_any_seed = dataclasses.replace(failure.point, seed_index=0)
        seeds.setdefault((of_any_seed, failure.error), []).append(failure.point.seed_index)
    facts = [
        (f"{point.describe().rpartition(', ')[0]}, seeds {', '.join(map(str, sorted(found)))}", error)
        for (point, error), found in seeds.items()
    ]
    more = len(facts) - _MOST_FAILURES
    return [*facts[:_MOST_FAILURES], (f"and {more:,} more", "see failed.csv")] if more > 0 else facts


def provenance_facts(record: SweepRecord) -> Facts:
    """Versions, code, devices, commands and dates of everything that was evaluated, each with its different values."""
    facts = [(f"code: {name}", value) for name, value in _flatten(record.code)]
    columns: dict[str, list[str]] = {}
    for result in record.results:
        for name, value in _flatten(result.provenance):
            if name not in _OF_A_POINT:
                columns.setdefault(name, []).append(value)
    for name, values in columns.items():
        different = sorted(set(values))
        if name.endswith(_TIMES) and len(different) > 1:
            facts.append((name, f"{different[0]} to {different[-1]}"))
        else:
            more = f" and {len(different) - _MOST_VALUES} more" if len(different) > _MOST_VALUES else ""
            facts.append((name, "; ".join(different[:_MOST_VALUES]) + more))
    return facts


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Facts:
    facts: Facts = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            facts += _flatten(value, f"{prefix}{name} ")
        else:
            facts.append((f"{prefix}{name}", _text(value)))
    return facts


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not value:
        return "none"
    if isinstance(value, Sequence):
        return " ".join(_text(v) for v in value) if all(isinstance(v, str) for v in value) else json.dumps(value)[1:-1]
    return json.dumps(value, default=str)
