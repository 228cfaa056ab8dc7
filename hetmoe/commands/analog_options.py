"""Options that say what the analog hardware is, shared by the commands that run it."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp

from hetmoe.analog.calibration import Calibration, RangeMethod
from hetmoe.analog.read_noise import make_read_noise
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.calibration_file import load_calibration
from hetmoe.evaluate.text import Windows
from hetmoe.models.model import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnalogOptions:
    """Device, noise, converters and ranges, named as on the command line."""

    device: str
    time_s: float | None
    drift_compensation: bool
    read_noise: float
    read_noise_kind: str
    input_range: str
    range_k: float
    adc_bound: float
    bound_axis: str
    dac_bits: int | None
    adc_bits: int | None
    tile_rows: int
    calibration_file: Path | None  # ranges from there instead of from text

    def check_hardware(self, noise_scales: list[float]) -> None:
        """Raises InputError for values that no hardware has."""
        for scale in noise_scales:
            self.spec(scale)
        if self.input_range != "dynamic":
            self.range_method()
        if self.calibration_file is not None and (self.input_range, self.range_k) != ("ema_std", 12.0):
            raise InputError("--calibration holds the input ranges: leave out --input-range and --range-k")

    def spec(self, noise_scale: float) -> AnalogSpec:
        """The analog hardware at one noise scale."""
        return analog_spec(
            self.device, noise_scale=noise_scale, time_s=self.time_s, drift_compensation=self.drift_compensation,
            dac_bits=self.dac_bits, adc_bits=self.adc_bits, adc_bound=self.adc_bound, bound_axis=self.bound_axis,
            tile_rows=self.tile_rows,
            read_noise=make_read_noise(self.read_noise_kind, self.read_noise) if self.read_noise != 0 else None,
        )  # fmt: skip

    def range_method(self) -> RangeMethod:
        """How DAC ranges are calibrated."""
        return RangeMethod(method=self.input_range, k=self.range_k)  # pyright: ignore[reportArgumentType]

    def calibration(self, model: Model, windows: Windows | None) -> Calibration | None:
        """DAC ranges from the file, or from text (else `windows` may be None); None where they are dynamic."""
        if self.calibration_file is not None:
            return load_calibration(self.calibration_file, model, self.bound_axis).calibration
        if self.input_range == "dynamic":
            return None
        assert windows is not None
        tokens = jnp.asarray(windows.tokens[:, :-1])
        return calibrate(
            model.params, tokens, model.config, self.range_method(), tile_rows=self.tile_rows, mesh=model.mesh
        )
