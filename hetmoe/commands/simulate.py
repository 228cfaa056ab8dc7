"""`hetmoe simulate`: requests through the hardware model, with queues, energy and plans that change."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.spec import AnalogSpec, analog_spec, describe
from hetmoe.commands.common import choose_text, make_console
from hetmoe.commands.described_model import DescribedModel, deployment_of, describe_model, plan_of
from hetmoe.commands.hardware_tables import print_descriptions
from hetmoe.commands.one_placement import PlacementOptions
from hetmoe.commands.routing_options import TEXT, UNIFORM, RoutingOptions
from hetmoe.commands.simulate_report import print_offered, print_span, print_summary, write_run
from hetmoe.errors import InputError
from hetmoe.evaluate.prepare import unevaluated_text
from hetmoe.files import check_new_directory
from hetmoe.hardware.demand import model_demand, stored_bytes
from hetmoe.hardware.description import Description, open_description
from hetmoe.hardware.estimate import Estimate, estimate
from hetmoe.hardware.fit import check_fit
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.parts import SCHEDULES
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.step import decode_step
from hetmoe.placement.plan import Plan, all_digital, experts_analog
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.runtime.deploy import check_drifting
from hetmoe.runtime.knowledge import Costs, make_knowledge
from hetmoe.runtime.watch import Watch
from hetmoe.serving.adaptive import Adaptive, Look, energy_ends, parse_schedule
from hetmoe.serving.costs import StepCosts, step_tables
from hetmoe.serving.loop import Controller, fixed, serve
from hetmoe.serving.requests import Request, poisson_requests, read_trace, total_tokens
from hetmoe.serving.summary import summarise

SPANS = 30  # of the timeline, where no width is given
DRAWN = {"rate": 4.0, "duration": 60.0, "prompt": 256.0, "generate": 128.0}  # options without --trace: defaults
ADAPTIVE = dict.fromkeys(("budget", "noise", "observe", "dwell")) | {"device": "pcm", "noise_scale": 1.0, "probes": 8}
KNOWN_TOKENS = 4096  # of text that the policy's losses are estimated on, at most


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimulateRequest(PlacementOptions, RoutingOptions):
    """The options of `hetmoe simulate`, named as there."""

    processor: str
    chip: str
    link: str
    schedule: str
    trace: Path | None
    rate: float | None
    duration: float | None
    prompt: float | None
    generate: float | None
    max_batch: int
    span: float | None
    adaptive: bool
    budget: list[str]
    noise: list[str]
    observe: float | None
    dwell: float | None
    device: str | None
    noise_scale: float | None
    probes: int | None
    dtype: str | None
    output: Path | None

    def check(self) -> None:
        """Raises InputError for values that are wrong whatever the model."""
        self.check_placement()
        self.check_routing()
        if self.schedule not in SCHEDULES:
            raise InputError(f"--schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.max_batch < 1:
            raise InputError(f"--max-batch {self.max_batch} must be at least 1")
        if self.trace is not None and (given := self._given(DRAWN)):
            raise InputError(f"{', '.join(given)}: --trace says which requests arrive, so leave out one or the other")
        for name in ("span", "observe"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise InputError(f"--{name} {value:g} must be a positive number of seconds")
        if self.dwell is not None and not (math.isfinite(self.dwell) and self.dwell >= 0):
            raise InputError(f"--dwell {self.dwell:g} must be a number of seconds of at least 0")
        if self.adaptive:
            if self._given(("plan", "placement", "rule", "fraction")):
                raise InputError("--adaptive decides on the placement itself: leave out --plan, --placement and --rule")
            self.schedules()
            if self.chosen("probes") < 2:
                raise InputError(f"--probes {self.probes} must be at least 2")
            self.spec()
        elif given := self._given(ADAPTIVE):
            raise InputError(f"{', '.join(given)}: for --adaptive only")
        if self.output is not None:
            check_new_directory(self.output)

    def _given(self, names: Iterable[str]) -> list[str]:
        """Those options of `names` that have a value, spelled as on the command line."""
        return [f"--{name.replace('_', '-')}" for name in names if getattr(self, name) not in (None, [])]

    def chosen(self, name: str) -> Any:
        """An option's value, or its default."""
        value = getattr(self, name)
        return (DRAWN | ADAPTIVE)[name] if value is None else value

    def spec(self) -> AnalogSpec:
        """The device that the policy's chips are made of."""
        spec = analog_spec(self.chosen("device"), noise_scale=self.chosen("noise_scale"), time_s=0.0, adc_bound=3.0)
        return check_drifting(spec)

    def schedules(self) -> tuple[Any, Any]:
        """(energy budget as a share of the way from all analog to all digital, factor of the noise)."""
        budget = parse_schedule("--budget", self.budget or ["0=0.25"], least=0, most=10)
        return budget, parse_schedule("--noise", self.noise or ["0=1"], least=1e-3, most=1e3)

    def requests(self, context: int) -> list[Request]:
        """Read or drawn."""
        if self.trace is not None:
            return read_trace(self.trace, context=context)
        return poisson_requests(
            self.seed, rate=self.chosen("rate"), duration_s=self.chosen("duration"), prompt=self.chosen("prompt"),
            output=self.chosen("generate"), context=context,
        )  # fmt: skip


def run(request: SimulateRequest) -> None:
    """Serves, printing as it goes."""
    request.check()
    hardware = [
        open_description(request.processor, "digital"), open_description(request.chip, "analog"),
        open_description(request.link, "link"),
    ]  # fmt: skip
    console = make_console()
    described = describe_model(request.model, request.dtype, load=request.how_routed == TEXT or request.adaptive)
    config, system = described.config, system_of(*hardware)
    requests = request.requests(config.max_position_embeddings)
    statistics = request.statistics(described)
    frequency = uniform_frequency(config) if statistics is None else statistics.frequency
    tables = step_tables(config, frequency, request.max_batch)

    def check(plan: Plan) -> Estimate:
        """One sequence's first token, on hardware that holds the model: else an error that names the line."""
        step = decode_step(config, frequency, 1, 1)
        found = estimate(config, model_demand(config, deployment_of(described, plan), step), system)
        check_fit(config, found, hardware[0], hardware[1])
        return found

    def costs_of(plan: Plan) -> StepCosts:
        where = deployment_of(described, plan)
        return StepCosts(config, where, tables, system, request.schedule, stored=stored)  # pyright: ignore[reportArgumentType]

    stored: float | None = None

    controller: Controller
    looks, facts = list[Look](), dict[str, Any]()
    length = request.chosen("duration") if request.trace is None else max(requests[-1].arrival_s, 1e-3)
    if request.adaptive:
        name = "by the runtime policy"
        # Both copies of every expert are resident, whatever the plan.
        check(all_digital(config))
        stored = float(stored_bytes(config, deployment_of(described, all_digital(config))))
        chips = check(experts_analog(config)).chips
        system = dataclasses.replace(system, analog=dataclasses.replace(system.analog, chips=chips))
        controller = _adaptive(request, described, hardware, frequency, requests, length, costs_of)
        looks, facts = controller.looks, {"analog": describe(request.spec())}
    else:
        name, plan = plan_of(described, request, uniform=request.how_routed == UNIFORM)
        check(plan)
        controller = fixed(costs_of(plan), float(1 - np.mean(np.asarray(plan.experts))))
    span = request.span or length / SPANS
    console.print(f"[bold]{described.name}[/bold], {name}, {request.schedule}", highlight=False)
    print_descriptions(console, dict(zip(("digital unit", "chips", "link"), hardware, strict=True)))
    print_offered(console, requests)
    served = serve(
        requests, controller, max_batch=request.max_batch, span_s=span, window=config.sliding_window,
        each=lambda one: print_span(console, one),
    )  # fmt: skip
    summary = summarise(served)
    print_summary(console, summary, looks)
    if request.output is not None:
        options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(request).items()}
        write_run(options, request.output, described.name, name, hardware, served, summary, looks, facts)
        console.print(f"figure, timeline and requests: {request.output}")


def _adaptive(
    request: SimulateRequest, described: DescribedModel, hardware: Sequence[Description], frequency: np.ndarray,
    requests: Sequence[Request], length: float, costs_of: Callable[[Plan], StepCosts],
) -> Adaptive:  # fmt: skip
    model, spec = described.model, request.spec()
    assert model is not None
    refuse_quantized(model.params, "the runtime policy decides on")
    budget, noise = request.schedules()
    sample, _ = unevaluated_text(
        model, choose_text(request.text), tokens=min(KNOWN_TOKENS, request.tokens), seq=request.seq
    )
    key, chip = jax.random.split(jax.random.key(request.seed))
    every = request.observe or length / SPANS
    costs = Costs(
        batch=request.max_batch, weight_bytes=described.weight_bytes, probes=request.chosen("probes"),
        dwell_s=2 * every if request.dwell is None else request.dwell,
    )  # fmt: skip
    knowledge = make_knowledge(
        model, sample.tokens, spec, frequency, digital=hardware[0], analog=hardware[1], link=hardware[2], costs=costs,
        key=key,
    )  # fmt: skip
    base, extra = energy_ends(knowledge)
    watch = Watch(
        chip, model.params, spec, knowledge, probes=request.chosen("probes"), budget=base + budget.at(0.0) * extra
    )  # fmt: skip
    return Adaptive(
        watch, knowledge, budget, noise, every_s=every, tokens_per_s=total_tokens(requests)[1] / length,
        costs_of=lambda analog: costs_of(Plan(experts=jnp.asarray(analog))),
    )  # fmt: skip
