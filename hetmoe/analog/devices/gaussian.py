"""Plain Gaussian weight noise: relative to the largest weight of a column, or to the weight itself."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from hetmoe.analog.devices.base import Device, Draw, GroupRange, NoiseMoments, Programmed, Scalar, ScaleGroup, Stream


@dataclasses.dataclass(frozen=True, kw_only=True)
class Additive(Device):
    """`W' = W + c sigma_rel max|W| z`, the maximum over a column of an input tile; no clipping, no drift.

    Source: the additive model of IBM/analog-foundation-models `apply_noise_model.py`, whose multiplier is 0.05 and
    whose group is the output channel, cut into input tiles when a tile size is given (512 in its example).
    `scale_group="column"` is its form without tiles.

    Attributes:
        sigma_rel: standard deviation at c = 1 as a fraction of the maximum. With 1, c is the fraction itself.

    Raises:
        InputError: from `program` for any `time_s`.
    """

    name: str = "additive"
    scale_group: ScaleGroup = "column_tile"
    sigma_rel: float = 0.05

    def programming_std(self, largest: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Standard deviation of a weight, in its own unit, when `largest` is the maximum magnitude of its group."""
        return self.sigma_rel * largest

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
        noisy = w + noise_scale * self.programming_std(scale.largest) * draw(Stream.PROGRAM_PLUS)
        return Programmed(noisy, noisy)

    def programming_moments(
        self, w: Float[Array, "*batch K N"], *, scale: GroupRange, noise_scale: Scalar
    ) -> NoiseMoments:
        """See `Device.programming_moments`."""
        std = jnp.broadcast_to(noise_scale * self.programming_std(scale.largest), w.shape)
        return NoiseMoments(mean=jnp.zeros_like(w), variance=jnp.square(std))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Proportional(Device):
    """`W' = W + c sigma_rel |W| z`; no scale group, no clipping, no drift.

    The noise of theoretical work on analog mixture-of-experts, whose standard deviation is `c |W|`: hence
    `sigma_rel = 1`. A zero weight stays zero.

    Attributes:
        sigma_rel: standard deviation at c = 1 as a fraction of the weight.

    Raises:
        InputError: from `program` for any `time_s`.
    """

    name: str = "proportional"
    scale_group: ScaleGroup = "none"
    sigma_rel: float = 1.0

    def programming_std(self, w: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Standard deviation of a weight, in its own unit, at target `w`."""
        return self.sigma_rel * jnp.abs(w)

    def program(
        self,
        w: Float[Array, "*batch K N"],
        *,
        scale: GroupRange,
        draw: Draw,
        noise_scale: Scalar,
        time_s: Scalar | None,
    ) -> Programmed:
        """See `Device.program`. `scale` is not used."""
        del scale  # Unused.
        self.check_time(time_s)
        noisy = w + noise_scale * self.programming_std(w) * draw(Stream.PROGRAM_PLUS)
        return Programmed(noisy, noisy)

    def programming_moments(
        self, w: Float[Array, "*batch K N"], *, scale: GroupRange, noise_scale: Scalar
    ) -> NoiseMoments:
        """See `Device.programming_moments`."""
        del scale  # Unused.
        return NoiseMoments(mean=jnp.zeros_like(w), variance=jnp.square(noise_scale * self.programming_std(w)))
