"""`hetmoe convert --stablehlo`: the forward pass of a model as programs of `jax.export`."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax

from hetmoe.analog.programming import program, seeded_weights
from hetmoe.checkpoint.load import load_model, parse_dtype
from hetmoe.commands.analog_options import AnalogOptions
from hetmoe.commands.common import choose_text, make_console
from hetmoe.commands.one_placement import PlacementOptions
from hetmoe.errors import InputError
from hetmoe.evaluate.execution import check_choices
from hetmoe.evaluate.prepare import WINDOWS_TO_CALIBRATE, noise_keys
from hetmoe.evaluate.rules import scoring_scale
from hetmoe.evaluate.run import READ_STREAM
from hetmoe.evaluate.text import load_windows, split_windows
from hetmoe.export.about import about_export
from hetmoe.export.check import Comparison, compare_here
from hetmoe.export.directory import ARGUMENTS, RECORD, program_file, write_export
from hetmoe.export.program import PLATFORMS, check_size, export_forward
from hetmoe.files import check_new_directory, check_writable
from hetmoe.models.analog_arguments import check_quantized
from hetmoe.models.model import Model
from hetmoe.quantize.mixed import is_mixed

# Options that mean nothing without crossbars.
ANALOG_OPTIONS = (
    "device", "noise_scale", "time", "drift_compensation", "read_noise", "read_noise_kind", "seed", "text", "seq",
    "weights", "input_range", "range_k", "adc_bound", "bound_axis", "dac_bits", "adc_bits", "tile_rows", "calibration",
    "down_axis",
)  # fmt: skip
PLACEMENT_OPTIONS = ("plan", "rule", "digital", "placement")
PROGRAM_OPTIONS = ("platform", "batch", "length", "implementation")


def default_platforms(implementation: str) -> tuple[str, ...]:
    """Those that the implementation runs on."""
    return tuple(name for name in PLATFORMS if implementation != "pallas" or name != "cpu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportRequest(AnalogOptions, PlacementOptions):
    """The options of `hetmoe convert --stablehlo`, named as there; `given` are the names of those that were typed."""

    model: str
    output: Path
    noise_scale: float
    weights: str
    text: Path | None
    seq: int
    implementation: str
    platforms: list[str]
    batch: int | None
    length: int | None
    dtype: str | None
    given: frozenset[str]

    @property
    def analog(self) -> bool:
        """Whether anything may be on crossbars."""
        return any(name in self.given for name in PLACEMENT_OPTIONS)

    @property
    def reads_text(self) -> bool:
        """Whether input ranges are made from text, or a rule may look at it."""
        ranges = self.calibration_file is None and self.input_range != "dynamic"
        return ranges or (self.plan is None and self.placement is None)

    def check(self) -> None:
        """Raises InputError for values that need neither model nor text to be seen wrong."""
        if "to" in self.given:
            raise InputError("--to names a layout of weights, --stablehlo exports a program: give one of them")
        useless = [name for name in ANALOG_OPTIONS if name in self.given]
        if useless and not self.analog:
            raise InputError(
                f"--{useless[0].replace('_', '-')} is about crossbars, and nothing is on one: say what is with --plan, "
                "--placement, or --rule and --digital"
            )
        self.check_placement()
        for name, least in (("seed", 0), ("seq", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name} {getattr(self, name)} must be at least {least}")
        check_choices("--", self.weights, self.implementation, read_noise=self.read_noise != 0)
        check_size(self.implementation, self.platforms, self.batch, self.length)
        self.check_hardware([self.noise_scale])
        parse_dtype(self.dtype)
        check_new_directory(self.output)
        check_writable(self.output / RECORD)


def run(request: ExportRequest) -> None:
    """Loads, programs, exports, compares and writes."""
    request.check()
    console = make_console()
    model = load_model(request.model, request.dtype)
    if request.analog and request.reads_text and request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    placement, analog = _analog_side(request, model) if request.analog else (None, dict[str, Any]())
    started = time.perf_counter()
    exported = export_forward(
        model, implementation=request.implementation, platforms=request.platforms, batch=request.batch,
        length=request.length, **analog,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    parts = {name: analog.get(name) for name in ("plan", "spec", "programmed", "calibration")}
    about = about_export(model, implementation=request.implementation, placement=placement, **parts)
    compared: list[Comparison | None] = []

    def compare(staged: Path) -> dict[str, Any] | None:
        compared.append(compare_here(staged, exported, model, analog, request.implementation))
        return None if compared[0] is None else dataclasses.asdict(compared[0])

    write_export(request.output, exported, about=about, check=compare)
    size = (request.output / ARGUMENTS).stat().st_size
    console.print(
        f"[bold]{model.name}[/bold]: {placement or 'all digital'}, {len(exported.arguments)} arguments of "
        f"{size / 1e6:,.1f} MB; lowered in {seconds:.1f} s"
    )
    for platform in request.platforms:
        path = request.output / program_file(platform)
        console.print(f"{platform}: {path} ({path.stat().st_size / 1e3:,.0f} kB)")
    console.print(_outcome(compared[0]))


def _outcome(compared: Comparison | None) -> str:
    if compared is None:
        return "not run: this machine has no device of these platforms that a new process could open"
    tokens = " x ".join(map(str, compared.tokens))
    found = f"largest difference {compared.largest_difference:.3g} from"
    if compared.largest_difference == 0:
        found = "in every bit equal to"
    return (
        f"run on {compared.platform} in a new process, {tokens} tokens: logits (largest {compared.largest_logit:.3g}) "
        f"{found} the jitted forward pass"
    )


def _analog_side(request: ExportRequest, model: Model) -> tuple[str, dict[str, Any]]:
    """The placement's name, and the analog arguments of the forward pass: the first chip of `hetmoe eval`'s seed."""
    if is_mixed(model.params.layers.moe.experts.gate) and request.plan is None and request.placement is None:
        raise InputError(f"{model.name}: has quantized experts, which rules cannot place: give --plan")
    spec = request.spec(request.noise_scale)
    sample = None
    if request.reads_text:
        sample = split_windows(load_windows(model, choose_text(request.text), request.seq), WINDOWS_TO_CALIBRATE, 0)[0]
    calibration = request.calibration(model, sample)
    scored = request.spec(scoring_scale([request.noise_scale]))
    placement = request.chosen_placement(model, sample, calibration, scored, 1)
    plan = placement.plans[0]
    check_quantized(model.params, plan)  # before minutes of programming
    key = noise_keys(request.seed, 1)[0]
    if request.weights == "stored":
        make = jax.jit(functools.partial(program, dense=plan.switches_dense))
        programmed: Any = make(key, model.params, spec)
    else:
        programmed = seeded_weights(key, dense=plan.switches_dense, when=request.weights)  # pyright: ignore[reportArgumentType]
    read_key = None if spec.read_noise is None else jax.random.fold_in(jax.random.fold_in(key, READ_STREAM), 0)
    return placement.name, {
        "plan": plan, "spec": spec, "programmed": programmed, "calibration": calibration, "read_key": read_key,
    }  # fmt: skip
