"""What every noise model of a memory device offers: weights in, programmed weights out.

Structure (mapping, fits, tile group) is static; magnitudes (noise scale, time) are traced, so that one compile serves a
sweep. Draws come from outside, one independent standard normal per weight and `Stream`.
"""

import abc
import dataclasses
import enum
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hetmoe.analog.tiles import row_blocks, spread_rows
from hetmoe.errors import InputError

ScaleGroup = Literal["tile", "column_tile", "column", "matrix", "none"]
Scalar = Float[Array, "..."] | float | int
"""A number; inside kernels, where a scalar unit lacks the functions of the fits, repeated to the weights' shape."""


class Stream(enum.IntEnum):
    """Number folded into the key: one independent draw per weight each.

    A device without a pair uses the plus streams only. The relaxation of CMO/HfOx uses `DRIFT_PLUS`.
    """

    PROGRAM_PLUS = 0
    PROGRAM_MINUS = 1
    DRIFT_PLUS = 2
    DRIFT_MINUS = 3
    READ_PLUS = 4
    READ_MINUS = 5


Draw = Callable[[Stream], Float[Array, "..."]]
"""Standard normals, float32, of the weights' shape."""


class GroupRange(NamedTuple):
    """Smallest and largest weight of each weight's scale group, each broadcastable to the weights."""

    low: Float[Array, "..."]
    high: Float[Array, "..."]

    @property
    def largest(self) -> Float[Array, "..."]:
        """`max |w|` of the group."""
        return jnp.maximum(-self.low, self.high)


class Programmed(NamedTuple):
    """Weights on the crossbar, in the unit of the target weights."""

    initial: Float[Array, "..."]
    """With programming noise only; what drift compensation takes as its reference."""

    at_time: Float[Array, "..."]
    """With drift and read noise at the time asked for; `initial` itself when no time was given."""


class NoiseMoments(NamedTuple):
    """Mean and variance of `W' - W` of every weight, in the unit of the weights and its square."""

    mean: Float[Array, "..."]
    variance: Float[Array, "..."]


def group_range(w: Float[Array, "*batch K N"], group: ScaleGroup, tile_rows: int) -> GroupRange:
    """Range of the weights that share one scale, computed per matrix (leading axes are never mixed).

    Args:
        w: weights, input x output.
        group: `"tile"` (row-block x all columns), `"column_tile"` (row-block x one column), `"column"`, `"matrix"`, or
            `"none"` (the device uses no scale; zeros are returned).
        tile_rows: most rows of a tile; row-blocks are balanced (`hetmoe.analog.tiles.row_blocks`).

    Returns:
        Two arrays of w's rank: `[..., K or 1, N or 1]`.

    Raises:
        InputError: for an unknown group.
    """
    match group:
        case "tile":
            return GroupRange(*(_per_block(reduce, w, tile_rows, (-2, -1)) for reduce in (jnp.min, jnp.max)))
        case "column_tile":
            return GroupRange(*(_per_block(reduce, w, tile_rows, (-2,)) for reduce in (jnp.min, jnp.max)))
        case "column":
            return GroupRange(jnp.min(w, axis=-2, keepdims=True), jnp.max(w, axis=-2, keepdims=True))
        case "matrix":
            return GroupRange(jnp.min(w, axis=(-2, -1), keepdims=True), jnp.max(w, axis=(-2, -1), keepdims=True))
        case "none":
            zeros = jnp.zeros((1,) * w.ndim, w.dtype)
            return GroupRange(zeros, zeros)
    raise InputError(f"unknown scale group {group!r}: use tile, column_tile, column, matrix or none")


def _per_block(reduce: Callable[..., Array], w: Array, tile_rows: int, axes: tuple[int, ...]) -> Array:
    """Reduces every row-block over `axes` and repeats the result for each of its rows."""
    rows = w.shape[-2]
    parts = [
        reduce(w[..., start : start + size, :], axis=axes, keepdims=True) for start, size in row_blocks(rows, tile_rows)
    ]
    return spread_rows(jnp.concatenate(parts, axis=-2), rows, tile_rows, axis=-2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device(abc.ABC):
    """A published noise model. Hashable: a static argument of jitted functions.

    Attributes:
        name: key of the registry.
        scale_group: the weights whose largest magnitude sets the conductance scale, as the source says.
        fixed_times_s: seconds after programming at which the source has a fit, when it has no model in between; then
            the device has a field `fit_time_s` to choose one, and `time_s` stays None.
    """

    name: str
    scale_group: ScaleGroup
    fixed_times_s: tuple[float, ...] | None = None

    @property
    def has_drift(self) -> bool:
        """Whether `program` takes a time."""
        return False

    @abc.abstractmethod
    def program(
        self,
        w: Float[Array, "*batch K N"],
        *,
        scale: GroupRange,
        draw: Draw,
        noise_scale: Scalar,
        time_s: Scalar | None,
    ) -> Programmed:
        """Programs target weights and reads them at once, or after `time_s` seconds.

        A group of zeros gives exact zeros. `noise_scale=0` with `time_s=None` gives exactly `w`.

        Args:
            w: target weights, float32.
            scale: range of `scale_group`, from `group_range`; it must contain `w`.
            draw: gives the normals of a stream; called once per stream needed.
            noise_scale: c >= 0, multiplies the standard deviation of programming noise (not of drift or read noise).
            time_s: seconds >= 0 after programming; None = programming noise only.

        Raises:
            InputError: for a time given to a device without a drift model.
        """

    @abc.abstractmethod
    def programming_moments(
        self, w: Float[Array, "*batch K N"], *, scale: GroupRange, noise_scale: Scalar
    ) -> NoiseMoments:
        """Exact moments of `program(...).initial - w`, clipping included; of independent weights, both of w's shape."""

    def check_time(self, time_s: Scalar | None) -> None:
        """Refuses a time where the source publishes no drift.

        Raises:
            InputError: naming the valid times, if there are any.
        """
        if time_s is None or self.has_drift:
            return
        if self.fixed_times_s is None:
            raise InputError(f"device {self.name!r}: its source publishes no drift; pass time_s=None")
        times = ", ".join(f"{time:g}" for time in self.fixed_times_s)
        raise InputError(
            f"device {self.name!r} has fits at {times} s after programming only: pass time_s=None and choose one with "
            "dataclasses.replace(device, fit_time_s=...)"
        )


def polynomial(coefficients: tuple[float, ...], x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`sum_i coefficients[i] x**i` by Horner's rule; ascending powers."""
    value = jnp.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = value * x + coefficient
    return value


def relative(w: Float[Array, "..."], largest: Float[Array, "..."]) -> Float[Array, "..."]:
    """`w / largest`, and 0 in a group of zeros."""
    tiny = float(np.finfo(np.float32).tiny)
    return w / jnp.where(largest >= tiny, largest, 1.0)
