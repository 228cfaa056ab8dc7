"""Tables and records of `hetmoe hardware`."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.hardware.description import FIELDS, Description, read_description, shipped_descriptions
from hetmoe.hardware.estimate import Estimate
from hetmoe.hardware.explain import KindTerms
from hetmoe.hardware.parts import PART_NAMES, Parts, Schedule
from hetmoe.hardware.routing import distinct_experts, uniform_frequency
from hetmoe.hardware.routing_file import RoutingStatistics
from hetmoe.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One estimate with its terms."""

    title: str
    schedule: Schedule
    estimate: Estimate
    terms: dict[str, KindTerms]

    @property
    def bound(self) -> tuple[str, float]:
        """(name of the longest part of the step, its share)."""
        parts = {name: float(value) for name, value in self.estimate.parts._asdict().items()}
        longest = max(parts, key=lambda name: parts[name])
        return longest, parts[longest] / sum(parts.values())

    def record(self) -> dict[str, Any]:
        """Plain values, in SI units and bytes; what is not stated is None."""
        of, bound = self.estimate, self.bound
        names = [f.name for f in dataclasses.fields(of) if f.name not in ("parts", "fits_memory", "fits_chips")]
        return {
            "step": self.title,
            "schedule": self.schedule,
            **{name: _plain(getattr(of, name)) for name in names},
            "parts": {name: _plain(value) for name, value in of.parts._asdict().items()},
            "bound": {"part": bound[0], "share": bound[1]},
            "terms": {
                kind: {
                    "tiles_of_a_module": terms.tiles,
                    **{name: np.asarray(value).tolist() for name, value in vars(terms.demand).items()},
                    "parts": {name: np.asarray(value).tolist() for name, value in terms.parts._asdict().items()},
                }
                for kind, terms in self.terms.items()
            },
        }  # fmt: skip


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


_PREFIXES = tuple((10.0 ** (3 * power), prefix) for power, prefix in zip(range(5, -5, -1), "PTGMk munp", strict=True))


def amount(value: float, unit: str) -> str:
    """Four digits, with the unit's prefix."""
    if value == 0 or not math.isfinite(value):
        return f"0 {unit}" if value == 0 else "not stated"
    size, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), _PREFIXES[-1])
    digits = max(0, 3 - math.floor(math.log10(abs(value / size))))
    return f"{value / size:,.{digits}f} {prefix.strip()}{unit}"


def print_list(console: Console) -> None:
    """All shipped descriptions."""
    for kind in FIELDS:
        found = {name: read_description(path) for name, path in shipped_descriptions().items()}
        chosen = {name: d for name, d in found.items() if d.kind == kind}
        table = Table(title=f"{kind} hardware", title_justify="left")
        table.add_column("name", no_wrap=True)
        for name in chosen:
            table.add_column(name, justify="right")
        for field in FIELDS[kind]:
            cells = [d.entries[field].stated if field in d.entries else "-" for d in chosen.values()]
            table.add_row(field, *cells)
        console.print(table)
    console.print(
        "hetmoe hardware --show NAME prints a description with the source of every number; save it, change it, and "
        "give the file instead of the name",
        highlight=False,
    )


def description_record(description: Description) -> dict[str, Any]:
    """Values in the units of `FIELDS`, as they were stated, and sources."""
    return {
        "kind": description.kind,
        "name": description.name,
        "entries": {field: dataclasses.asdict(entry) for field, entry in description.entries.items()},
        "time_multiplexing": description.multiplexing,
    }


def print_descriptions(console: Console, parts: Mapping[str, Description]) -> None:
    """What the estimate is of."""
    for role, description in parts.items():
        console.print(f"{role}: {description.name}", highlight=False, markup=False)


def routing_record(config: ModelConfig, statistics: RoutingStatistics | None, batch: int) -> dict[str, Any]:
    """Different experts per step, by layer, from three sources."""
    uniform = uniform_frequency(config)
    record: dict[str, Any] = {"distinct_experts": {"uniform": distinct_experts(uniform, batch).tolist()}}
    if statistics is not None:
        record["tokens"] = statistics.tokens
        record["frequency"] = statistics.frequency.tolist()
        record["distinct_experts"]["frequency"] = distinct_experts(statistics.frequency, batch).tolist()
        counted = next((c for c in statistics.counted if c.batch == batch), None)
        record["distinct_experts"]["counted"] = None if counted is None else list(counted.distinct)
    return record


def print_routing(
    console: Console, config: ModelConfig, frequency: np.ndarray, statistics: RoutingStatistics | None, batch: int
) -> None:
    """How many experts a decoding step needs."""
    found = routing_record(config, statistics, batch)["distinct_experts"]
    said = [f"{np.mean(found['uniform']):.2f} if all were chosen equally often"]
    if statistics is not None:
        said.insert(0, f"{np.mean(found['frequency']):.2f} by this text's frequencies ({statistics.tokens:,} tokens)")
        if found["counted"] is not None:
            said.insert(1, f"{np.mean(found['counted']):.2f} counted on it")
    console.print(
        f"different experts that a step of {batch} tokens needs, of {frequency.shape[1]} in a layer: {'; '.join(said)}",
        highlight=False,
    )


def print_cases(console: Console, cases: Sequence[Case]) -> None:
    """The answer: one column for every step and schedule."""
    table = Table(title_justify="left")
    table.add_column("")
    for case in cases:
        table.add_column(f"{case.title}\n{case.schedule}", justify="right")

    def row(name: str, cell: Any) -> None:
        table.add_row(name, *(cell(case.estimate) for case in cases))

    row("tokens per second", lambda e: f"{float(e.tokens_per_s):,.{0 if e.tokens_per_s > 1e3 else 2}f}")
    row("energy per token", lambda e: amount(float(e.joules_per_token), "J"))
    row("tokens per joule", lambda e: f"{1 / float(e.joules_per_token):,.4g}")
    row("time of a step", lambda e: amount(float(e.step_time), "s"))
    table.add_row("most of it", *(f"{PART_NAMES[b[0]]} ({b[1]:.0%})" for b in (case.bound for case in cases)))
    row("power", lambda e: amount(float(e.step_energy / e.step_time), "W"))
    row("digital memory moved per step", lambda e: amount(float(e.memory_traffic), "B"))
    row("digital memory used", lambda e: amount(float(e.memory_used), "B"))
    row("moved over the link per step", lambda e: amount(float(e.exchanged_bytes), "B"))
    row("tile operations per step", lambda e: f"{float(e.operations):,.0f}")
    row("tiles needed, on chips", lambda e: f"{float(e.tiles):,.0f}, {float(e.chips):,.0f}")
    row("area of their tiles", lambda e: f"{float(e.area) * 1e6:,.0f} mm^2" if math.isfinite(e.area) else "not stated")
    for name, label in (
        ("digital_energy", "digital unit"), ("analog_energy", "tile operations"), ("static_energy", "chips, static"),
        ("link_energy", "link"),
    ):  # fmt: skip
        row(f"energy per step: {label}", lambda e, name=name: amount(float(getattr(e, name)), "J"))
    console.print(table)


def print_explanation(console: Console, cases: Sequence[Case]) -> None:
    """Every term of every step, by kind of module, summed over layers."""
    for title in dict.fromkeys(case.title for case in cases):
        _print_terms(console, title, [case for case in cases if case.title == title])
    console.print(
        "overlap: what experts and shared_experts take is that of each branch alone; of the step counts the longer "
        "branch of every layer",
        highlight=False,
    )


def _print_terms(console: Console, title: str, cases: Sequence[Case]) -> None:
    """What a step asks for, which is the same for all schedules, and what each schedule makes of it."""
    terms = cases[0].terms
    table = Table(title=f"{title}: terms of a step, all layers", title_justify="left")
    table.add_column("term")
    for kind in [*terms, "step"]:
        table.add_column(kind, justify="right")
    for field, label, unit in (
        ("weight_bytes", "digital weights read", "B"), ("cache_bytes", "key-value cache moved", "B"),
        ("activation_bytes", "activations moved", "B"), ("flops", "digital arithmetic", "FLOP"),
        ("exchanged_bytes", "moved over the link", "B"),
    ):  # fmt: skip
        values = [of.demanded(field) for of in terms.values()]
        table.add_row(label, *(amount(v, unit) for v in [*values, sum(values)]))
    for field, label in (
        ("transfers", "transfers over the link"), ("analog", "modules on chips"), ("analog_used", "of these, needed"),
        ("vectors", "vectors through them"), ("queue", "longest queues, added up over layers"),
    ):  # fmt: skip
        values = [of.demanded(field) for of in terms.values()]
        table.add_row(label, *(f"{v:,.1f}" for v in [*values, sum(values)]))
    table.add_row("tiles of a module", *(f"{of.tiles:,.0f}" for of in terms.values()), "")
    operations = [of.operations for of in terms.values()]
    table.add_row("tile operations", *(f"{v:,.0f}" for v in [*operations, sum(operations)]))
    for case in cases:
        table.add_section()
        for part in Parts._fields:
            values = [of.time(part) for of in case.terms.values()]
            counted = float(getattr(case.estimate.parts, part))
            if any(values):
                table.add_row(f"{case.schedule}: {PART_NAMES[part]}", *(amount(v, "s") for v in [*values, counted]))
    console.print(table)
