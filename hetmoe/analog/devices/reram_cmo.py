"""Filamentary CMO/HfOx resistive memory, one device per weight."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.devices.base import (
    Device,
    Draw,
    GroupRange,
    NoiseMoments,
    Programmed,
    Scalar,
    ScaleGroup,
    Stream,
    polynomial,
    relative,
)
from hetmoe.errors import InputError

_PROGRAMMING_US = {0.2: (0.00081107, 0.00106879), 2.0: (0.0112185391, 0.01129027418)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CMOReRAM(Device):
    """CMO/HfOx ReRAM of Falcone et al. (IBM Research Zurich); conductances g in uS.

    One device per weight, affine map over the tile: `min W -> 9 uS`, `max W -> 88.199997 uS`.

    * programming: `sigma = 0.00081107 + 0.00106879 g` (programmed to within 0.2 % of the target) or
      `0.0112185391 + 0.01129027418 g` (2 %), not clipped
    * relaxation at t > 0 s, independent of g: mean shift `-0.08900206 log t`, sd `0.41183342 + 0.04201137 log t`
    * read: sd `0.0277316483 log10(g) sqrt(log((t + 1 us) / (2 us)))`, g the relaxed conductance
    * after relaxation and read noise the conductance is clipped to [9, 88.199997] uS

    Where the fits would give a negative spread (t below 60 us) zero is used. log10(g) is taken as zero below 1 uS, 8 uS
    under the smallest target. At `time_s = 0` the programmed conductance is returned.

    Scale group: tile. A tile whose weights are all equal has no range to map and is returned as it is. Source: aihwkit
    `inference/noise/reram.py`, `ReRamCMONoiseModel`; there the default `acceptance_range=2e-2` matches neither key and
    0.2 % is what is used, so 0.2 % is the default here too.

    Attributes:
        acceptance_percent: 0.2 or 2, how near to the target the program-and-verify loop stops.

    Raises:
        InputError: for another acceptance.
    """

    name: str = "reram_cmo"
    scale_group: ScaleGroup = "tile"
    g_min_us: float = 9.0
    g_max_us: float = 88.199997
    acceptance_percent: float = 0.2
    t_read_s: float = 1e-6

    def __post_init__(self) -> None:
        if self.acceptance_percent not in _PROGRAMMING_US:
            raise InputError(
                f"acceptance_percent={self.acceptance_percent:g}: {self.name!r} has fits for 0.2 and 2 only"
            )

    @property
    def has_drift(self) -> bool:
        """True: drift and read noise are published."""
        return True

    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Standard deviation (uS) after programming at target `g` (uS)."""
        return polynomial(_PROGRAMMING_US[self.acceptance_percent], g)

    def relaxation_mean(self, time_s: Scalar) -> Float[Array, "..."]:
        """Mean shift (uS) at `time_s` > 0."""
        return -0.08900206 * jnp.log(time_s)

    def relaxation_std(self, time_s: Scalar) -> Float[Array, "..."]:
        """Spread (uS) of the shift at `time_s` > 0."""
        return jnp.maximum(0.04201137 * jnp.log(time_s) + 0.41183342, 0.0)

    def read_std(self, g: Float[Array, "*shape"], time_s: Scalar) -> Float[Array, "*shape"]:
        """Standard deviation (uS) of read noise at relaxed conductance `g` (uS)."""
        growth = jnp.log((time_s + self.t_read_s) / (2.0 * self.t_read_s))
        # The floor on growth keeps the gradient of its root finite.
        return 0.0277316483 * jnp.log10(jnp.maximum(g, 1.0)) * jnp.sqrt(jnp.maximum(growth, 1e-12))

    def program(
        self,
        w: Float[Array, "*batch K N"],
        *,
        scale: GroupRange,
        draw: Draw,
        noise_scale: Scalar,
        time_s: Scalar | None,
    ) -> Programmed:
        """See `Device.program`."""
        self.check_time(time_s)
        g, unit = self._mapped(w, scale)
        deviation = noise_scale * self.programming_std(g) * draw(Stream.PROGRAM_PLUS)
        initial = w + unit * deviation
        if time_s is None:
            return Programmed(initial, initial)
        started = jnp.asarray(time_s > 0)
        age = jnp.where(started, time_s, 1.0)
        shift = self.relaxation_mean(age) + self.relaxation_std(age) * draw(Stream.DRIFT_PLUS)
        read = self.read_std(g + (deviation + shift), age) * draw(Stream.READ_PLUS)
        total = jnp.clip(deviation + shift + read, self.g_min_us - g, self.g_max_us - g)
        return Programmed(initial, jnp.where(started, w + unit * total, initial))

    def programming_moments(
        self, w: Float[Array, "*batch K N"], *, scale: GroupRange, noise_scale: Scalar
    ) -> NoiseMoments:
        """See `Device.programming_moments`."""
        g, unit = self._mapped(w, scale)
        std = noise_scale * self.programming_std(g) * unit
        return NoiseMoments(mean=jnp.zeros_like(w), variance=jnp.square(std))

    def _mapped(self, w: Array, scale: GroupRange) -> tuple[Array, Array]:
        """(target conductances in uS, weight per uS)."""
        span = scale.high - scale.low
        g = self.g_min_us + (self.g_max_us - self.g_min_us) * relative(w - scale.low, span)
        return g, span / (self.g_max_us - self.g_min_us)
