"""The phase-change memory fit of the analog foundation models."""

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

_FULL_SCALE = 180.0
_SWITCH = 52.5
_DROPPED_BELOW = 0.6
_LOW = (2.5797410660159494, 0.22419685954327148, -0.00371581208142707, 2.939751381126213e-05)
_HIGH = (2.110295720240385, 0.2453487119885723, -0.003054993405157235, 1.2329755395573392e-05)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AFM(Device):
    """PCM fit of the analog foundation models (arXiv 2505.09663), per output channel and input tile.

    `G = 180 W / max|W|` is a coordinate of the fit, its unit unpublished: only G / 180 matters. One signed draw per
    weight, no differential pair and no clipping: `W' = (G + c sigma(|G|) z) max|W| / 180`; the sign may flip.

    * |G| <= 52.5: `sigma = 2.5797411 + 0.22419686 |G| - 0.0037158121 |G|^2 + 2.9397514e-05 |G|^3`
    * |G| > 52.5: `sigma = 2.1102957 + 0.24534871 |G| - 0.0030549934 |G|^2 + 1.2329755e-05 |G|^3`
    * |G| < 0.6: the weight itself reads exactly 0, whatever its target. This is part of the noise model: it holds for
      every c > 0 and not at c = 0, where W' = W.

    sigma / 180 = 1.51 %, 3.75 %, 4.65 %, 4.69 %, 10.67 % at |G| = 0.6, 30, 52.5, 90, 180. No drift and no read noise
    are published.

    Scale group: column of an input tile (`max_inp_size=512` in the source's example); `scale_group="column"` is the
    source's form without tiles. Source: IBM/analog-foundation-models `apply_noise_model.py`, which rounds sigma to
    float16 and adds the smallest normal float16 to the maximum; neither is done here.

    Raises:
        InputError: from `program` for any `time_s`.
    """

    name: str = "afm"
    scale_group: ScaleGroup = "column_tile"

    def programming_std(self, g: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Standard deviation at `g = |G|`, both on the 0..180 scale; 0 below 0.6, where no draw is made."""
        fit = jnp.where(g <= _SWITCH, polynomial(_LOW, g), polynomial(_HIGH, g))
        return jnp.where(g < _DROPPED_BELOW, 0.0, fit)

    def program(
        self,
        w: Float[Array, "*batch K N"],
        *,
        scale: GroupRange,
        draw: Draw,
        noise_scale: Scalar,
        time_s: Scalar | None,
    ) -> Programmed:
        """See `Device.program`. For c > 0, weights with |G| < 0.6 become 0."""
        self.check_time(time_s)
        g = jnp.abs(relative(w, scale.largest)) * _FULL_SCALE
        deviation = noise_scale * self.programming_std(g) * draw(Stream.PROGRAM_PLUS)
        dropped = (g < _DROPPED_BELOW) & (noise_scale > 0)
        noisy = jnp.where(dropped, 0.0, w + (scale.largest / _FULL_SCALE) * deviation)
        return Programmed(noisy, noisy)

    def programming_moments(
        self, w: Float[Array, "*batch K N"], *, scale: GroupRange, noise_scale: Scalar
    ) -> NoiseMoments:
        """See `Device.programming_moments`."""
        g = jnp.abs(relative(w, scale.largest)) * _FULL_SCALE
        std = noise_scale * self.programming_std(g) * (scale.largest / _FULL_SCALE)
        dropped = (g < _DROPPED_BELOW) & (noise_scale > 0)
        return NoiseMoments(mean=jnp.where(dropped, -w, 0.0), variance=jnp.square(std))
