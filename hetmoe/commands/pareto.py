"""`hetmoe pareto`: which deployments no other beats in quality, energy and throughput."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.analog.calibration import RangeMethod
from hetmoe.analog.spec import AnalogSpec, analog_spec, describe
from hetmoe.checkpoint.load import load_model
from hetmoe.commands.common import choose_text, make_console, write_json
from hetmoe.commands.hardware_tables import amount, description_record, print_descriptions
from hetmoe.commands.progress import show_progress
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.noise_sweep import Point as Evaluated
from hetmoe.evaluate.noise_sweep import make_point
from hetmoe.evaluate.prepare import EvalText, noise_keys, prepare_text
from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.rules import SCORE_STREAM, Scorer
from hetmoe.evaluate.run import Totals, evaluate_digital
from hetmoe.files import check_new_directory, check_writable, make_directory, write_bytes, write_text
from hetmoe.hardware.deployment import bytes_of_bits, deployment
from hetmoe.hardware.description import Description, open_description
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.parts import PART_NAMES, SCHEDULES
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.routing_file import observe_routing
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, digital_count, place
from hetmoe.placement.scores import RANDOM, RULES
from hetmoe.quantize.driver import check_groups
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.quantize.recipe import Recipe
from hetmoe.report.render import to_files, with_settings
from hetmoe.sweep.database import FILE
from hetmoe.sweep.store import read_sweep
from hetmoe.technologies.assign import assign
from hetmoe.technologies.candidates import Candidate, Digital, evaluate_candidates, uniform_candidate
from hetmoe.technologies.choices import check_levels, expected_losses, make_choices
from hetmoe.technologies.from_store import config_of, tried_in
from hetmoe.technologies.front_figure import draw_front
from hetmoe.technologies.tried import Point, Tried, front_of, points_of

JOINT = "both technologies"  # rule of assignments
DIGITAL = "all digital"
WEIGHT_BYTES = 2.0  # of weights that are not quantized, whatever the dtype that quality is measured in


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParetoRequest:
    """The options of `hetmoe pareto`, named as there."""

    source: str
    output: Path | None
    rules: list[str]
    fractions: list[float]
    bits: list[int]
    joint: bool
    batches: list[int]
    context: int | None
    schedule: str
    processor: str
    chip: str
    link: str
    device: str
    noise_scale: float
    time_s: float | None
    drift_compensation: bool
    quantizer: str
    group: int
    text: Path | None
    tokens: int
    seq: int
    seeds: int
    seed: int

    @property
    def is_store(self) -> bool:
        """Whether the source is a sweep's directory."""
        return (Path(self.source) / FILE).is_file()

    def levels(self) -> tuple[int, ...]:
        """Bits of quantized experts, ascending; 16 stands for none and is no level."""
        levels = sorted(set(self.bits) - {16})
        return check_levels(levels) if levels else ()

    def spec(self) -> AnalogSpec:
        """The analog hardware that quality is measured on."""
        return analog_spec(
            self.device, noise_scale=self.noise_scale, time_s=self.time_s, drift_compensation=self.drift_compensation,
            adc_bound=3.0,
        )  # fmt: skip

    def recipe(self) -> Recipe:
        """Quantiser and grids."""
        return Recipe(method=self.quantizer, group=self.group)  # pyright: ignore[reportArgumentType]

    def check(self) -> Path:
        """The output. Raises InputError for values that are wrong whatever the model."""
        if self.output is None:
            raise InputError("name a directory for tables and figures: -o DIR")
        if self.schedule not in SCHEDULES:
            raise InputError(f"--schedule {self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        for rule in self.rules:
            if rule not in RULES:
                raise InputError(f"unknown rule {rule!r}: use some of {', '.join(RULES)}")
        for fraction in self.fractions:
            digital_count(fraction, 1)
        for name, values in (("batch", self.batches), ("bits", self.bits), ("rule", self.rules)):
            if not values or len(set(values)) != len(values):
                raise InputError(f"--{name} {' '.join(map(str, values)) or 'none'} must name different values")
        for name, value, least in (
            ("batch", min(self.batches), 1), ("seeds", self.seeds, 2), ("seed", self.seed, 0), ("seq", self.seq, 1),
            ("tokens", self.tokens, self.seq),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"--{name} {value} must be at least {least}")
        if self.quantizer == "gptq":
            raise InputError("--quantizer gptq: a search compares many precisions; use hqq or rtn")
        self.levels(), self.spec(), self.recipe()
        check_new_directory(self.output)
        check_writable(self.output / "pareto.json")
        return self.output


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
        tried, frequency = _measure(request, model, hardware, console)
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


def _measure(
    request: ParetoRequest, model: Model, hardware: Sequence[Description], console: Console
) -> tuple[list[Tried], np.ndarray]:
    """Quality of every combination of rule, fraction and bits, and of assignments with as many bytes and tiles."""
    refuse_quantized(model.params, "a search starts from")
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    levels, recipe, spec = request.levels(), request.recipe(), request.spec()
    if levels:
        check_groups(model.config, recipe, levels)
    text = prepare_text(
        model, choose_text(request.text), tokens=request.tokens, seq=request.seq, batch=16, seed=request.seed,
        calibrate=True,
    )  # fmt: skip
    sample = text.sample.tokens
    ranges = calibrate(model.params, jnp.asarray(sample[:, :-1]), model.config, RangeMethod())
    frequency = observe_routing(model, sample[:, :-1]).frequency
    candidates = _candidates(request, model, Scorer(
        model=model, sample=text.sample, down_axis="hidden", seed=request.seed, calibration=ranges,
    ), spec)  # fmt: skip
    if request.joint and levels:
        candidates += _assignments(request, model, sample, frequency, candidates, hardware)
    digital = Digital(model, recipe, levels)
    with show_progress(console, "deployments x seeds", "evaluations", len(candidates) * request.seeds) as advance:
        nll, correct = evaluate_candidates(
            model, digital, candidates, spec, ranges, noise_keys(request.seed, request.seeds), text.batches, advance
        )
    tried = [
        _tried(candidate, one, credit, text, model.config, recipe, request)
        for candidate, one, credit in zip(candidates, nll, correct, strict=True)
    ]
    everything = evaluate_digital(model.params, text.batches, model.config)
    nothing = np.zeros(frequency.shape, bool)
    plain = uniform_candidate(DIGITAL, None, nothing, None)
    tried.append(
        _tried(plain, np.array([everything.nll]), np.array([everything.correct]), text, model.config, recipe, request)
    )
    return tried, frequency


def _candidates(request: ParetoRequest, model: Model, scorer: Scorer, spec: AnalogSpec) -> list[Candidate]:
    shape = (len(model.config.moe_layers), model.config.num_experts)
    precisions = [None if bits == 16 else bits for bits in request.bits]
    found = [uniform_candidate("experts analog", None, np.ones(shape, bool), None)]
    found += [uniform_candidate(DIGITAL, None, np.zeros(shape, bool), bits) for bits in precisions if bits is not None]
    for rule in request.rules:
        if rule == RANDOM:
            scores = np.asarray(jax.random.uniform(jax.random.fold_in(jax.random.key(request.seed), 1), shape))
        else:
            scores = scorer.scores(rule, spec)
        for fraction in request.fractions:
            analog = np.asarray(place(scores, fraction).experts)
            found += [uniform_candidate(rule, fraction, analog, bits) for bits in precisions]
    return found


def _assignments(
    request: ParetoRequest, model: Model, sample: np.ndarray, frequency: np.ndarray, candidates: Sequence[Candidate],
    hardware: Sequence[Description],
) -> list[Candidate]:  # fmt: skip
    """For each combination of a fraction and bits the assignment of as many bytes and tiles at the most."""
    levels, recipe = request.levels(), request.recipe()
    key = jax.random.fold_in(jax.random.key(request.seed), SCORE_STREAM)
    losses = expected_losses(model, sample, request.spec(), recipe, levels, key=key)
    choices = make_choices(
        model.config, losses, levels, recipe, frequency, batch=max(request.batches), digital=hardware[0],
        analog=hardware[1], weight_bytes=WEIGHT_BYTES,
    )  # fmt: skip
    found: dict[tuple[float, float], Candidate] = {}
    for candidate in candidates:
        if candidate.fraction is None:
            continue
        stored = bytes_of_bits(model.config, candidate.expert_bits, recipe, WEIGHT_BYTES)[~candidate.analog].sum()
        tiles = float(candidate.analog.sum() * choices.tiles[0, 0, 0])
        if (stored, tiles) in found:
            continue
        best = assign(choices, max_bytes=float(stored), max_tiles=tiles)
        found[stored, tiles] = Candidate(
            rule=JOINT, fraction=candidate.fraction, bits=f"as many bytes as {candidate.bits}", analog=best.analog,
            expert_bits=best.bits,
        )  # fmt: skip
    return list(found.values())


def _tried(
    candidate: Candidate, nll: np.ndarray, correct: np.ndarray, text: EvalText, config: ModelConfig, recipe: Recipe,
    request: ParetoRequest,
) -> Tried:  # fmt: skip
    quiet = not candidate.analog.any()
    rows = slice(0, 1) if quiet else slice(None)
    result: Evaluated = make_point(
        candidate.name,
        request.noise_scale,
        Totals(nll=nll[rows], correct=correct[rows]),
        text.size,
        deterministic=quiet,
    )
    sizes = bytes_of_bits(config, candidate.expert_bits, recipe, WEIGHT_BYTES)
    return Tried(
        name=candidate.name, rule=candidate.rule, bits=candidate.bits, perplexity=np.array(result.perplexity),
        accuracy=None if result.accuracy is None else np.array(result.accuracy),
        where=deployment(Plan(experts=jnp.asarray(candidate.analog)), config, expert_bytes=sizes),
    )  # fmt: skip


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
