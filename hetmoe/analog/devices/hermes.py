"""Phase-change memory of the IBM HERMES project chip."""

import abc
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.devices.base import polynomial
from hetmoe.analog.devices.pair import PowerLawPair


class Branches(NamedTuple):
    """`clip(slope log r + offset, low, high)` below `switch`, a polynomial in r (ascending) from there on.

    r is taken as at least 1e-7 in the logarithm.
    """

    switch: float
    slope: float
    offset: float
    low: float
    high: float
    coefficients: tuple[float, ...]

    def at(self, r: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Value at relative conductance `r`."""
        logarithm = jnp.log(jnp.maximum(r, 1e-7))
        below = jnp.clip(self.slope * logarithm + self.offset, self.low, self.high)
        return jnp.where(r < self.switch, below, polynomial(self.coefficients, r))


class Fit(NamedTuple):
    """Fits for one number of devices per weight polarity; `programming_us` in uS at `reference_us`."""

    reference_us: float
    programming_us: tuple[float, ...]
    drift_std: Branches
    read_q: Branches


_DRIFT_MEAN = Branches(0.0945, -0.0387, -0.0182, 0.0720, 0.13, (0.0736, -0.0126, -0.0436))
_TWO = Fit(
    20.7,
    (0.16603222, 4.71806468, -8.48101252, 4.68961419),
    Branches(0.3055, -0.0117, -0.0057, 0.0091, 0.04, (0.0073, 0.0093, -0.0118)),
    Branches(0.16, -0.0117, -0.0069, 0.015, 0.04, (0.0123, 0.0211, -0.0280, 0.0069)),
)
_ONE = Fit(
    10.35,
    (0.15781817, 2.32443916, -2.16310839, 0.68841818),
    Branches(0.3039, -0.0120, -0.0023, 0.0124, 0.04, (0.0104, 0.0116, -0.0165)),
    Branches(0.1591, -0.0078, 0.0038, 0.0179, 0.04, (0.0088, 0.0768, -0.1352, 0.0664)),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Hermes(PowerLawPair, abc.ABC):
    """Formulas shared by both unit cells, r = g / g_max."""

    t_read_s: float = 512e-9

    @property
    @abc.abstractmethod
    def _fit(self) -> Fit: ...

    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `DifferentialPair.programming_std`."""
        fit = self._fit
        return polynomial(fit.programming_us, g / self.g_max_us) * (self.g_max_us / fit.reference_us)

    def drift_mean(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.drift_mean`."""
        return _DRIFT_MEAN.at(g / self.g_max_us)

    def drift_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.drift_std`."""
        return self._fit.drift_std.at(g / self.g_max_us)

    def read_q(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """See `PowerLawPair.read_q`."""
        return self._fit.read_q.at(g / self.g_max_us)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hermes(_Hermes):
    """HERMES with two devices per polarity (Vasilopoulos et al., TED 2023), r = g / g_max.

    * programming: `sigma = (0.16603222 + 4.71806468 r - 8.48101252 r^2 + 4.68961419 r^3) uS * g_max / 20.7 uS`,
      clipped at zero conductance (sigma / g_max = 0.80 %, 4.79 %, 5.28 % at r = 0, 0.5, 1)
    * drift mean: `clip(-0.0387 log r - 0.0182, 0.0720, 0.13)` for r < 0.0945, else `0.0736 - 0.0126 r - 0.0436 r^2`
    * drift sd: `clip(-0.0117 log r - 0.0057, 0.0091, 0.04)` for r < 0.3055, else `0.0073 + 0.0093 r - 0.0118 r^2`;
      t_0 = 300 s
    * read: `Q = clip(-0.0117 log r - 0.0069, 0.015, 0.04)` for r < 0.16, else
      `0.0123 + 0.0211 r - 0.0280 r^2 + 0.0069 r^3`, r of the programmed conductance; t_read = 512 ns

    Differential pair, scale group: tile. Source: aihwkit `inference/noise/hermes.py`; Le Gallo et al. (Nature
    Electronics 2023), Khaddam-Aljameh et al. (JSSC 2022). The chip's dynamic mapping between the two devices is not
    modelled there, nor here. The factor g_max / 20.7 uS is applied for every `g_max_us`.
    """

    name: str = "hermes"
    g_max_us: float = 20.7
    t_0_s: float = 300.0

    @property
    def _fit(self) -> Fit:
        return _TWO


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hermes1(_Hermes):
    """HERMES with one device per polarity, r = g / g_max.

    * programming: `sigma = (0.15781817 + 2.32443916 r - 2.16310839 r^2 + 0.68841818 r^3) uS * g_max / 10.35 uS`,
      clipped at zero conductance (sigma / g_max = 1.52 %, 8.36 %, 9.73 % at r = 0, 0.5, 1)
    * drift mean: as for two devices
    * drift sd: `clip(-0.0120 log r - 0.0023, 0.0124, 0.04)` for r < 0.3039, else `0.0104 + 0.0116 r - 0.0165 r^2`;
      t_0 = 200 s
    * read: `Q = clip(-0.0078 log r + 0.0038, 0.0179, 0.04)` for r < 0.1591, else
      `0.0088 + 0.0768 r - 0.1352 r^2 + 0.0664 r^3`, r of the programmed conductance; t_read = 512 ns

    Differential pair, scale group: tile. Sources: as for two devices.
    """

    name: str = "hermes1"
    g_max_us: float = 10.35
    t_0_s: float = 200.0

    @property
    def _fit(self) -> Fit:
        return _ONE
