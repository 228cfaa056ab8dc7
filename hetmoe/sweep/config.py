"""CONFIG.toml of a sweep, read strictly: what is not understood is refused, never ignored."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

from hetmoe.analog.calibration import RangeMethod
from hetmoe.analog.devices import DEVICES
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.checkpoint.load import parse_dtype
from hetmoe.errors import InputError
from hetmoe.evaluate.calibration_file import stored_adc_bound
from hetmoe.evaluate.execution import check_execution
from hetmoe.evaluate.prepare import DEFAULT_TOKENS
from hetmoe.evaluate.rules import scoring_scale
from hetmoe.placement.plan import PLACEMENTS, digital_count
from hetmoe.placement.scores import DEVICE_RULES, RULES, check_down_axis
from hetmoe.toml_table import TomlTable, read_toml

PROGRAMMED = "programmed"  # the time of a reading with programming noise only
LARGEST_SEED = 2**32 - 1  # a key holds 32 bits of it


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Table `[text]`. `tokens` is None where none is given: the default, or what there is."""

    files: tuple[str, ...]
    tokens: int | None
    seq: int
    batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class GridConfig:
    """Table `[grid]`, named as there; a time is None for "programmed".

    `scoring_scale` is the noise scale that device-dependent rules are scored at; their scores also have the first of
    `bits`. Without such rules nothing depends on it.
    """

    placements: tuple[str, ...]
    rules: tuple[str, ...]
    fractions: tuple[float, ...]
    devices: tuple[str, ...]
    noise_scales: tuple[float, ...]
    times: tuple[float | None, ...]
    bits: tuple[int, ...]
    seeds: int
    seed: int
    scoring_scale: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class HardwareConfig:
    """Table `[hardware]`, named as there; `calibration` is a file that holds the ranges and the default `adc_bound`."""

    calibration: str | None
    input_range: str
    range_k: float
    adc_bound: float
    bound_axis: str
    tile_rows: int
    drift_compensation: bool
    down_axis: str

    def range_method(self) -> RangeMethod | None:
        """How DAC ranges are calibrated; None = dynamic."""
        if self.input_range == "dynamic":
            return None
        return RangeMethod(method=self.input_range, k=self.range_k)  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """Table `[execution]`, named as there."""

    weights: str
    implementation: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A checked CONFIG."""

    source: Path
    model: str
    dtype: str
    text: TextConfig
    grid: GridConfig
    hardware: HardwareConfig
    execution: ExecutionConfig

    def text_files(self) -> list[Path]:
        """The text files, relative to CONFIG; none = the embedded held-out text."""
        return [self.source.parent / name for name in self.text.files]

    def calibration_file(self) -> Path | None:
        """The calibration, relative to CONFIG; None = ranges from text, or dynamic."""
        return None if self.hardware.calibration is None else self.source.parent / self.hardware.calibration

    def spec(self, device: str, noise_scale: float, time_s: float | None, bits: int) -> AnalogSpec:
        """The analog hardware of a point."""
        return analog_spec(
            device, noise_scale=noise_scale, time_s=time_s,
            drift_compensation=self.hardware.drift_compensation and time_s is not None,
            dac_bits=bits or None, adc_bits=bits or None, adc_bound=self.hardware.adc_bound,
            bound_axis=self.hardware.bound_axis, tile_rows=self.hardware.tile_rows,
        )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """Plain values under the names of CONFIG, defaults filled in."""
        content = dataclasses.asdict(self)
        del content["source"]
        content["text"]["tokens"] = DEFAULT_TOKENS if self.text.tokens is None else self.text.tokens
        content["grid"]["times"] = [PROGRAMMED if time is None else time for time in self.grid.times]
        if not set(self.grid.rules) & set(DEVICE_RULES):  # else larger noise scales could not be added
            content["grid"]["scoring_scale"] = None
        for table in ("text", "grid"):
            content[table] = {k: list(v) if isinstance(v, tuple) else v for k, v in content[table].items()}
        return content


def read_config(path: Path) -> SweepConfig:
    """Reads and checks a CONFIG; every point's hardware is built once, so that none is refused halfway.

    Raises:
        InputError: naming the file, the key, and what is allowed.
    """
    top = read_toml(path)
    config = SweepConfig(
        source=path,
        model=top.text("model"),
        dtype=top.text("dtype", "float32"),
        text=_text(top.table("text")),
        grid=_grid(top.table("grid", required=True)),
        hardware=_hardware(top.table("hardware"), path),
        execution=_execution(top.table("execution")),
    )
    top.finish()
    try:
        _check(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def _text(table: TomlTable) -> TextConfig:
    config = TextConfig(
        files=tuple(table.texts("files", ())),
        tokens=table.whole("tokens", None, at_least=1),
        seq=table.whole("seq", 256, at_least=1),
        batch=table.whole("batch", 16, at_least=1),
    )
    table.finish()
    return config


def _grid(table: TomlTable) -> GridConfig:
    config = GridConfig(
        placements=tuple(table.texts("placements", tuple(PLACEMENTS), of=PLACEMENTS)),
        rules=tuple(table.texts("rules", (), of=RULES)),
        fractions=tuple(table.numbers("fractions", ())),
        devices=tuple(table.texts("devices", of=DEVICES)),
        noise_scales=(scales := tuple(table.numbers("noise_scales"))),
        times=tuple(
            None if time == PROGRAMMED else time for time in table.numbers("times", (PROGRAMMED,), or_text=PROGRAMMED)
        ),
        bits=tuple(table.wholes("bits", (8,))),
        seeds=table.whole("seeds", 8, at_least=1),
        seed=table.whole("seed", 0, at_least=0, at_most=LARGEST_SEED),
        scoring_scale=table.number("scoring_scale", scoring_scale(scales) if scales else 1.0),
    )
    table.finish()
    return config


def _hardware(table: TomlTable, path: Path) -> HardwareConfig:
    calibration = table.text("calibration", "") or None
    input_range, range_k = table.text("input_range", "ema_std"), table.number("range_k", 12.0)
    if calibration is None:
        bound = 12.0 if input_range == "dynamic" else 3.0
    elif (input_range, range_k) == ("ema_std", 12.0):
        bound = stored_adc_bound(path.parent / calibration)
    else:
        raise table.error("calibration", "calibration holds the ranges: leave out input_range and range_k")
    config = HardwareConfig(
        calibration=calibration,
        input_range=input_range,
        range_k=range_k,
        adc_bound=table.number("adc_bound", bound),
        bound_axis=table.text("bound_axis", "tile"),
        tile_rows=table.whole("tile_rows", 512, at_least=1),
        drift_compensation=table.flag("drift_compensation", False),
        down_axis=table.text("down_axis", "hidden"),
    )
    table.finish()
    return config


def _execution(table: TomlTable) -> ExecutionConfig:
    config = ExecutionConfig(
        weights=table.text("weights", "stored"), implementation=table.text("implementation", "xla")
    )
    table.finish()
    return config


def _check(config: SweepConfig) -> None:
    """Raises InputError for values that need neither model nor text to be seen wrong."""
    grid, hardware = config.grid, config.hardware
    for fraction in grid.fractions:
        digital_count(fraction, 1)
    for name in ("devices", "noise_scales", "times", "bits"):
        if not getattr(grid, name):
            raise InputError(f"[grid] {name} is empty; give at least one value")
    if bool(grid.rules) != bool(grid.fractions):
        present, absent = ("rules", "fractions") if grid.rules else ("fractions", "rules")
        raise InputError(f"[grid] has {present} but no {absent}; a rule is evaluated at every fraction")
    if not grid.placements and not grid.rules:
        raise InputError("[grid] has neither placements nor rules; give at least one")
    if hardware.drift_compensation and grid.times == (None,):
        raise InputError("[hardware] drift_compensation needs a time in [grid] times: without one nothing drifts")
    if config.text.tokens is not None and config.text.tokens < config.text.seq:
        raise InputError(f"[text] tokens {config.text.tokens} is less than one window of seq {config.text.seq}")
    parse_dtype(config.dtype)
    check_down_axis(hardware.down_axis)
    hardware.range_method()
    execution = config.execution
    check_execution("[execution] ", execution.weights, execution.implementation, read_noise=False)
    for device in grid.devices:
        config.spec(device, grid.scoring_scale, None, grid.bits[0])
    for hardware_of_point in itertools.product(grid.devices, grid.noise_scales, grid.times, grid.bits):
        config.spec(*hardware_of_point)
