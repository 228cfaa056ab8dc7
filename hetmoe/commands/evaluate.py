"""`hetmoe eval`: the main job, from a request to tables, a figure and a record."""

import contextlib
import dataclasses
import hashlib
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
from hetmoe.commands.common import choose_text
from hetmoe.commands.described_model import describe_model
from hetmoe.commands.evaluate_report import Results, print_results, write_results
from hetmoe.commands.mesh_options import MeshOptions, console_of_main, mesh_record
from hetmoe.commands.progress import show_progress
from hetmoe.errors import InputError
from hetmoe.evaluate.execution import check_execution
from hetmoe.evaluate.noise_sweep import (
    Placement,
    Point,
    digital_result,
    evaluations,
    noise_sweep,
)  # fmt: skip
from hetmoe.evaluate.prepare import EvalText, noise_keys, prepare_text
from hetmoe.evaluate.progress import Progress, open_in_memory, open_progress
from hetmoe.evaluate.rules import Scorer, scoring_scale
from hetmoe.files import check_writable
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.parallel import hosts
from hetmoe.parallel.memory import Workload
from hetmoe.parallel.mesh import describe_mesh, shard_of, window_parts
from hetmoe.placement.parameters import digital_parameters
from hetmoe.placement.plan import all_analog, digital_count, experts_analog
from hetmoe.placement.plan_file import load_plan
from hetmoe.placement.scores import DEVICE_RULES, RANDOM, RULES
from hetmoe.quantize.layout import layout_of
from hetmoe.sweep.code_digest import code_record

PART_TOKENS = 2**16  # of text, after which progress is kept


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
    progress: Path | None
    devices: MeshOptions

    def arguments(self) -> dict[str, Any]:
        """All options but those that say where it runs, as plain values."""
        options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}
        del options["devices"]
        return options | {"plans": [str(path) for path in self.plans]}

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
        for path in (self.json_file, self.plot, self.progress):
            if path is not None:
                check_writable(path)


def run(request: EvalRequest) -> None:
    """Evaluates and reports."""
    request.devices.check()
    with hosts.failures_of_others():
        request.devices.start(request.arguments())
        _run(request)


def _run(request: EvalRequest) -> None:
    started = time.perf_counter()
    request.check()
    console = console_of_main()
    model = load_model(request.model, request.dtype, mesh=_mesh(request, console))
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    saved = [Placement(name=f"plan {path.stem}", plans=[load_plan(path, model)]) for path in request.plans]
    files = choose_text(request.text)
    text = prepare_text(
        model, files, tokens=request.tokens, seq=request.seq, batch=request.batch, seed=request.seed,
        calibrate=request.input_range != "dynamic", parts=window_parts(model.mesh),
    )  # fmt: skip
    size, devices = text.size, 1 if model.mesh is None else model.mesh.size
    console.print(
        f"[bold]{model.name}[/bold]: {size.tokens:,} held-out tokens, {size.bytes:,} bytes, {size.questions:,} "
        f"next-word questions; device {request.device}, {request.seeds} noise seeds, "
        f"{f'{devices} x ' if devices > 1 else ''}{jax.devices()[0].device_kind}"
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
    with _progress(request, model, text, placements, calibration, keys) as store:
        if store.finished:
            console.print(f"{store.finished} parts of the text are finished: {request.progress}")
        digital, load = digital_result(model, text.batches, size, request.implementation, store)
        points = _sweep(request, model, calibration, placements, keys, text, console, store) if placements else []
    results = Results(
        model=model, size=size, files=files, digital=digital, points=points, load=load,
        pairs=_pairs(request, saved, placements), seeds=request.seeds, seconds=time.perf_counter() - started,
    )  # fmt: skip
    print_results(results, console)
    if hosts.is_main():
        title = f"{model.name}: {request.device} programming noise, {size.tokens:,} tokens, {request.seeds} seeds"
        write_results(results, title, request.plot, request.json_file, _settings(request, model), console)


def _progress(
    request: EvalRequest, model: Model, text: EvalText, placements: list[Placement], calibration: Calibration | None,
    keys: jax.Array,
) -> contextlib.AbstractContextManager[Progress]:  # fmt: skip
    """Where sums of finished parts of the text are kept. Processes that read other files than process 0 are refused."""
    if request.progress is None and hosts.count() == 1:
        return contextlib.nullcontext(open_in_memory())
    digest = hashlib.sha256()
    for placement in placements:
        digest.update(placement.name.encode())
    plans = [placement.plans for placement in placements]
    for values in jax.tree.leaves((plans, calibration, jax.random.key_data(keys), text.batches)):
        digest.update(f"{values.shape} {values.dtype} ".encode())  # the same text in other batches is other parts
        digest.update(np.ascontiguousarray(values).tobytes())
    quiet = ("json_file", "plot", "progress", "jobs")  # change no number
    options = {name: value for name, value in request.arguments().items() if name not in quiet}
    identity = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    identity |= {"--mesh": "none" if model.mesh is None else describe_mesh(shard_of(model.mesh))}
    identity |= {
        "model": model.name, "fingerprint": model_fingerprint(model), "text": dataclasses.asdict(text.size),
        "placements, ranges, seeds and text": digest.hexdigest(),
        "analog": describe(request.spec(request.noise_scales[0])), "noise scales": request.noise_scales,
        "dtype": request.dtype, "weights": request.weights, "implementation": request.implementation,
        "mesh": mesh_record(model.mesh), "device": jax.devices()[0].device_kind, "code": code_record(),
    }  # fmt: skip
    hosts.check_same(identity, "what is evaluated")
    if request.progress is None:
        return contextlib.nullcontext(open_in_memory())
    chunk = max(1, PART_TOKENS // (request.batch * request.seq))
    return open_progress(request.progress, identity, chunk, is_main=hosts.is_main(), share=hosts.from_main)


def _mesh(request: EvalRequest, console: Console) -> jax.sharding.Mesh | None:
    """The mesh to load the model onto, or None."""
    described = describe_model(request.model, request.dtype, load=False)
    one = None
    if described.layout is not None:
        one = f"{request.model}: a model with quantized experts"
    elif request.rule in DEVICE_RULES:
        one = f"rule {request.rule}"
    elif request.weights == "kernel":
        one = "--weights kernel"
    elif request.jobs not in (None, 1):
        one = f"--jobs {request.jobs}"
    run = Workload(
        batch=request.batch, seq=request.seq, seeds=request.seeds, dtype=parse_dtype(request.dtype),
        weights=request.weights, dense=True,
        calibrated=request.input_range != "dynamic" and request.calibration_file is None,
    )  # fmt: skip
    return request.devices.choose(described.config, run, console, one=one)


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
    text: EvalText, console: Console, store: Progress,
) -> list[Point]:  # fmt: skip
    spec = request.spec(request.noise_scales[0])
    total = evaluations(placements, request.noise_scales, spec, request.seeds, request.weights, model.mesh)
    jobs = request.jobs or (2 if jax.default_backend() == "cpu" else 1)
    with show_progress(console, "noise seeds x placements", "evaluations", total) as advance:
        return noise_sweep(
            model, spec, calibration, placements, request.noise_scales, keys, text.batches, text.size,
            jobs=jobs if model.mesh is None else 1, progress=advance, weights=request.weights,
            implementation=request.implementation, store=store,
        )  # fmt: skip


def _settings(request: EvalRequest, model: Model) -> dict[str, Any]:
    """What the record of results says of how they were made."""
    keys = noise_keys(request.seed, request.seeds)
    return {
        "options": request.arguments(),
        "analog": {**describe(request.spec(request.noise_scales[0])), "noise_scale": request.noise_scales},
        "seed_keys": np.asarray(jax.random.key_data(keys)).tolist(),
        "mesh": mesh_record(model.mesh),
    }
