"""Phase-change memory, the usual model of the field."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.devices.base import polynomial
from hetmoe.analog.devices.pair import PowerLawPair

_REFERENCE_US = 25.0
_PROGRAMMING_US = (0.26348, 1.9650, -1.1731)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PCM(PowerLawPair):
    """PCM of Nandakumar et al. (ICECS 2019) and Joshi et al. (Nature Communications 2020), with r = g / g_max.

    * programming: `sigma = (0.26348 + 1.9650 r - 1.1731 r^2) uS * g_max / 25 uS`, clipped at zero conductance
      (sigma / g_max = 1.05 %, 3.81 %, 4.22 % at r = 0, 0.5, 1)
    * drift: r >= 1e-7, `mu = clip(-0.0155 log r + 0.0244, 0.049, 0.1)`,
      `sd = clip(-0.0125 log r - 0.0059, 0.008, 0.045)`, t_0 = 20 s
    * read: `Q = min(0.2, 0.0088 / max(r^0.65, 1e-3))` with r of the programmed conductance (the published text says
      target; aihwkit's code uses the programmed one, its issue 436), t_read = 250 ns

    Differential pair, scale group: tile. Source: aihwkit `inference/noise/pcm.py`. The factor g_max / 25 uS is applied
    for every `g_max_us`.
    """

    name: str = "pcm"
    g_max_us: float = 25.0
    t_0_s: float = 20.0
    t_read_s: float = 250e-9

    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `DifferentialPair.programming_std`."""
        return polynomial(_PROGRAMMING_US, g / self.g_max_us) * (self.g_max_us / _REFERENCE_US)

    def drift_mean(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.drift_mean`."""
        return jnp.clip(-0.0155 * _log_relative(g / self.g_max_us) + 0.0244, 0.049, 0.1)

    def drift_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.drift_std`."""
        return jnp.clip(-0.0125 * _log_relative(g / self.g_max_us) - 0.0059, 0.008, 0.045)

    def read_q(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.read_q`."""
        # The floor on r**0.65 is put on r itself: the same values, but a finite gradient at g = 0.
        r = jnp.maximum(g / self.g_max_us, 1e-3 ** (1 / 0.65))
        return jnp.minimum(0.0088 * r**-0.65, 0.2)


def _log_relative(r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    return jnp.log(jnp.maximum(r, 1e-7))
