"""The analog side of one decoder layer, as the layer's code sees it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool

from hetmoe.analog.programming import ProgrammedMatrix, SeededMatrix, realise
from hetmoe.analog.read_noise import ReadDraw
from hetmoe.analog.spec import AnalogSpec
from hetmoe.models.matrices import MATRICES, Matrix, crossbar_matrices
from hetmoe.models.params import DenseLayer, Layer
from hetmoe.ops.grouped_crossbar.api import matrix_product
from hetmoe.parallel.shard import WHOLE, Shard

# (inputs [groups, rows, K], which rows are real, expert of each group) -> statistics per expert
Observer = Callable[[Array, Array, Array], Any]


class Probe:
    """Collects what an observer makes of the inputs of a layer's matrices, by site; without one it does nothing.

    `counted` says which tokens it is to see, None = all. Those that it is not to see go to no expert.
    """

    def __init__(self, observe: Observer | None, counted: Bool[Array, "tokens"] | None = None) -> None:
        self._observe, self.counted, self.seen = observe, counted, dict[str, Any]()

    @property
    def sees(self) -> bool:
        """Whether there is an observer."""
        return self._observe is not None

    def grouped(self, site: str, x: Array, real: Array, group: Array) -> None:
        """Inputs of experts: blocks `[groups, rows, K]`, which rows hold a token, and whose block it is."""
        if self._observe is not None:
            self.seen[site] = self._observe(x, real, group)

    def single(self, site: str, x: Array) -> None:
        """Inputs `[tokens, K]` of a matrix that every token goes through."""
        counted = jnp.ones((x.shape[0],), bool) if self.counted is None else self.counted
        self.grouped(site, x[None], counted[None], jnp.zeros((1,), jnp.int32))


@struct.dataclass
class LayerHardware:
    """One layer's slice of plan, programmed weights, ranges and read-noise key (scanned along with the weights)."""

    experts: Bool[Array, "experts"] | None  # None in a layer without experts
    dense: dict[str, Bool[Array, ""]]  # by module; a module that is absent is digital by structure
    programmed: dict[str, ProgrammedMatrix] | dict[str, SeededMatrix]
    ranges: dict[str, Array] | None  # by site; None = dynamic input ranges
    read_key: jax.Array | None
    spec: AnalogSpec
    implementation: str | None = struct.field(pytree_node=False)
    shard: Shard = struct.field(pytree_node=False, default=WHOLE)  # which experts and columns these are

    def program(self, layer: Layer | DenseLayer) -> "LayerHardware":
        """With the weights of this layer made from their keys."""
        clean = crossbar_matrices(layer)
        programmed = {
            name: realise(matrix, clean[name], self.spec, shard=self.shard) for name, matrix in self.programmed.items()
        }
        return dataclasses.replace(self, programmed=programmed)

    def input_range(self, name: str) -> Array | None:
        """DAC ranges of the inputs of a matrix; matrices that share an input share its converter."""
        return None if self.ranges is None else self.ranges[MATRICES[name].site]

    def read(self, name: str, rows: Array) -> ReadDraw | None:
        """Read noise for a matrix, or None; `rows` number its input vectors in the whole batch."""
        if self.spec.read_noise is None or self.read_key is None:
            return None
        key = jax.random.fold_in(self.read_key, Matrix[name.upper()])
        return ReadDraw(self.spec.read_noise, key, rows, self.shard)


def dense_matmul(x: Array, w: Array, name: str, hardware: LayerHardware | None) -> Array:
    """`x[tokens, K] @ w[K, N]` of a matrix outside the experts, digital or on its crossbar; in the dtype of `x`.

    On a mesh `w` has this device's columns, and so has the result.
    """
    module = MATRICES[name].module
    if hardware is None or module not in hardware.dense:
        return jnp.matmul(x, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32).astype(x.dtype)
    first = hardware.shard.first_token(x.shape[0]).astype(jnp.uint32)
    read = hardware.read(name, first + jnp.arange(x.shape[0], dtype=jnp.uint32))
    return matrix_product(
        x, w, hardware.programmed[name], analog=hardware.dense[module], input_range=hardware.input_range(name),
        spec=hardware.spec, read=read, implementation=hardware.implementation, shard=hardware.shard,
    ).astype(x.dtype)  # fmt: skip
