"""`hetmoe place`: scores, and a plan."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from hetmoe.analog.spec import AnalogSpec, analog_spec, describe
from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model, model_directory, model_name, open_checkpoint
from hetmoe.commands.common import choose_text, make_console
from hetmoe.commands.place_report import print_comparison, print_dense, print_experts
from hetmoe.commands.progress import show_progress
from hetmoe.errors import InputError
from hetmoe.evaluate.calibration_file import load_calibration, stored_adc_bound
from hetmoe.evaluate.prepare import unevaluated_text
from hetmoe.evaluate.rules import SCORE_STREAM
from hetmoe.evaluate.text import Windows
from hetmoe.files import check_writable
from hetmoe.hardware.description import open_description
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.budget import digital_cost, place_within
from hetmoe.placement.energy_costs import energy_costs
from hetmoe.placement.module_scores import ModuleScores, module_parameters
from hetmoe.placement.plan import Plan, digital_count, place
from hetmoe.placement.plan_file import write_plan
from hetmoe.placement.scores import DEVICE_RULES, RANDOM, RULES, check_down_axis, score_experts, score_modules
from hetmoe.placement.streaming import STREAMED, stream_scores
from hetmoe.quantize.layout import layout_of

QUANTIZED = "has quantized experts: place the model that it was made from, then give that plan to hetmoe quantize"
BUDGETS = {"per_layer": "of each layer's experts", "parameters": "of parameters", "energy": "of the extra energy"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlaceRequest:
    """The options of `hetmoe place`, named as there."""

    model: str
    rule: str
    fraction: float
    budget: str
    dense: bool
    compare: bool
    output: Path | None
    text: Path | None
    tokens: int
    seq: int
    seed: int
    seeds: int
    down_axis: str
    device: str
    noise_scale: float
    time_s: float | None
    drift_compensation: bool
    calibration: Path | None
    energy_batch: int
    energy_bytes: float
    processor: str
    chip: str
    dtype: str | None

    def check(self) -> AnalogSpec:
        """The hardware of device-dependent rules. Raises InputError for values that are wrong whatever the model."""
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}: use one of {', '.join(RULES)}")
        if self.budget not in BUDGETS:
            raise InputError(f"--budget {self.budget!r} is unknown: use one of {', '.join(BUDGETS)}")
        digital_count(self.fraction, 1)
        if self.seq < 1 or self.tokens < self.seq or self.seed < 0:
            raise InputError(
                f"need --seq >= 1, --tokens >= --seq and --seed >= 0, got {self.seq}, {self.tokens}, {self.seed}"
            )
        if self.seeds < 1 or self.energy_batch < 1:
            raise InputError(f"--seeds {self.seeds} and --energy-batch {self.energy_batch} must be at least 1")
        if not 0 < self.energy_bytes < float("inf"):
            raise InputError(f"--energy-bytes {self.energy_bytes!r} must be positive and finite")
        if self.calibration is not None and self.rule != "measured":
            raise InputError(f"--calibration is for --rule measured; rule {self.rule!r} does not run the converters")
        if self.dense and (self.budget == "per_layer" or self.rule not in DEVICE_RULES):
            raise InputError(
                f"--dense compares modules in nats under one budget: it needs --rule {' or '.join(DEVICE_RULES)} and "
                "--budget parameters or energy"
            )
        check_down_axis(self.down_axis)
        if self.budget == "energy":
            open_description(self.processor, "digital")
            open_description(self.chip, "analog")
        if self.output is not None:
            check_writable(self.output)
        return analog_spec(
            self.device, noise_scale=self.noise_scale, time_s=self.time_s, drift_compensation=self.drift_compensation,
            adc_bound=12.0 if self.calibration is None else stored_adc_bound(self.calibration),
        )  # fmt: skip

    @property
    def reads_text(self) -> bool:
        """Whether anything asked for depends on text."""
        by_rule = self.rule.startswith("activation") or self.rule in DEVICE_RULES
        return by_rule or self.budget == "energy" or self.compare

    @property
    def key(self) -> jax.Array:
        """Of the rule's own draws; chips that a rule is measured on are not those that `hetmoe eval` programs."""
        key = jax.random.key(self.seed)
        return key if self.rule == RANDOM else jax.random.fold_in(key, SCORE_STREAM)


def run(request: PlaceRequest) -> None:
    """Scores the modules, prints them layer by layer, and writes the plan if asked."""
    spec = request.check()
    directory, console = model_directory(request.model), make_console()
    streamed = request.rule in STREAMED and request.budget != "energy" and not request.compare
    if streamed and not orbax_directory.is_one(directory):
        checkpoint = open_checkpoint(request.model)
        if checkpoint.storage.layout is not None:
            raise InputError(f"{checkpoint.name}: {QUANTIZED}")
        config, axis = checkpoint.config, check_down_axis(request.down_axis)
        experts, identity = stream_scores(
            checkpoint, request.rule, key=request.key, down_axis=axis, dtype=request.dtype
        )
        scores, costs = ModuleScores(experts=experts), module_parameters(config)  # pyright: ignore[reportArgumentType]
    else:
        # Loss differences of single experts are below what 16 bits resolve.
        dtype = "float32" if request.dtype is None and request.rule in DEVICE_RULES else request.dtype
        model = load_model(request.model, dtype)
        if layout_of(model.params.layers.moe.experts) is not None:
            raise InputError(f"{model.name}: {QUANTIZED}")
        config, identity = model.config, model_fingerprint(model)
        sample = _sample(request, model)
        scores = _scores(request, model, sample, spec, console)
        costs = _costs(request, model, sample)
        if request.compare and sample is not None:
            title = f"Spearman correlation with {request.rule} ({request.device}, c = {request.noise_scale:g})"
            if request.rule != "measured":
                title += "; for 'measured', which takes long, give --rule measured"
            print_comparison(console, title, scores, _others(request, model, sample, spec), config)
    if request.budget != "per_layer" and request.rule not in DEVICE_RULES:
        console.print(
            f"note: scores of {request.rule} of different layers are not in one unit; a global budget adds them up"
        )
    plan = _plan(request, scores, costs, config)
    name = model_name(request.model, directory)
    title = f"{name}: {request.rule}, {request.fraction:.1%} {BUDGETS[request.budget]} digital"
    print_experts(console, title, np.asarray(scores.experts), plan, config)
    if np.asarray(plan.experts).all():
        console.print("note: no expert stays digital: the fraction is too small for a single one")
    if request.dense:
        print_dense(console, scores, plan)
    if request.output is not None:
        write_plan(
            request.output, plan, name=name, fingerprint=identity, made_by=_made_by(request, spec, scores, plan, costs)
        )
        console.print(f"plan: {request.output}")


def _sample(request: PlaceRequest, model: Model) -> Windows | None:
    """Text for the rules that need some."""
    if not request.reads_text:
        return None
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    return unevaluated_text(model, choose_text(request.text), tokens=request.tokens, seq=request.seq)[0]


def _scores(
    request: PlaceRequest, model: Model, sample: Windows | None, spec: AnalogSpec, console: Console
) -> ModuleScores:
    if request.rule not in DEVICE_RULES or sample is None:
        return ModuleScores(experts=_expert_scores(request, model, request.rule, sample))  # pyright: ignore[reportArgumentType]
    calibration = (
        None if request.calibration is None else load_calibration(request.calibration, model, "tile").calibration
    )
    experts = len(model.config.moe_layers) * model.config.num_experts
    batches = -(-len(sample) // 16)
    jobs = 2 if jax.default_backend() == "cpu" else 1
    with show_progress(console, request.rule, "measurements", experts * request.seeds * batches) as advance:
        seen = 0

        def progress(done: int, total: int) -> None:
            del total  # known
            nonlocal seen
            advance(done - seen)
            seen = done

        return score_modules(
            model, request.rule, key=request.key, tokens=jnp.asarray(sample.tokens), spec=spec,
            calibration=calibration, seeds=request.seeds, dense=request.dense, jobs=jobs, progress=progress,
        )  # fmt: skip


def _expert_scores(request: PlaceRequest, model: Model, rule: str, sample: Windows | None) -> np.ndarray:
    tokens = None if sample is None else jnp.asarray(sample.tokens[:, :-1])
    axis = check_down_axis(request.down_axis)
    return np.asarray(score_experts(model, rule, key=request.key, tokens=tokens, down_axis=axis))


def _others(request: PlaceRequest, model: Model, sample: Windows, spec: AnalogSpec) -> dict[str, np.ndarray]:
    """Scores by every other rule; `measured` is left out unless it is the one asked for, since it takes long."""
    found: dict[str, np.ndarray] = {}
    for rule in RULES:
        if rule == "noise_sensitivity" and rule != request.rule:
            tokens = jnp.asarray(sample.tokens)
            found[rule] = np.asarray(score_experts(model, rule, key=request.key, tokens=tokens, spec=spec))
        elif rule not in (request.rule, *DEVICE_RULES):
            found[rule] = _expert_scores(request, model, rule, sample)
    return found


def _costs(request: PlaceRequest, model: Model, sample: Windows | None) -> ModuleScores:
    if request.budget != "energy":
        return module_parameters(model.config)
    share = _expert_scores(request, model, "activation_frequency", sample)
    return energy_costs(
        model.config, share, digital=open_description(request.processor, "digital"),
        analog=open_description(request.chip, "analog"), batch=request.energy_batch,
        bytes_per_weight=request.energy_bytes,
    )  # fmt: skip


def _plan(request: PlaceRequest, scores: ModuleScores, costs: ModuleScores, config: ModelConfig) -> Plan:
    if request.budget == "per_layer":
        return place(np.asarray(scores.experts), request.fraction)
    competing = [f.name for f in dataclasses.fields(scores) if getattr(scores, f.name) is not None]
    every = sum(float(np.sum(getattr(costs, name))) for name in competing)
    return place_within(scores, costs, request.fraction * every, config)


def _made_by(
    request: PlaceRequest, spec: AnalogSpec, scores: ModuleScores, plan: Plan, costs: ModuleScores
) -> dict[str, Any]:
    named = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
    plain = {name: np.asarray(value, np.float64).tolist() for name, value in named.items() if value is not None}
    experts, read_text = plain.pop("experts"), request.reads_text
    return {
        "rule": request.rule,
        "digital_fraction": request.fraction,
        "budget": request.budget,
        "digital_cost": digital_cost(plan, costs),
        "down_axis": request.down_axis if request.rule == "max_neuron_norm" else None,
        "seed": request.seed if request.rule in (RANDOM, *DEVICE_RULES) else None,
        "analog": describe(spec) if request.rule in DEVICE_RULES else None,
        "seeds": request.seeds if request.rule == "measured" else None,
        "calibration": None if request.calibration is None else request.calibration.name,
        "text": None if request.text is None else request.text.name,
        "tokens": request.tokens if read_text else None,
        "seq": request.seq if read_text else None,
        "energy": _energy(request) if request.budget == "energy" else None,
        "scores": experts,
        "dense_scores": plain,
    }


def _energy(request: PlaceRequest) -> dict[str, Any]:
    return {
        "batch": request.energy_batch, "bytes": request.energy_bytes, "processor": request.processor,
        "chip": request.chip,
    }  # fmt: skip
