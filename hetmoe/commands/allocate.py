"""`hetmoe allocate`: for every expert analog, or digital at so many bits, under budgets of bytes, energy and tiles."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.analog.spec import AnalogSpec, analog_spec, describe
from hetmoe.checkpoint.load import load_model, parse_dtype
from hetmoe.checkpoint.save import save_model
from hetmoe.commands.common import choose_text, make_console, write_json
from hetmoe.commands.hardware_tables import amount, description_record
from hetmoe.errors import InputError
from hetmoe.evaluate.prepare import noise_keys, unevaluated_text
from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.rules import SCORE_STREAM
from hetmoe.files import check_new_directory, check_writable
from hetmoe.hardware.description import Description, open_description
from hetmoe.hardware.quantity import convert, parse_quantity
from hetmoe.hardware.routing_file import observe_routing
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.plan import Plan
from hetmoe.placement.plan_file import BESIDE_MODEL, save_plan
from hetmoe.quantize.driver import check_groups, quantize_experts
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.quantize.recipe import Recipe
from hetmoe.technologies.assign import assign
from hetmoe.technologies.assign import describe as describe_assignment
from hetmoe.technologies.choices import ANALOG, PLAIN, Assignment, Choices, check_levels, expected_losses, make_choices
from hetmoe.technologies.error_report import layer_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class AllocateRequest:
    """The options of `hetmoe allocate`, named as there."""

    model: str
    output: Path | None
    levels: str
    max_bytes: str | None
    max_energy: str | None
    max_tiles: int | None
    no_plain: bool
    quantizer: str
    group: int
    device: str
    noise_scale: float
    time_s: float | None
    drift_compensation: bool
    processor: str
    chip: str
    batch: int
    text: Path | None
    tokens: int
    seq: int
    seed: int
    report: bool | None
    report_tokens: int
    report_seeds: int
    dtype: str | None
    json_file: Path | None

    def bits(self) -> tuple[int, ...]:
        """Levels. Raises InputError for what are none."""
        try:
            return check_levels([int(part) for part in self.levels.split(",")])
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"--levels {self.levels!r} must be whole numbers with commas, such as 2,3,4") from None

    def budgets(self) -> dict[str, float | None]:
        """As `assign` takes them. Raises InputError for none at all, or what is no energy or size of at least 0."""
        found = {
            "max_bytes": _quantity("--max-bytes", self.max_bytes, "B", plain=True),
            "max_energy": _quantity("--max-energy", self.max_energy, "J"), "max_tiles": self.max_tiles,
        }  # fmt: skip
        if self.max_tiles is not None and self.max_tiles < 0:
            raise InputError(f"--max-tiles {self.max_tiles} must be at least 0")
        if all(value is None for value in found.values()):
            raise InputError(
                "without a budget no expert would be analog or quantized: give --max-bytes, --max-energy or --max-tiles"
            )
        return found

    def recipe(self) -> Recipe:
        """Quantiser and grids."""
        return Recipe(method=self.quantizer, group=self.group)  # pyright: ignore[reportArgumentType]

    def spec(self) -> AnalogSpec:
        """The analog hardware; converters play no part in what is estimated."""
        return analog_spec(
            self.device, noise_scale=self.noise_scale, time_s=self.time_s, drift_compensation=self.drift_compensation
        )

    def check(self) -> Path:
        """The output. Raises InputError for values that need neither model nor text to be seen wrong."""
        if self.output is None:
            raise InputError("name a directory for plan and quantized model: -o DIR")
        least = {"seq": 1, "seed": 0, "batch": 1, "tokens": 2 * self.seq, "report_tokens": self.seq, "report_seeds": 2}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least {value}")
        parse_dtype(self.dtype)
        for part in (self.bits, self.budgets, self.recipe, self.spec):
            part()
        if self.report and self.time_s is not None:
            raise InputError("--report bounds errors right after programming: leave out --time")
        check_new_directory(self.output)
        check_writable(self.output / BESIDE_MODEL)
        if self.json_file is not None:
            check_writable(self.json_file)
        return self.output


def run(request: AllocateRequest) -> None:
    """Estimates, chooses, quantizes, saves and reports."""
    output, levels, recipe, spec = request.check(), request.bits(), request.recipe(), request.spec()
    digital, analog = open_description(request.processor, "digital"), open_description(request.chip, "analog")
    console, started = make_console(), time.perf_counter()
    model = load_model(request.model, request.dtype or "float32")
    refuse_quantized(model.params, "technologies are not chosen for")
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    check_groups(model.config, recipe, levels)
    windows, _ = unevaluated_text(model, choose_text(request.text), tokens=request.tokens, seq=request.seq)
    key = jax.random.fold_in(jax.random.key(request.seed), SCORE_STREAM)
    losses = expected_losses(model, windows.tokens, spec, recipe, levels, key=key)
    frequency = observe_routing(model, windows.tokens[:, :-1]).frequency
    choices = make_choices(
        model.config, losses, levels, recipe, frequency, batch=request.batch, digital=digital, analog=analog,
        weight_bytes=float(model.params.embed.dtype.itemsize) if request.dtype else 2.0,
    )  # fmt: skip
    found = assign(choices, **request.budgets(), exclude=(PLAIN,) if request.no_plain else ())
    quantized, plan = _apply(model, found, recipe, windows.tokens[:, :-1])
    made_by = {
        "rule": "expected_loss over both technologies", "analog": describe(spec), "quantizer": recipe.method,
        "budgets": request.budgets(), "expected_increase": found.expected,
    }  # fmt: skip
    # Losses are estimated in float32; what is saved keeps the dtype that the model is stored in.
    stored = model if request.dtype else load_model(request.model, None)
    saved, _ = _apply(stored, found, recipe, windows.tokens[:, :-1])
    if saved is not stored:
        save_model(output, saved, made_by=made_by)
    save_plan(output / BESIDE_MODEL, plan, saved, made_by=made_by)

    console.print(f"[bold]{model.name}[/bold], {request.device} at c = {request.noise_scale:g}", highlight=False)
    print_layers(console, model, choices, found)
    print_budgets(console, choices, found, request)
    record = _record(request, model, choices, found, [digital, analog])
    if request.report is None and request.time_s is not None:
        console.print("no error bound: there is one right after programming only, without --time")
    elif request.report is not False:
        record["errors"] = _errors(request, console, model, quantized, found, spec)
    where = "quantized model and plan" if quantized is not model else "plan (no expert is quantized)"
    console.print(f"{where}: {output} ({time.perf_counter() - started:.0f} s)")
    if request.json_file is not None:
        write_json(request.json_file, record)
        console.print(f"results: {request.json_file}")


def _apply(model: Model, found: Assignment, recipe: Recipe, windows: np.ndarray) -> tuple[Model, Plan]:
    """(the model with experts quantized, the plan)."""
    plan = Plan(experts=jnp.asarray(found.analog))
    if not found.bits.any():
        return model, plan
    text = windows if recipe.method == "gptq" else None
    return quantize_experts(model, found.bits, recipe, windows=text)[0], plan


def print_layers(console: Console, model: Model, choices: Choices, found: Assignment) -> None:
    """How many experts of each layer run on what."""
    table = Table(title="experts by layer", title_justify="left")
    table.add_column("layer", justify="right")
    for name in choices.names:
        table.add_column(name if name in (ANALOG, PLAIN) else f"digital, {name}", justify="right")
    for number, row in zip(model.config.moe_layers, found.option, strict=True):
        table.add_row(str(number), *(str(int(np.sum(row == option))) for option in range(len(choices.names))))
    console.print(table)


def print_budgets(console: Console, choices: Choices, found: Assignment, request: AllocateRequest) -> None:
    """What the choice takes, beside all experts on one option."""
    table = Table(title="all experts", title_justify="left")
    for heading in ("", "expected increase, nats", "digital weights", "energy per token", "tiles"):
        table.add_column(heading, justify="left" if not heading else "right")
    shape = found.option.shape
    lines = {"chosen": found}
    lines |= {f"all {name}": describe_assignment(choices, np.full(shape, n)) for n, name in enumerate(choices.names)}
    budgets = request.budgets()
    units = {"max_bytes": "B", "max_energy": "J", "max_tiles": ""}
    table.add_row("budget", "", *(_limit(budgets[name], unit) for name, unit in units.items()))
    table.add_section()
    for name, one in lines.items():
        table.add_row(
            name, f"{one.expected:.5f}", amount(one.stored, "B"), amount(one.energy, "J"), f"{one.tiles:,.0f}"
        )
    console.print(table)
    proven = "no choice within the budgets is expected to lose less"
    if found.gap > 0:
        proven = f"the least possible is at most {found.gap:.3g} nats lower"
    console.print(f"{proven}; increases of single experts are added up, and converters are left out")


def _quantity(option: str, said: str | None, unit: str, *, plain: bool = False) -> float | None:
    """What an option says, in `unit`; a number without a unit is one if `plain`."""
    if said is None:
        return None
    try:
        value = convert(float(said), unit, unit) if plain and _is_number(said) else parse_quantity(said, unit)
    except InputError as error:
        raise InputError(f"{option} {error}") from None
    if value < 0:
        raise InputError(f"{option} {said!r} must be at least 0")
    return value


def _is_number(said: str) -> bool:
    try:
        float(said)
    except ValueError:
        return False
    return True


def _limit(budget: float | None, unit: str) -> str:
    if budget is None:
        return "none"
    return amount(budget, unit) if unit else f"{budget:,.0f}"


def _errors(
    request: AllocateRequest, console: Console, model: Model, quantized: Model, found: Assignment, spec: AnalogSpec
) -> list[dict[str, Any]]:
    """Bounds and measured errors of the layers' outputs, printed."""
    windows, _ = unevaluated_text(model, choose_text(request.text), tokens=request.report_tokens, seq=request.seq)
    experts = None if quantized is model else quantized.params.layers.moe.experts
    errors = layer_errors(
        model, experts, found, spec, jnp.asarray(windows.tokens[:, :-1]), noise_keys(request.seed, request.report_seeds)
    )
    table = Table(
        title=f"change of the experts' weighted sum, {request.report_tokens:,} tokens, root mean square over "
        f"{request.report_seeds} seeds and tokens, relative to the sum's; without converters",
        title_justify="left",
    )  # fmt: skip
    for heading in ("layer", "measured", "bound", "measured / bound, median", "largest", "violations"):
        table.add_column(heading, justify="right")
    rows = [
        {"layer": layer, **error.row()} for layer, error in zip(model.config.moe_layers, errors, strict=True)
    ]  # fmt: skip
    for row in rows:
        table.add_row(
            str(row["layer"]), f"{row['relative_measured']:.3f}", f"{row['relative_bound']:.3f}",
            f"{row['tightness']:.3f}", f"{row['largest_tightness']:.3f}", str(row["violations"]),
        )  # fmt: skip
    console.print(table)
    return rows


def _record(
    request: AllocateRequest, model: Model, choices: Choices, found: Assignment, hardware: list[Description]
) -> dict[str, Any]:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(request).items()}
    return {
        "format": "hetmoe-allocate-1",
        "provenance": provenance(),
        "model": {"name": model.name, "fingerprint": model_fingerprint(model)},
        "options": options,
        "analog": describe(request.spec()),
        "hardware": [description_record(part) for part in hardware],
        "choices": choices.names,
        "option": found.option.tolist(),
        "expected_losses": choices.losses.tolist(),
        "found": {name: getattr(found, name) for name in ("expected", "gap", "stored", "energy", "tiles")},
    }
