"""The analog side of one decoder layer, as the layer's code sees it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from hetmoe.analog.calibration import LayerRanges
from hetmoe.analog.programming import Matrix, ProgrammedLayer, ProgrammedMatrix
from hetmoe.analog.read_noise import ReadNoise
from hetmoe.analog.spec import AnalogSpec
from hetmoe.ops.crossbar_matmul.xla import crossbar_matmul

# (inputs [groups, rows, K], which rows are real, expert of each group) -> statistics per expert
Observer = Callable[[Array, Array, Array], Any]


@struct.dataclass
class LayerHardware:
    """One layer's slice of plan, programmed weights, ranges and read-noise key (scanned along with the weights)."""

    experts: Bool[Array, "experts"]
    attention: Bool[Array, ""] | None
    programmed: ProgrammedLayer
    ranges: LayerRanges | None  # None = dynamic input ranges
    read_key: jax.Array | None
    spec: AnalogSpec

    def input_range(self, name: str) -> Array | None:
        """DAC ranges of the inputs of a matrix; matrices that share an input share its converter."""
        return None if self.ranges is None else self.ranges.of(name)

    def read(self, name: str, rows: Array) -> tuple[ReadNoise, jax.Array, Array] | None:
        """Read noise for a matrix, or None."""
        return _read(self.spec, self.read_key, Matrix[name.upper()], rows)


def _read(
    spec: AnalogSpec, key: jax.Array | None, matrix: Matrix, rows: Array
) -> tuple[ReadNoise, jax.Array, Array] | None:
    if spec.read_noise is None or key is None:
        return None
    return spec.read_noise, jax.random.fold_in(key, matrix), rows


def dense_matmul(x: Array, w: Array, name: str, hardware: LayerHardware | None) -> Array:
    """`x[tokens, K] @ w[K, N]` of an attention projection, digital or on its crossbar; in the dtype of `x`."""
    if hardware is None or hardware.attention is None:
        return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(x.dtype)
    programmed = getattr(hardware.programmed, name)
    rows = jnp.arange(x.shape[0], dtype=jnp.uint32)
    read = hardware.read(name, rows)
    return crossbar_or_digital(
        x, w, programmed, hardware.attention, hardware.input_range(name), hardware.spec, read
    ).astype(x.dtype)


def crossbar_or_digital(
    x: Array,
    w: Array,
    programmed: ProgrammedMatrix,
    analog: Array,
    input_range: Array | None,
    spec: AnalogSpec,
    read: tuple[ReadNoise, jax.Array, Array] | None,
) -> Array:
    """One matmul, by programmed weights through converters where the scalar `analog` is True; float32."""
    chosen = jnp.where(analog, programmed.w, w)
    return crossbar_matmul(
        x, chosen, input_range, spec.adc_bound, programmed.weight_max, spec.options, analog.reshape(1, 1), read
    )
