"""Static DAC input ranges from the inputs that really reach each matrix.

The range of a row-block is `K * EMA(std)` of its inputs over calibration batches (arXiv 2603.02633; the range
initialisation of aihwkit-lightning), or a quantile, or the maximum, of their magnitude. An expert's statistics are
those of the tokens routed to it; an expert that saw too few takes those of its layer.
"""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.moments import BINS_PER_OCTAVE, LOWEST_OCTAVE, Moments
from hetmoe.errors import InputError

METHODS = ("ema_std", "quantile", "max")


@struct.dataclass
class Calibration:
    """DAC ranges of a whole model, in the unit of the inputs; made for one `tile_rows`.

    By site (`hetmoe.models.matrices`: matrices that read one input share its range), stacked over the layers of a kind:
    `[layers, experts, tiles]` for the sites of routed experts, `[layers, tiles]` for the others.
    """

    layers: dict[str, Float[Array, "..."]]
    dense_layers: dict[str, Float[Array, "layers tiles"]]
    lm_head: Float[Array, "tiles"]
    tokens_seen: Float[Array, "layers experts"]  # calibration tokens routed to each expert
    tile_rows: int = struct.field(pytree_node=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeMethod:
    """How statistics become a range.

    `k` multiplies the EMA (`decay`) of the standard deviation, `quantile` is of |x|. An expert that saw fewer than
    `min_tokens` tokens takes the range of all tokens of its layer, each counted once for every expert it went to.
    """

    method: Literal["ema_std", "quantile", "max"] = "ema_std"
    k: float = 12.0
    decay: float = 0.99
    quantile: float = 0.9999
    min_tokens: int = 32

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"calibration method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if not 0 < self.k < float("inf"):
            raise InputError(f"calibration k={self.k!r} must be positive and finite")
        if not 0 <= self.decay < 1:
            raise InputError(f"calibration decay={self.decay!r} must be within [0, 1)")
        if not 0 < self.quantile <= 1:
            raise InputError(f"calibration quantile={self.quantile!r} must be within (0, 1]")
        if type(self.min_tokens) is not int or self.min_tokens < 1:
            raise InputError(f"calibration min_tokens={self.min_tokens!r} must be a whole number of at least 1")


@struct.dataclass
class InputStatistics:
    """What calibration text did to every matrix input; ranges by any `RangeMethod` follow from it without the model.

    Moments by site, `[batches, layers, groups, tiles]` (the LM head without layers): groups are the experts for their
    sites, one for the others. Histograms are summed over the batches, `[1, ...]`, and there only if asked for.
    """

    layers: dict[str, Moments]
    dense_layers: dict[str, Moments]
    lm_head: Moments
    tokens_seen: Float[np.ndarray, "layers experts"]
    tile_rows: int = struct.field(pytree_node=False)


def input_ranges(
    moments: Moments, how: RangeMethod, few: np.ndarray | None = None
) -> Float[np.ndarray, "*layers groups tiles"]:
    """Ranges from the moments of batches `[batches, *layers, groups, tiles]`; float64.

    The EMA starts at a group's first batch with inputs and skips its batches without. Groups that are `few`
    (`[*layers, groups]`), and those that never got an input, take the range of all groups of their layer together.
    """
    unseen = np.sum(np.asarray(moments.count), axis=0)[..., 0] == 0
    shared = unseen if few is None else few | unseen
    return np.where(shared[..., None], _ranges(moments.pooled(), how), _ranges(moments, how))


def _ranges(moments: Moments, how: RangeMethod) -> np.ndarray:
    largest = np.max(np.asarray(moments.maximum, np.float64), axis=0)
    if how.method == "max":
        return largest
    if how.method == "quantile":
        if moments.histogram is None:
            raise InputError("calibration method 'quantile' needs statistics with histograms: collect them so")
        return np.minimum(_quantile(np.sum(np.asarray(moments.histogram, np.float64), axis=0), how.quantile), largest)
    counts, stds = np.asarray(moments.count), np.asarray(moments.std(), np.float64)
    mean, started = np.zeros(counts.shape[1:]), np.zeros(counts.shape[1:], bool)
    for count, std in zip(counts, stds, strict=True):
        mean = np.where(count > 0, np.where(started, how.decay * mean + (1 - how.decay) * std, std), mean)
        started |= count > 0
    return how.k * mean


def _quantile(histogram: np.ndarray, quantile: float) -> np.ndarray:
    """Upper edge of the bin that holds the quantile."""
    cumulative = np.cumsum(histogram, axis=-1)
    index = np.argmax(cumulative >= quantile * cumulative[..., -1:], axis=-1)
    return 2.0 ** ((index + 1) / BINS_PER_OCTAVE + LOWEST_OCTAVE)


def calibration_from(statistics: InputStatistics, how: RangeMethod) -> Calibration:
    """Ranges of all matrices.

    Raises:
        InputError: for inputs that were NaN or infinite, or a quantile of statistics without histograms.
    """
    few = statistics.tokens_seen < how.min_tokens

    def ranges(site: str, moments: Moments) -> Array:
        if site.startswith("experts"):
            return _array(input_ranges(moments, how, few))
        return _array(input_ranges(moments, how)[..., 0, :])

    return Calibration(
        layers={site: ranges(site, moments) for site, moments in statistics.layers.items()},
        dense_layers={site: ranges(site, moments) for site, moments in statistics.dense_layers.items()},
        lm_head=ranges("lm_head", statistics.lm_head),
        tokens_seen=_array(statistics.tokens_seen),
        tile_rows=statistics.tile_rows,
    )


def _array(values: np.ndarray) -> Array:
    if not np.isfinite(values).all():
        raise InputError(
            "calibration: inputs of some matrices are NaN or infinite: the weights are, or activations overflow"
        )
    return jnp.asarray(values, jnp.float32)
