"""Differential pair: a weight is the difference of two conductances, each programmed, drifting and read on its own."""

import abc
import dataclasses
import math

import jax
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
    relative,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DifferentialPair(Device, abc.ABC):
    """Two devices per weight, `g+ = max(s W, 0)` and `g- = max(-s W, 0)` with `s = g_max / max|W|` over the tile.

    Both devices get noise, so a zero weight gets two half-clipped draws of the spread at zero conductance:
    `g' = max(0, g + c sigma(g) z)` and `W' = (g+' - g-') / s`. Clipping pulls weights toward zero: the idle device of
    the pair reads `c sigma(0) / sqrt(2 pi)` on average.

    Source of the mapping: aihwkit, `inference/converter/conductance.py`, single pair with g_min = 0.

    Attributes:
        g_max_us: largest conductance, uS.
    """

    scale_group: ScaleGroup = "tile"
    g_max_us: float

    @abc.abstractmethod
    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Standard deviation (uS) of the conductance after programming, before clipping, at target `g` (uS)."""

    def conductance_at(
        self,
        g: Float[Array, "*shape"],
        g_programmed: Float[Array, "*shape"],
        *,
        time_s: Scalar,
        drift_normal: Float[Array, "*shape"],
        read_normal: Float[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        """Conductance (uS) read `time_s` seconds after programming, for target `g` and programmed `g_programmed`."""
        raise NotImplementedError(f"device {self.name!r} has no drift model")

    def program(
        self,
        w: Float[Array, "*batch K N"],
        *,
        scale: GroupRange,
        draw: Draw,
        noise_scale: Scalar,
        time_s: Scalar | None,
    ) -> Programmed:
        """See `Device.program`. The censored deviation `max(c sigma z, -g)` is added to the target, exact at c = 0."""
        self.check_time(time_s)
        g = relative(w, scale.largest) * self.g_max_us
        plus, minus = jnp.maximum(g, 0.0), jnp.maximum(-g, 0.0)
        d_plus = _censored(plus, noise_scale * self.programming_std(plus) * draw(Stream.PROGRAM_PLUS))
        d_minus = _censored(minus, noise_scale * self.programming_std(minus) * draw(Stream.PROGRAM_MINUS))
        unit = scale.largest / self.g_max_us
        initial = w + unit * (d_plus - d_minus)
        if time_s is None:
            return Programmed(initial, initial)
        read_plus = self.conductance_at(
            plus,
            plus + d_plus,
            time_s=time_s,
            drift_normal=draw(Stream.DRIFT_PLUS),
            read_normal=draw(Stream.READ_PLUS),
        )
        read_minus = self.conductance_at(
            minus,
            minus + d_minus,
            time_s=time_s,
            drift_normal=draw(Stream.DRIFT_MINUS),
            read_normal=draw(Stream.READ_MINUS),
        )
        return Programmed(initial, unit * (read_plus - read_minus))

    def programming_moments(
        self, w: Float[Array, "*batch K N"], *, scale: GroupRange, noise_scale: Scalar
    ) -> NoiseMoments:
        """See `Device.programming_moments`: the difference of two censored Gaussians."""
        g = relative(w, scale.largest) * self.g_max_us
        plus, minus = jnp.maximum(g, 0.0), jnp.maximum(-g, 0.0)
        of_plus = _censored_moments(plus, noise_scale * self.programming_std(plus))
        of_minus = _censored_moments(minus, noise_scale * self.programming_std(minus))
        unit = scale.largest / self.g_max_us
        return NoiseMoments(
            mean=unit * (of_plus.mean - of_minus.mean),
            variance=jnp.square(unit) * (of_plus.variance + of_minus.variance),
        )


def _censored_moments(g: Float[Array, "*shape"], std: Float[Array, "*shape"]) -> NoiseMoments:
    """Moments of `max(std z, -g)` for a standard normal z.

    With a = g / std: mean `std (phi(a) - a Phi(-a))` and second moment `std^2 (Phi(a) - a phi(a) + a^2 Phi(-a))`, the
    partial moments of a normal distribution.
    """
    positive = std > 0
    a = jnp.where(positive, jnp.minimum(g / jnp.where(positive, std, 1.0), 1e3), 1e3)  # 1e3: nothing is censored
    density, below, above = jax.scipy.stats.norm.pdf(a), jax.scipy.stats.norm.cdf(a), jax.scipy.stats.norm.sf(a)
    mean = density - a * above
    second = below - a * density + jnp.square(a) * above
    return NoiseMoments(mean=std * mean, variance=jnp.square(std) * (second - jnp.square(mean)))


def _censored(g: Float[Array, "*shape"], deviation: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Deviation of `max(0, g + deviation)` from g."""
    return jnp.maximum(deviation, -g)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerLawPair(DifferentialPair, abc.ABC):
    """A pair whose devices drift by a power law and have 1/f read noise.

    * drift: `nu = |mu(g) + sd(g) z|` with g the target, `g_D = g_P ((time + t_0) / t_0)**-nu`
    * read: `g' = max(0, g_D + g_D Q(g_P) sqrt(log((t + t_read) / (2 t_read))) z)`, `t = time + t_0`

    Each device of the pair drifts from its own programmed conductance g_P (aihwkit `BaseNoiseModel.apply_noise`;
    aihwkit's tiles instead split the programmed difference into a fresh pair, rescaled to its new maximum).

    Attributes:
        t_0_s: age of the device at `time_s = 0`, the first reading, in seconds.
        t_read_s: time of one read, in seconds.
    """

    t_0_s: float
    t_read_s: float

    @property
    def has_drift(self) -> bool:
        """True: drift and read noise are published."""
        return True

    @abc.abstractmethod
    def drift_mean(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Mean mu of the drift exponent (before its absolute value) at target `g` (uS)."""

    @abc.abstractmethod
    def drift_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Standard deviation of the drift exponent (before its absolute value) at target `g` (uS)."""

    @abc.abstractmethod
    def read_q(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Relative 1/f noise Q at programmed conductance `g` (uS)."""

    def drift_factor(self, nu: Float[Array, "*shape"], time_s: Scalar) -> Float[Array, "*shape"]:
        """`((time_s + t_0) / t_0)**-nu`."""
        return jnp.exp(-nu * jnp.log1p(time_s / self.t_0_s))

    def read_growth(self, time_s: Scalar) -> Float[Array, "..."]:
        """`sqrt(log((t + t_read) / (2 t_read)))` with `t = time_s + t_0`."""
        age = time_s + self.t_0_s
        return jnp.sqrt(jnp.log(age + self.t_read_s) - math.log(2.0 * self.t_read_s))

    def conductance_at(
        self,
        g: Float[Array, "*shape"],
        g_programmed: Float[Array, "*shape"],
        *,
        time_s: Scalar,
        drift_normal: Float[Array, "*shape"],
        read_normal: Float[Array, "*shape"],
    ) -> Float[Array, "*shape"]:
        """See `DifferentialPair.conductance_at`."""
        nu = jnp.abs(self.drift_mean(g) + self.drift_std(g) * drift_normal)
        drifted = g_programmed * self.drift_factor(nu, time_s)
        noise = self.read_q(g_programmed) * self.read_growth(time_s) * read_normal
        return jnp.maximum(drifted + drifted * noise, 0.0)
