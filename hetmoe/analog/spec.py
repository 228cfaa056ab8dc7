"""What the analog hardware of a run is: device, noise magnitudes, converters."""

import dataclasses
import math

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.devices import Device, get_device
from hetmoe.analog.read_noise import ReadNoise
from hetmoe.errors import InputError
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions


@struct.dataclass
class AnalogSpec:
    """Analog hardware. Array fields may be swept, or mapped over, without recompiling; the rest is structure.

    Build it with `analog_spec`, which validates.
    """

    noise_scale: Float[Array, ""]  # c: multiplies the std of the programming noise
    adc_bound: Float[Array, ""]  # lambda: ADC bound = input range * lambda * max|w|
    time_s: Float[Array, ""] | None  # seconds from programming to reading; None = programming noise only
    read_noise: ReadNoise | None  # per-product noise; None = off
    device: Device = struct.field(pytree_node=False)
    options: CrossbarOptions = struct.field(pytree_node=False)
    drift_compensation: bool = struct.field(pytree_node=False)


def analog_spec(
    device: str | Device = "pcm",
    *,
    noise_scale: float = 1.0,
    time_s: float | None = None,
    drift_compensation: bool = False,
    dac_bits: int | None = 8,
    adc_bits: int | None = 8,
    adc_bound: float = 12.0,
    bound_axis: str = "tile",
    tile_rows: int = 512,
    read_noise: ReadNoise | None = None,
) -> AnalogSpec:
    """A validated `AnalogSpec`.

    Args:
        device: name from `hetmoe.analog.devices.DEVICES`, or a device.
        noise_scale: c >= 0.
        time_s: seconds after programming, or None. Devices fitted at fixed times accept those only.
        drift_compensation: scale every tile digitally so that its mean |weight| is again that at programming.
        dac_bits: DAC resolution; None = ideal.
        adc_bits: ADC resolution; None = ideal.
        adc_bound: lambda > 0, the ADC's bound over input range times weight maximum. The default suits dynamic input
            ranges; with calibrated ranges of 12 standard deviations (`RangeMethod`) 3 is better
            (`experiments/converter_ranges.py`).
        bound_axis: group of that weight maximum, `"tile"` or `"column"`.
        tile_rows: rows of a tile.
        read_noise: see `hetmoe.analog.read_noise`.

    Raises:
        InputError: naming the value that is out of range and what is allowed.
    """
    chosen = get_device(device) if isinstance(device, str) else device
    if not (math.isfinite(noise_scale) and noise_scale >= 0):
        raise InputError(f"noise_scale={noise_scale!r} must be a finite number of at least 0")
    if not (math.isfinite(adc_bound) and adc_bound > 0):
        raise InputError(f"adc_bound={adc_bound!r} must be positive and finite")
    if time_s is not None and not (math.isfinite(time_s) and time_s >= 0):
        raise InputError(f"time_s={time_s!r} must be a finite number of seconds of at least 0, or None")
    if drift_compensation and time_s is None:
        raise InputError("drift_compensation needs time_s: there is no drift to compensate right after programming")
    if time_s is not None and chosen.fixed_times_s is not None and time_s in chosen.fixed_times_s:
        # The source has one fit per time and nothing in between: the time is part of the device's structure.
        if drift_compensation:
            raise InputError(f"device {chosen.name!r} has fits at fixed times, not a drift that could be compensated")
        chosen, time_s = dataclasses.replace(chosen, fit_time_s=time_s), None
    elif time_s is not None and chosen.fixed_times_s is not None:
        times = ", ".join(f"{t:g}" for t in chosen.fixed_times_s)
        raise InputError(
            f"device {chosen.name!r} has fits at {times} s after programming only, not at time_s={time_s:g}"
        )
    chosen.check_time(time_s)
    options = CrossbarOptions(dac_bits=dac_bits, adc_bits=adc_bits, bound_axis=bound_axis, tile_rows=tile_rows)  # pyright: ignore[reportArgumentType]
    return AnalogSpec(
        noise_scale=jnp.asarray(noise_scale, jnp.float32),
        adc_bound=jnp.asarray(adc_bound, jnp.float32),
        time_s=None if time_s is None else jnp.asarray(time_s, jnp.float32),
        read_noise=read_noise,
        device=chosen,
        options=options,
        drift_compensation=drift_compensation,
    )


def describe(spec: AnalogSpec) -> dict[str, object]:
    """Plain values for provenance records."""
    return {
        "device": dataclasses.asdict(spec.device),
        "noise_scale": float(spec.noise_scale),
        "time_s": None if spec.time_s is None else float(spec.time_s),
        "drift_compensation": spec.drift_compensation,
        "adc_bound": float(spec.adc_bound),
        "read_noise": None if spec.read_noise is None else [spec.read_noise.kind, float(spec.read_noise.std)],
        **dataclasses.asdict(spec.options),
    }
