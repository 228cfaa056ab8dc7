"""Options of `hetmoe pareto`, and the measured quality of every deployment that they make."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from hetmoe.analog.calibration import RangeMethod
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.commands.common import choose_text
from hetmoe.commands.progress import show_progress
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.noise_sweep import Point as Evaluated
from hetmoe.evaluate.noise_sweep import make_point
from hetmoe.evaluate.prepare import EvalText, noise_keys, prepare_text
from hetmoe.evaluate.rules import SCORE_STREAM, Scorer
from hetmoe.evaluate.run import Totals, evaluate_digital
from hetmoe.files import check_new_directory, check_writable
from hetmoe.hardware.deployment import bytes_of_bits, deployment
from hetmoe.hardware.description import Description
from hetmoe.hardware.parts import SCHEDULES
from hetmoe.hardware.routing_file import observe_routing
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, digital_count, place
from hetmoe.placement.scores import RANDOM, RULES
from hetmoe.quantize.driver import check_groups
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.quantize.recipe import Recipe
from hetmoe.sweep.database import FILE
from hetmoe.sweep.parts import found_parts
from hetmoe.technologies.assign import assign
from hetmoe.technologies.candidates import EXPERTS_ANALOG, Candidate, Digital, evaluate_candidates, uniform_candidate
from hetmoe.technologies.choices import Choices, check_levels, expected_losses, make_choices
from hetmoe.technologies.tried import Tried

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
        directory = Path(self.source)
        return (directory / FILE).is_file() or bool(found_parts(directory))

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
        for part in (self.levels, self.spec, self.recipe):
            part()
        check_new_directory(self.output)
        check_writable(self.output / "pareto.json")
        return self.output


def measure(
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
    found = [uniform_candidate(EXPERTS_ANALOG, None, np.ones(shape, bool), None)]
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
    """For each candidate with digital experts the assignment of as many bytes and tiles at the most."""
    levels, recipe = request.levels(), request.recipe()
    key = jax.random.fold_in(jax.random.key(request.seed), SCORE_STREAM)
    losses = expected_losses(model, sample, request.spec(), recipe, levels, key=key)
    choices = make_choices(
        model.config, losses, levels, recipe, frequency, batch=max(request.batches), digital=hardware[0],
        analog=hardware[1], weight_bytes=WEIGHT_BYTES,
    )  # fmt: skip
    found: list[Candidate] = []
    for budgets in dict.fromkeys(_budgets(candidate, model.config, recipe, choices) for candidate in candidates):
        stored, tiles, like = budgets
        if stored == 0:
            continue
        best = assign(choices, max_bytes=stored, max_tiles=tiles)
        one = Candidate(rule=JOINT, fraction=None, bits=f"bytes of {like}", analog=best.analog, expert_bits=best.bits)
        if not any(one.equals(other) for other in [*candidates, *found]):
            found.append(one)
    return found


def _budgets(candidate: Candidate, config: ModelConfig, recipe: Recipe, choices: Choices) -> tuple[float, float, str]:
    """(bytes of digital experts, tiles, bits in words)."""
    stored = bytes_of_bits(config, candidate.expert_bits, recipe, WEIGHT_BYTES)[~candidate.analog].sum()
    return float(stored), float(candidate.analog.sum() * choices.tiles[0, 0, 0]), candidate.bits


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
