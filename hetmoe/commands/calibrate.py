"""`hetmoe calibrate`: DAC input ranges and the ADC bound from text, and a file of them."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.analog.calibration import Calibration, InputStatistics, RangeMethod, calibration_from
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.checkpoint.load import load_model, parse_dtype
from hetmoe.commands.common import choose_text, make_console
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import collect_statistics
from hetmoe.evaluate.calibration_file import SavedCalibration, save_calibration
from hetmoe.evaluate.converter_search import ConverterSearch, search_by_loss, search_by_output
from hetmoe.evaluate.prepare import unevaluated_text
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import check_writable
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.placement.plan import all_analog, experts_analog

K, LAMBDA = (4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0), (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
COSTS = {"output": "relative squared error of outputs", "loss": "loss, nats per token"}
MODULES = ("experts", "all")
SAMPLE = 4  # sequences whose inputs are held at once for output errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrateRequest:
    """The options of `hetmoe calibrate`, named as there; None = the default grid."""

    model: str
    output: Path | None
    text: Path | None
    tokens: int
    seq: int
    method: str
    k: list[float] | None
    quantile: list[float] | None
    adc_bound: list[float] | None
    by: str
    analog: str
    min_tokens: int
    bound_axis: str
    dac_bits: int | None
    adc_bits: int | None
    tile_rows: int
    dtype: str

    def check(self) -> tuple[list[RangeMethod], list[float], AnalogSpec]:
        """The candidates and the converters. Raises InputError for values that are wrong whatever the model."""
        if self.by not in COSTS:
            raise InputError(f"--by {self.by!r} is unknown: use {' or '.join(COSTS)}")
        if self.analog not in MODULES:
            raise InputError(f"--analog {self.analog!r} is unknown: use {' or '.join(MODULES)}")
        if self.seq < 1 or self.tokens < self.seq:
            raise InputError(f"need --seq >= 1 and --tokens >= --seq, got {self.seq} and {self.tokens}")
        if self.output is not None:
            check_writable(self.output)
        parse_dtype(self.dtype)
        bounds = list(LAMBDA if self.adc_bound is None else self.adc_bound)
        specs = [
            analog_spec(
                dac_bits=self.dac_bits, adc_bits=self.adc_bits, adc_bound=bound, bound_axis=self.bound_axis,
                tile_rows=self.tile_rows,
            )
            for bound in bounds
        ]  # fmt: skip
        return self._methods(), bounds, specs[0]

    def _methods(self) -> list[RangeMethod]:
        if self.k is not None and self.method != "ema_std":
            raise InputError(f"--k belongs to --method ema_std, not to {self.method!r}")
        if self.quantile is not None and self.method != "quantile":
            raise InputError(f"--quantile belongs to --method quantile, not to {self.method!r}")
        base = RangeMethod(method=self.method, min_tokens=self.min_tokens)  # pyright: ignore[reportArgumentType]
        if self.method == "ema_std":
            return [dataclasses.replace(base, k=k) for k in (K if self.k is None else self.k)]
        if self.method == "quantile" and self.quantile is not None:
            return [dataclasses.replace(base, quantile=q) for q in self.quantile]
        return [base]


def run(request: CalibrateRequest) -> None:
    """Collects statistics once, searches if there is a choice, reports, and writes the file if asked."""
    methods, bounds, spec = request.check()
    console, started = make_console(), time.perf_counter()
    model = load_model(request.model, request.dtype)
    if request.seq > model.config.max_position_embeddings:
        raise InputError(f"--seq {request.seq} exceeds the model's context of {model.config.max_position_embeddings}")
    files = choose_text(request.text)
    windows, is_apart = unevaluated_text(model, files, tokens=request.tokens, seq=request.seq)
    statistics = collect_statistics(
        model.params, jnp.asarray(windows.tokens[:, :-1]), model.config, tile_rows=request.tile_rows,
        histogram=request.method == "quantile",
    )  # fmt: skip
    where = "apart from what hetmoe eval evaluates by default" if is_apart else "all of the text: it is short"
    console.print(
        f"[bold]{model.name}[/bold]: statistics of {windows.byte_count.size:,} tokens ({where}) in "
        f"{time.perf_counter() - started:.0f} s"
    )
    search = None
    if len(methods) * len(bounds) > 1:
        search = _search(request, model, statistics, jnp.asarray(windows.tokens), spec, methods, bounds)
        _print_search(console, request, search)
    how, bound = (methods[0], bounds[0]) if search is None else search.best
    edges = [
        name
        for name, values, value in (("ranges", methods, how), ("lambda", bounds, bound))
        if len(values) > 1 and value in (values[0], values[-1])
    ]
    calibration = calibration_from(statistics, how)
    console.print(f"chosen: {_name(how)}, lambda = {bound:g}")
    if edges:
        console.print(f"at the edge of the grid: {' and '.join(edges)}; a wider one may hold something better")
    _print_fallbacks(console, calibration, how, model.config)
    if request.output is not None:
        made_by = _made_by(request, files, windows.byte_count.size, search)
        saved = SavedCalibration(
            calibration=calibration, adc_bound=bound, bound_axis=request.bound_axis, how=how, made_by=made_by
        )
        save_calibration(request.output, saved, model)
        console.print(f"calibration: {request.output} (hetmoe eval --calibration {request.output})")


def _search(
    request: CalibrateRequest, model: Model, statistics: InputStatistics, windows: Any, spec: AnalogSpec,
    methods: list[RangeMethod], bounds: list[float],
) -> ConverterSearch:  # fmt: skip
    dense = request.analog == "all"
    if request.by == "output":
        picks = np.unique(np.linspace(0, len(windows) - 1, SAMPLE).round().astype(int))
        sample = windows[picks, :-1]
        return search_by_output(model, statistics, sample, spec, methods, bounds, dense=dense)
    plan = all_analog(model.config) if dense else experts_analog(model.config)
    return search_by_loss(model, statistics, windows, spec, plan, methods, bounds)


def _name(how: RangeMethod) -> str:
    return {"ema_std": f"K = {how.k:g}", "quantile": f"quantile {how.quantile:g}", "max": "maximum"}[how.method]


def _print_search(console: Console, request: CalibrateRequest, search: ConverterSearch) -> None:
    scope = "all matrices" if request.analog == "all" else "experts"
    table = Table(title=f"{COSTS[request.by]}: {scope}, converters alone", title_justify="left")
    table.add_column("ranges")
    for bound in search.bounds:
        table.add_column(f"lambda {bound:g}", justify="right", no_wrap=True)
    for how, row in zip(search.methods, search.cost, strict=True):
        cells = [f"{value:.3e}" if request.by == "output" else f"{value:.4f}" for value in row]
        bold = [f"[bold]{c}[/bold]" if v == search.cost.min() else c for c, v in zip(cells, row, strict=True)]
        table.add_row(_name(how), *bold)
    console.print(table)
    if not search.by_matrix:
        return
    each = Table(title="best pair of each matrix", title_justify="left")
    for heading in ("matrix", "ranges", "lambda", "error there", "error at the common choice"):
        each.add_column(heading, justify="left" if heading in ("matrix", "ranges") else "right")
    common = np.unravel_index(int(np.argmin(search.cost)), search.cost.shape)
    for name, cost in search.by_matrix.items():
        method, bound = np.unravel_index(int(np.argmin(cost)), cost.shape)
        each.add_row(
            name, _name(search.methods[method]), f"{search.bounds[bound]:g}", f"{cost.min():.3e}", f"{cost[common]:.3e}"
        )
    console.print(each)


def _print_fallbacks(console: Console, calibration: Calibration, how: RangeMethod, config: ModelConfig) -> None:
    seen = np.asarray(calibration.tokens_seen)
    few = seen < how.min_tokens
    if not few.any():
        console.print(f"every expert saw at least {how.min_tokens} tokens (fewest {seen.min():.0f})")
        return
    console.print(
        f"{few.sum()} of {few.size} experts saw fewer than {how.min_tokens} tokens: they have their layer's range"
    )
    for layer, flags, counts in zip(config.moe_layers, few, seen, strict=True):
        if flags.any():
            listed = ", ".join(f"{e} ({counts[e]:.0f})" for e in np.flatnonzero(flags))
            console.print(f"  layer {layer}: experts (tokens) {listed}")


def _made_by(
    request: CalibrateRequest, files: list[Path], tokens: int, search: ConverterSearch | None
) -> dict[str, Any]:
    found: dict[str, Any] = {"provenance": provenance(), "text": [f.name for f in files], "tokens": tokens}
    if search is not None:
        found["search"] = {
            "by": request.by,
            "analog": request.analog,
            "ranges": [_name(how) for how in search.methods],
            "lambda": search.bounds,
            "cost": search.cost.tolist(),
        }
    return found
