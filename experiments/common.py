"""What the experiments on the paper's tables and figures share: options, model, text, ranges, seeds, results, lines.

All of them take the same options (`Options`; `--help` lists them), so that each runs on another model by `--model` and
`--dtype` alone. Rules are scored, and input ranges calibrated, on windows of the text that are never evaluated.
"""

import dataclasses
import inspect
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import typer
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table

from hetmoe.analog.calibration import Calibration, RangeMethod
from hetmoe.analog.spec import AnalogSpec, analog_spec, describe
from hetmoe.checkpoint.load import load_model
from hetmoe.commands.common import choose_text, make_console, write_json
from hetmoe.commands.progress import show_progress
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.noise_sweep import Placement, Point, digital_point, evaluations, noise_sweep
from hetmoe.evaluate.prepare import DEFAULT_TOKENS, EvalText, noise_keys, prepare_text
from hetmoe.evaluate.provenance import provenance
from hetmoe.evaluate.rules import SCORE_STREAM, Scorer
from hetmoe.evaluate.statistics import Interval, mean_interval, paired_difference
from hetmoe.files import check_writable, write_bytes
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.plan import Plan, plan_shapes
from hetmoe.report.groups import Line
from hetmoe.report.style import line_styles

ADC_BOUND = 3.0  # with calibrated ranges of 12 standard deviations, as `hetmoe eval` has it
RESULTS = Path(__file__).parents[1] / "docs" / "experiments"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every experiment."""

    model: Annotated[str, typer.Option(help="Model directory, name on the hub, or 'reference'.")] = "reference"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16 for weights and activations.")] = "float32"
    device: Annotated[str, typer.Option(help="Analog device.")] = "pcm"
    text: Annotated[Path | None, typer.Option(help="UTF-8 text file; default: the embedded held-out text.")] = None
    tokens: Annotated[int, typer.Option(help="Tokens to evaluate.")] = DEFAULT_TOKENS
    seq: Annotated[int, typer.Option(help="Tokens predicted per window.")] = 256
    batch: Annotated[int, typer.Option(help="Windows run at once.")] = 16
    seeds: Annotated[int, typer.Option(help="Noise seeds (chips).")] = 8
    seed: Annotated[int, typer.Option(help="The seed that all keys derive from.")] = 0
    jobs: Annotated[int | None, typer.Option(help="Seeds run side by side; default 2 on CPU, 1 elsewhere.")] = None
    output: Annotated[Path, typer.Option(help="Folder of the JSON file and the figure.")] = RESULTS

    @property
    def threads(self) -> int:
        """Seeds run side by side."""
        return self.jobs or (2 if jax.default_backend() == "cpu" else 1)


def run(main: Callable[..., None]) -> None:
    """Runs `main(options, ...)` from the command line: the options of all experiments, then its own."""
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p.replace(kind=kind) for p in inspect.signature(main).parameters.values() if p.name != "options"]
    shared = [
        inspect.Parameter(f.name, kind, default=f.default, annotation=f.type) for f in dataclasses.fields(Options)
    ]

    def call(**values: Any) -> None:
        options = Options(**{p.name: values.pop(p.name) for p in shared})
        try:
            main(options, **values)
        except InputError as error:
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
            sys.exit(2)

    command: Any = call
    command.__signature__ = inspect.Signature([*shared, *own])
    command.__annotations__ = {p.name: p.annotation for p in [*shared, *own]}
    command.__doc__ = main.__doc__
    typer.run(command)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A loaded model with its text, ranges and keys."""

    name: str
    options: Options
    model: Model
    text: EvalText
    calibration: Calibration
    keys: jax.Array
    digital: Point  # the model without any analog part
    console: Console
    started: float

    @property
    def config(self) -> ModelConfig:
        """The model's."""
        return self.model.config

    @property
    def digital_loss(self) -> float:
        """Mean loss in nats per token of the model without any analog part."""
        return float(np.log(self.digital.perplexity[0]))

    @property
    def score_key(self) -> jax.Array:
        """Of the chips that rules are scored on; they are not those that are evaluated."""
        return jax.random.fold_in(jax.random.key(self.options.seed), SCORE_STREAM)

    def scorer(self, down_axis: str = "hidden") -> Scorer:
        """Scores by rule, on text that is not evaluated."""
        return Scorer(
            model=self.model, sample=self.text.sample, down_axis=down_axis, seed=self.options.seed,
            calibration=self.calibration,
        )  # fmt: skip

    def spec(self, noise_scale: float, device: str | None = None, **changes: Any) -> AnalogSpec:
        """The analog hardware."""
        return analog_spec(device or self.options.device, noise_scale=noise_scale, adc_bound=ADC_BOUND, **changes)

    def sweep(
        self, spec: AnalogSpec, placements: Sequence[Placement], scales: Sequence[float], title: str
    ) -> dict[tuple[str, float], Point]:
        """Every placement at every noise scale over all seeds."""
        total = evaluations(placements, scales, spec, len(self.keys))
        with show_progress(self.console, title, "evaluations", total) as advance:
            points = noise_sweep(
                self.model, spec, self.calibration, placements, scales, self.keys, self.text.batches, self.text.size,
                jobs=self.options.threads, progress=advance,
            )  # fmt: skip
        return {(p.placement, p.noise_scale): p for p in points}

    def losses(self, point: Point) -> np.ndarray:
        """Mean loss per token, nats, one value per seed."""
        return np.broadcast_to(np.log(point.perplexity), len(self.keys))

    def increase(self, point: Point) -> Interval:
        """Of the loss over the digital model's."""
        return mean_interval(self.losses(point) - self.digital_loss)

    def save(self, results: dict[str, Any], figure: matplotlib.figure.Figure, spec: AnalogSpec | None) -> None:
        """Writes the figure and the record of the run; `spec` is None where nothing is analog."""
        options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self.options).items()}
        analog = {} if spec is None else {k: v for k, v in describe(spec).items() if k != "noise_scale"}
        record = {
            "options": options | {"output": None},  # where the files go changes nothing in them
            "model": {"name": self.model.name, "fingerprint": model_fingerprint(self.model)},
            "text": dataclasses.asdict(self.text.size) | {"scoring_tokens": self.text.sample.byte_count.size},
            "analog": analog,
            "seed_keys": np.asarray(jax.random.key_data(self.keys)).tolist(),
            "digital": dataclasses.asdict(self.digital) | {"loss": self.digital_loss},
            "results": results,
        }
        write_results(self.options.output, self.name, record, figure, self.started, self.console)


def write_results(
    output: Path,
    name: str,
    record: dict[str, Any],
    figure: matplotlib.figure.Figure,
    started: float,
    console: Console,
) -> None:
    """Writes the figure, and the record with its provenance."""
    seconds = round(time.perf_counter() - started, 1)
    head = {
        "format": "hetmoe-experiment-1",
        "experiment": name,
        "provenance": provenance() | {"command": ["python", f"experiments/{name}.py", *sys.argv[1:]]},
    }
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(output / f"{name}.png", buffer.getvalue())
    write_json(output / f"{name}.json", head | record | {"seconds": seconds})
    console.print(f"{output / name}.json and .png; {seconds:.0f} s")


def prepare(name: str, options: Options) -> Setup:
    """Loads and calibrates, and evaluates the digital model.

    Raises:
        InputError: for options that make no experiment.
    """
    started = time.perf_counter()
    for option in ("seq", "batch"):
        if getattr(options, option) < 1:
            raise InputError(f"--{option} {getattr(options, option)} must be at least 1")
    if options.seeds < 2:
        raise InputError(f"--seeds {options.seeds} must be at least 2: results are compared over seeds")
    if options.seed < 0:
        raise InputError(f"--seed {options.seed} must be at least 0")
    if options.tokens < options.seq:
        raise InputError(f"--tokens {options.tokens} is less than one window of --seq {options.seq}")
    for suffix in ("json", "png"):
        check_writable(options.output / f"{name}.{suffix}")
    model = load_model(options.model, options.dtype)
    if options.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {options.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    text = prepare_text(
        model, choose_text(options.text), tokens=options.tokens, seq=options.seq, batch=options.batch,
        seed=options.seed, calibrate=True,
    )  # fmt: skip
    ranges = calibrate(model.params, jnp.asarray(text.sample.tokens[:, :-1]), model.config, RangeMethod())
    setup = Setup(
        name=name, options=options, model=model, text=text, calibration=ranges,
        keys=noise_keys(options.seed, options.seeds), digital=digital_point(model, text.batches, text.size),
        console=make_console(), started=started,
    )  # fmt: skip
    setup.console.print(
        f"[bold]{name}[/bold]: {model.name}, {text.size.tokens:,} tokens evaluated, {text.sample.byte_count.size:,} "
        f"others scored on, {options.seeds} seeds; digital perplexity {setup.digital.perplexity[0]:.3f}"
    )
    return setup


def scales_or(given: list[float] | None, default: Sequence[float]) -> list[float]:
    """Noise scales of the command line. Raises InputError for repeated ones, or none above 0."""
    scales = list(default) if given is None else given
    if len(set(scales)) != len(scales) or max(scales) <= 0:
        raise InputError(f"--noise-scale {scales} must name different values, at least one of them above 0")
    return scales


def analog_only(config: ModelConfig, kinds: Sequence[str]) -> Plan:
    """A plan in which all modules of the given kinds are analog; every module has an analog path in the program."""
    flags: dict[str, Any] = {n: jnp.full(shape, n in kinds) for n, shape in plan_shapes(config).items()}
    return Plan(**flags)


def recovered_share(analog: np.ndarray, placed: np.ndarray, digital: float) -> Interval:
    """Share of the loss increase of `analog` over `digital` that `placed` takes back, paired by seed.

    It is the ratio of the means; its interval is that of `gain - share * increase` over the seeds, divided by the mean
    increase (first-order propagation), so that seeds of little increase do not dominate.

    Raises:
        InputError: if the loss does not increase on average.
    """
    increase, gain = np.asarray(analog) - digital, np.asarray(analog) - np.asarray(placed)
    total = float(np.mean(increase))
    if total <= 0:
        raise InputError(f"the loss increases by {total:g} nats: there is nothing to recover")
    share = float(np.mean(gain)) / total
    rest = paired_difference(gain, share * increase)
    return Interval(
        mean=share, low=share + rest.low / total, high=share + rest.high / total,
        standard_error=rest.standard_error / total, count=rest.count,
    )  # fmt: skip


def as_record(interval: Interval) -> dict[str, float]:
    """Mean and 95 % interval, six digits."""
    return {name: float(f"{getattr(interval, name):.6g}") for name in ("mean", "low", "high")}


def digits(values: Any, count: int = 6) -> Any:
    """Nested lists of numbers with few digits, so that files stay small."""
    array = np.asarray(values, np.float64)
    return [digits(row, count) for row in array] if array.ndim else float(f"{array:.{count}g}")


def plus_minus(interval: Interval, factor: float = 1.0, places: int = 3) -> str:
    """Mean and half of the 95 % interval."""
    return f"{interval.mean * factor:.{places}f} ± {(interval.high - interval.mean) * factor:.{places}f}"


def make_table(title: str, first: str, columns: Sequence[str]) -> Table:
    """A table of numbers with names in the first column."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Arguments of the plotted lines of placements, as in the reports of `hetmoe report`."""
    lines = [Line(placement=name, fraction=None) for name in names]
    return {line.placement: style.line for line, style in line_styles(lines).items()}


def draw_line(
    axes: Axes, x: Sequence[float], intervals: Sequence[Interval], label: str, look: dict[str, Any], factor: float = 1.0
) -> None:
    """A line with a band: mean and 95 % interval."""
    mean, low, high = (np.array([getattr(i, n) for i in intervals]) * factor for n in ("mean", "low", "high"))
    axes.plot(x, mean, label=label, **look)
    axes.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)


def panels(count: int, title: str, *, width: float = 4.6, height: float = 4.2) -> tuple[Any, list[Axes]]:
    """A figure and its panels, side by side."""
    figure = matplotlib.figure.Figure(figsize=(max(width * count, 8.5), height), layout="constrained")
    row = list(figure.subplots(1, count, squeeze=False)[0])
    for axes in row:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title)
    return figure, row


def add_legend(figure: Any, axes: Axes, columns: int = 4) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
