"""`hetmoe eval`: the main job, from a request to tables, a figure and a record."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.spec import describe
from hetmoe.checkpoint.load import load_model, parse_dtype
from hetmoe.commands.analog_options import AnalogOptions
from hetmoe.commands.common import choose_text, make_console, write_json
from hetmoe.commands.progress import show_progress
from hetmoe.commands.tables import Difference, difference_tables, differences, metric_tables
from hetmoe.errors import InputError
from hetmoe.evaluate.execution import check_execution
from hetmoe.evaluate.noise_sweep import (
    Placement,
    Point,
    TextSize,
    digital_point,
    evaluations,
    noise_sweep,
)  # fmt: skip
from hetmoe.evaluate.plot import plot_sweep
from hetmoe.evaluate.prepare import noise_keys, prepare_text
from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.rules import Scorer, scoring_scale
from hetmoe.files import check_writable, write_bytes
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.parameters import digital_parameters
from hetmoe.placement.plan import all_analog, digital_count, experts_analog
from hetmoe.placement.plan_file import load_plan
from hetmoe.placement.scores import RANDOM, RULES
from hetmoe.quantize.layout import layout_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalRequest(AnalogOptions):
    """The options of `hetmoe eval`, named as there."""

    model: str
    rule: str
    fractions: list[float]
    plans: list[Path]
    noise_scales: list[float]
    weights: str
    implementation: str
    seeds: int
    seed: int
    text: Path | None
    tokens: int | None
    seq: int
    batch: int
    jobs: int | None
    down_axis: str
    dtype: str
    json_file: Path | None
    plot: Path | None

    def check(self) -> None:
        """Raises InputError for values that need neither model nor text to be seen wrong."""
        for name in ("seeds", "seq", "batch", "jobs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)} must be at least 1")
        if self.seed < 0:
            raise InputError(f"--seed {self.seed} must be at least 0")
        if self.tokens is not None and self.tokens < self.seq:
            raise InputError(f"--tokens {self.tokens} is less than one window of --seq {self.seq}")
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}: use one of {', '.join(RULES)}")
        for fraction in self.fractions:
            digital_count(fraction, 1)
        if len(set(self.noise_scales)) != len(self.noise_scales) or len(set(self.fractions)) != len(self.fractions):
            raise InputError("--noise-scale and --digital may each name a value only once")
        if len({path.stem for path in self.plans}) != len(self.plans):
            raise InputError("--plan may name each plan only once; results are listed by file name")
        check_execution("--", self.weights, self.implementation, read_noise=self.read_noise != 0)
        self.check_hardware(self.noise_scales)
        parse_dtype(self.dtype)
        for path in (self.json_file, self.plot):
            if path is not None:
                check_writable(path)


def run(request: EvalRequest) -> None:
    """Evaluates and reports."""
    request.check()
    started = time.perf_counter()
    console = make_console()
    model = load_model(request.model, request.dtype)
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    saved = [Placement(name=f"plan {path.stem}", plans=[load_plan(path, model)]) for path in request.plans]
    files = choose_text(request.text)
    text = prepare_text(
        model, files, tokens=request.tokens, seq=request.seq, batch=request.batch, seed=request.seed,
        calibrate=request.input_range != "dynamic",
    )  # fmt: skip
    batches, size = text.batches, text.size
    console.print(
        f"[bold]{model.name}[/bold]: {size.tokens:,} held-out tokens, {size.bytes:,} bytes, {size.questions:,} "
        f"next-word questions; device {request.device}, {request.seeds} noise seeds, {jax.devices()[0].device_kind}"
    )
    calibration = None if text.aside is None else request.calibration(model, text.aside)
    keys = noise_keys(request.seed, request.seeds)
    scorer = Scorer(
        model=model, sample=text.sample, down_axis=request.down_axis, seed=request.seed, calibration=calibration
    )
    placements = make_placements(request, scorer, saved)
    for placement in saved:
        share, of = digital_parameters(placement.plans[0], model.config)
        console.print(f"{placement.name}: {share / of:.1%} of the parameters that could be on crossbars are digital")
    if not placements:
        console.print(
            "experts are quantized and stay digital, whatever --rule and --digital say; --plan puts others on crossbars"
        )
    digital = digital_point(model, batches, size, request.implementation)
    points = _sweep(request, model, calibration, placements, keys, batches, size, console) if placements else []
    seconds = time.perf_counter() - started

    for metric, title, factor in (
        ("perplexity", "Perplexity per token", 1.0),
        ("bits_per_byte", "Bits per byte", 1.0),
        ("accuracy", "Next-word accuracy, % of questions with 4 answers", 100.0),
    ):
        if getattr(digital, metric) is None:
            console.print("no next-word accuracy: the text has too few different words that are one token")
            continue
        for table in metric_tables(title, metric, factor, digital, points, console):
            console.print(table)
    paired = differences("perplexity", points, _pairs(request, saved, placements))
    for table in difference_tables("Perplexity, paired differences: mean [95 % interval]", paired, console):
        console.print(table)
    if points:
        console.print(f"mean ± standard error over {request.seeds} seeds; done in {seconds:.0f} s")
    if request.plot is not None and not points:
        console.print("no figure: nothing is analog")
    elif request.plot is not None:
        title = f"{model.name}: {request.device} programming noise, {size.tokens:,} tokens, {request.seeds} seeds"
        write_bytes(request.plot, plot_sweep(digital, points, title))
        console.print(f"figure: {request.plot}")
    if request.json_file is not None:
        write_json(request.json_file, _record(request, model, files, size, digital, points, paired, seconds))
        console.print(f"results: {request.json_file}")


def make_placements(request: EvalRequest, scorer: Scorer, saved: list[Placement]) -> list[Placement]:
    """All analog, experts analog, saved plans, the rule at every fraction, random at every fraction.

    Of a model with quantized experts only the saved plans, which know which experts those are.
    """
    config = scorer.model.config
    if layout_of(scorer.model.params.layers.moe.experts) is not None:
        return saved
    lines = [
        Placement(name="all analog", plans=[all_analog(config)]),
        Placement(name="experts analog", plans=[experts_analog(config)]),
        *saved,
    ]
    spec = request.spec(scoring_scale(request.noise_scales))
    for rule in dict.fromkeys((request.rule, RANDOM)):
        lines.extend(scorer.placements(rule, request.fractions, request.seeds, spec))
    return lines


def _pairs(request: EvalRequest, saved: list[Placement], placements: list[Placement]) -> list[tuple[str, str]]:
    """What is compared chip by chip.

    Every partial placement with all experts analog, saved plans with every line below them, the rule with random.
    """
    baseline = "experts analog"
    partial = [p.name for p in placements if p.name not in ("all analog", baseline)]
    pairs = [(name, baseline) for name in partial] if len(partial) < len(placements) else []
    pairs += [(plan.name, name) for n, plan in enumerate(saved) for name in partial[n + 1 :]]
    if request.rule != RANDOM:
        by_rule = [name for name in partial[len(saved) :] if name.startswith(f"{request.rule} ")]
        pairs += [(name, name.replace(request.rule, RANDOM, 1)) for name in by_rule]
    return pairs


def _sweep(
    request: EvalRequest, model: Model, calibration: Calibration | None, placements: list[Placement], keys: jax.Array,
    batches: Any, size: TextSize, console: Console,
) -> list[Point]:  # fmt: skip
    spec = request.spec(request.noise_scales[0])
    total = evaluations(placements, request.noise_scales, spec, request.seeds, request.weights)
    with show_progress(console, "noise seeds x placements", "evaluations", total) as advance:
        return noise_sweep(
            model, spec, calibration, placements, request.noise_scales, keys, batches, size,
            jobs=request.jobs or (2 if jax.default_backend() == "cpu" else 1),
            progress=advance, weights=request.weights, implementation=request.implementation,
        )  # fmt: skip


def _record(
    request: EvalRequest, model: Model, files: list[Path], size: TextSize, digital: Point, points: list[Point],
    paired: list[Difference], seconds: float,
) -> dict[str, Any]:  # fmt: skip
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(request).items()}
    options["plans"] = [str(path) for path in request.plans]
    keys, layout = noise_keys(request.seed, request.seeds), layout_of(model.params.layers.moe.experts)
    return {
        "format": "hetmoe-eval-1",
        "provenance": provenance(),
        "model": {
            "name": model.name,
            "fingerprint": model_fingerprint(model),
            "config": dataclasses.asdict(model.config),
            "quantization": None if layout is None else layout.to_json(),
        },
        "text": {"files": [f.name for f in files], **dataclasses.asdict(size)},
        "options": options,
        "analog": {**describe(request.spec(request.noise_scales[0])), "noise_scale": request.noise_scales},
        "seed_keys": np.asarray(jax.random.key_data(keys)).tolist(),
        "digital": dataclasses.asdict(digital),
        "points": [dataclasses.asdict(p) for p in points],
        "paired_differences": {"metric": "perplexity", "of": [dataclasses.asdict(d) for d in paired]},
        "seconds": round(seconds, 1),
    }
