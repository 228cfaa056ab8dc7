"""`hetmoe hardware`: throughput, energy, memory, tiles and area of a model on described hardware."""

import dataclasses
from pathlib import Path
from typing import Any

from hetmoe.commands.common import make_console, write_json
from hetmoe.commands.described_model import DescribedModel, deployment_of, describe_model, plan_of
from hetmoe.commands.hardware_tables import (
    Case,
    description_record,
    print_cases,
    print_descriptions,
    print_explanation,
    print_list,
    print_routing,
    routing_record,
)
from hetmoe.commands.one_placement import PlacementOptions
from hetmoe.commands.routing_options import TEXT, UNIFORM, RoutingOptions
from hetmoe.errors import InputError
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import check_writable
from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.description import Description, open_description, shipped_descriptions
from hetmoe.hardware.estimate import estimate
from hetmoe.hardware.explain import explain
from hetmoe.hardware.fit import check_fit
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.parts import SCHEDULES
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.routing_file import RoutingStatistics
from hetmoe.hardware.step import decode_step, prefill_step

MOST_CONTEXT = 1024  # of the default, where the model has more


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareRequest(PlacementOptions, RoutingOptions):
    """The options of `hetmoe hardware`, named as there."""

    processor: str
    chip: str
    link: str
    batch: int
    context: int | None
    prompt: int | None
    explain: bool
    dtype: str | None
    json_file: Path | None

    def check(self) -> None:
        """Raises InputError for values that are wrong whatever the model."""
        if self.batch < 1:
            raise InputError(f"--batch {self.batch} must be at least 1")
        self.check_placement()
        self.check_routing()
        if self.json_file is not None:
            check_writable(self.json_file)


def show(name: str) -> None:
    """Prints a shipped description as it is, to be copied and changed."""
    shipped = shipped_descriptions()
    if name not in shipped:
        raise InputError(f"hardware {name!r} is not known: use one of {', '.join(shipped)}")
    print(shipped[name].read_text(encoding="utf-8"), end="")  # noqa: T201 (for a file, not for a terminal's width)


def list_hardware() -> None:
    """Prints all shipped descriptions with what they state."""
    print_list(make_console())


def run(request: HardwareRequest) -> None:
    """Reads, estimates and prints."""
    request.check()
    digital, analog, link = (
        open_description(request.processor, "digital"), open_description(request.chip, "analog"),
        open_description(request.link, "link"),
    )  # fmt: skip
    console, how = make_console(), request.how_routed
    described = describe_model(request.model, request.dtype, load=how == TEXT)
    config = described.config
    name, plan = plan_of(described, request, uniform=how == UNIFORM)
    where = deployment_of(described, plan)
    statistics = request.statistics(described)
    frequency = uniform_frequency(config) if statistics is None else statistics.frequency
    context = min(config.max_position_embeddings, MOST_CONTEXT) if request.context is None else request.context
    prompt = context if request.prompt is None else request.prompt
    steps = {
        f"decode: batch {request.batch}, context {context}": decode_step(config, frequency, request.batch, context),
        f"prefill: {request.batch} x {prompt} tokens": prefill_step(config, frequency, request.batch, prompt),
    }
    system = system_of(digital, analog, link)
    cases: list[Case] = []
    for title, step in steps.items():
        demand = model_demand(config, where, step)
        for schedule in SCHEDULES:
            found = estimate(config, demand, system, schedule)
            check_fit(config, found, digital, analog)
            terms = explain(config, demand, system, schedule)
            cases.append(Case(title=title, schedule=schedule, estimate=found, terms=terms))
    console.print(f"[bold]{described.name}[/bold], {name}", highlight=False)
    print_descriptions(console, {"digital unit": digital, "chips": analog, "link": link})
    print_routing(console, config, frequency, statistics, request.batch)
    print_cases(console, cases)
    if request.explain:
        print_explanation(console, cases)
    if request.json_file is not None:
        write_json(request.json_file, _record(request, described, name, [digital, analog, link], statistics, cases))
        console.print(f"results: {request.json_file}")


def _record(
    request: HardwareRequest, described: DescribedModel, placement: str, hardware: list[Description],
    statistics: RoutingStatistics | None, cases: list[Case],
) -> dict[str, Any]:  # fmt: skip
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(request).items()}
    return {
        "format": "hetmoe-hardware-estimate-1",
        "provenance": provenance(),
        "model": {
            "name": described.name,
            "fingerprint": described.identity,
            "config": dataclasses.asdict(described.config),
            "quantization": None if described.layout is None else described.layout.to_json(),
        },
        "options": options,
        "placement": placement,
        "hardware": [description_record(part) for part in hardware],
        "routing": routing_record(described.config, statistics, request.batch),
        "estimates": [case.record() for case in cases],
    }
