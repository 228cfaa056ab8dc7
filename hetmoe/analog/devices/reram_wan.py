"""Resistive memory of the NeuRRAM chip (Wan et al. 2022)."""

import dataclasses

from jaxtyping import Array, Float

from hetmoe.analog.devices.base import polynomial
from hetmoe.analog.devices.pair import DifferentialPair
from hetmoe.errors import InputError

_REFERENCE_US = 40.0
_SECOND, _DAY, _TWO_DAYS = 1.0, 86400.0, 172800.0
_PROGRAMMING_US = {
    _SECOND: (0.348, 16.030, -43.853, 45.393, -16.815),
    _DAY: (0.701, 22.086, -50.773, 47.095, -16.458),
    _TWO_DAYS: (0.782, 20.274, -43.507, 37.062, -11.934),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WanReRAM(DifferentialPair):
    """ReRAM of Wan et al. (Nature 2022): one spread per time, no drift exponent; r = g / g_max.

    `sigma = p(r) uS * g_max / 40 uS`, clipped at zero conductance, where p is

    * 1 s: `0.348 + 16.030 r - 43.853 r^2 + 45.393 r^3 - 16.815 r^4`
    * 1 day: `0.701 + 22.086 r - 50.773 r^2 + 47.095 r^3 - 16.458 r^4`
    * 2 days: `0.782 + 20.274 r - 43.507 r^2 + 37.062 r^3 - 11.934 r^4`

    The fit of `fit_time_s` replaces the others: it is the whole spread around the target at that time, so `noise_scale`
    multiplies it. The published data hold no read noise; the source advises extra weight noise of about 1 %.

    Differential pair, scale group: tile. Source: aihwkit `inference/noise/reram.py`, `ReRamWan2022NoiseModel`. There
    the factor g_max / 40 uS is never applied and g_max is 25 uS by default, so that its relative noise is 40/25 times
    too large (8.09 % instead of 5.06 % at r = 0.5); here the factor is applied, and sigma / g_max does not depend on
    `g_max_us`.

    Attributes:
        fit_time_s: 1, 86400 or 172800 seconds after programming.

    Raises:
        InputError: for another fit time; from `program` for any `time_s`.
    """

    name: str = "reram_wan"
    g_max_us: float = 40.0
    fixed_times_s: tuple[float, ...] | None = (_SECOND, _DAY, _TWO_DAYS)
    fit_time_s: float = _SECOND

    def __post_init__(self) -> None:
        if self.fit_time_s not in _PROGRAMMING_US:
            times = ", ".join(f"{time:g}" for time in _PROGRAMMING_US)
            raise InputError(f"fit_time_s={self.fit_time_s:g} s: {self.name!r} has fits at {times} s only")

    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `DifferentialPair.programming_std`."""
        return polynomial(_PROGRAMMING_US[self.fit_time_s], g / self.g_max_us) * (self.g_max_us / _REFERENCE_US)
