"""From weights and a key to what the crossbars really hold."""

import enum

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.devices import Stream, global_drift_compensation, group_range
from hetmoe.analog.random import matrix_normal, require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import block_max
from hetmoe.models.params import Params


class Matrix(enum.IntEnum):
    """Folded into the key; the numbers are part of what a seed means, so they never change."""

    GATE = 0
    UP = 1
    DOWN = 2
    Q = 3
    K = 4
    V = 5
    O = 6  # noqa: E741
    LM_HEAD = 7


@struct.dataclass
class ProgrammedMatrix:
    """Weights as programmed, noise and drift included, and the maxima that their ADCs use."""

    w: Float[Array, "*stack K N"]
    weight_max: Float[Array, "*stack tiles columns"]  # max|w| per tile (columns = 1) or per column


@struct.dataclass
class ProgrammedLayer:
    """Matrices of all layers, stacked on a leading axis; attention is None when no plan puts it on crossbars."""

    gate: ProgrammedMatrix
    up: ProgrammedMatrix
    down: ProgrammedMatrix
    q: ProgrammedMatrix | None
    k: ProgrammedMatrix | None
    v: ProgrammedMatrix | None
    o: ProgrammedMatrix | None


@struct.dataclass
class ProgrammedWeights:
    """What `forward` needs of the analog side for one noise seed."""

    layers: ProgrammedLayer
    lm_head: ProgrammedMatrix | None


def program_matrix(key: jax.Array, w: Float[Array, "K N"], spec: AnalogSpec, *, expert: Array | int) -> Array:
    """Programs one matrix; float32 [K, N].

    Args:
        key: already folded with the layer and the matrix.
        w: target weights.
        spec: device, noise scale, time.
        expert: folded in after the stream; 0 for matrices outside experts.

    The draw of element (i, j) of a stream depends on the key, the stream, the expert and `i * N + j` only.
    """

    def draw(stream: Stream) -> Array:
        return matrix_normal(jax.random.fold_in(jax.random.fold_in(key, stream), expert), (w.shape[0], w.shape[1]))

    device, tile_rows = spec.device, spec.options.tile_rows
    target = w.astype(jnp.float32)
    scale = group_range(target, device.scale_group, tile_rows)
    result = device.program(target, scale=scale, draw=draw, noise_scale=spec.noise_scale, time_s=spec.time_s)
    if spec.drift_compensation:
        return global_drift_compensation(result.initial, result.at_time, tile_rows)
    return result.at_time


def program(key: jax.Array, params: Params, spec: AnalogSpec, *, dense: bool) -> ProgrammedWeights:
    """Programs a model once: one noise seed.

    Every expert is programmed whatever the plan, so that one set of weights serves all placements; draws are float32,
    results are stored in the dtype of the weights.

    Args:
        key: the noise seed, a scalar threefry key.
        params: the model.
        spec: device and magnitudes.
        dense: also program attention and LM head (needed by plans that put them on crossbars).

    Raises:
        TypeError: if the key is not a threefry key.
    """
    key = require_key(key)
    per_column = spec.options.bound_axis == "column"

    def finish(w: Array, dtype: jnp.dtype) -> ProgrammedMatrix:
        stored = w.astype(dtype)
        maxima = block_max(stored.astype(jnp.float32), spec.options.tile_rows, per_column=per_column)
        return ProgrammedMatrix(w=stored, weight_max=maxima)

    def matrix_key(layer: Array | int, matrix: Matrix) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, layer), matrix)

    def experts(w: Array, layer: Array, matrix: Matrix) -> ProgrammedMatrix:
        base = matrix_key(layer, matrix)
        noisy = jax.vmap(lambda target, expert: program_matrix(base, target, spec, expert=expert))
        return finish(noisy(w, jnp.arange(w.shape[0])), w.dtype)

    def single(w: Array, layer: Array | int, matrix: Matrix) -> ProgrammedMatrix:
        return finish(program_matrix(matrix_key(layer, matrix), w, spec, expert=0), w.dtype)

    stack = params.layers

    def one_layer(index: Array) -> ProgrammedLayer:  # one layer at a time: the draws of all would be as large again
        layer = jax.tree.map(lambda leaf: leaf[index], stack)
        return ProgrammedLayer(
            gate=experts(layer.gate, index, Matrix.GATE),
            up=experts(layer.up, index, Matrix.UP),
            down=experts(layer.down, index, Matrix.DOWN),
            q=single(layer.q, index, Matrix.Q) if dense else None,
            k=single(layer.k, index, Matrix.K) if dense else None,
            v=single(layer.v, index, Matrix.V) if dense else None,
            o=single(layer.o, index, Matrix.O) if dense else None,
        )

    layers = stack.router.shape[0]
    head = params.embed.T if params.lm_head is None else params.lm_head
    return ProgrammedWeights(
        layers=jax.lax.map(one_layer, jnp.arange(layers)),
        lm_head=single(head, layers, Matrix.LM_HEAD) if dense else None,
    )
