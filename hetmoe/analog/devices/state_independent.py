"""A pair whose programming noise and drift do not depend on the conductance."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.devices.pair import PowerLawPair


@dataclasses.dataclass(frozen=True, kw_only=True)
class StateIndependent(PowerLawPair):
    """aihwkit's generic model: constant programming noise and drift exponent.

    * programming: `sigma = 0.2 uS` at every conductance and for every `g_max_us`, clipped at zero conductance
    * drift: `nu = |0.1 + 0.05 z|`, t_0 = 20 s
    * read: standard deviation `1 uS * (g_D / g_max) sqrt(log((t + t_read) / (2 t_read)))`, that is a constant
      `Q = 1 uS / g_max`, t_read = 250 ns

    Differential pair, scale group: tile, g_max = 25 uS. Source: aihwkit `inference/noise/custom.py`,
    `StateIndependentNoiseModel` with its default arguments.
    """

    name: str = "state_independent"
    g_max_us: float = 25.0
    t_0_s: float = 20.0
    t_read_s: float = 250e-9

    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `DifferentialPair.programming_std`."""
        return jnp.full_like(g, 0.2)

    def drift_mean(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.drift_mean`."""
        return jnp.full_like(g, 0.1)

    def drift_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.drift_std`."""
        return jnp.full_like(g, 0.05)

    def read_q(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.read_q`."""
        return jnp.full_like(g, 1.0 / self.g_max_us)
