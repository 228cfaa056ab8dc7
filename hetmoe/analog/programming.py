"""From weights and a key to what the crossbars really hold."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.devices import GroupRange, Programmed, Stream, global_drift_compensation, group_range
from hetmoe.analog.random import require_key, rows_normal
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import block_max
from hetmoe.errors import InputError
from hetmoe.models.matrices import Matrix, crossbar_matrices
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.ops.narrow import take
from hetmoe.parallel.shard import WHOLE, Shard
from hetmoe.quantize.mixed import MixedMatrix, Places, is_mixed, unquantized

DRAWN_AT_ONCE = 2**22  # weights: enough for every core or multiprocessor
Programming = Literal["layer", "kernel"]


@struct.dataclass
class ProgrammedMatrix:
    """Weights as programmed, noise and drift included, and the maxima that their ADCs use."""

    w: Any  # [*stack, K, N]; beside quantized experts a `MixedMatrix` of those that are not
    weight_max: Float[Array, "*stack tiles columns"]  # max|w| per tile (columns = 1) or per column


@struct.dataclass
class ProgrammedWeights:
    """What `forward` needs of the analog side for one noise seed; matrices by name (`hetmoe.models.matrices`).

    Those of all layers of one kind are stacked on a leading axis; modules that were not programmed are absent.
    """

    layers: dict[str, ProgrammedMatrix]
    dense_layers: dict[str, ProgrammedMatrix]
    lm_head: ProgrammedMatrix | None


@struct.dataclass
class SeededMatrix:
    """A matrix that is programmed where it is used, with the values that `program` would have stored."""

    key: jax.Array  # of the seed, folded with the layer and the matrix; leading layer axis in a stack


@struct.dataclass
class SeededWeights:
    """One noise seed as its key: weights are programmed in the forward pass, anew in every call (`seeded_weights`)."""

    key: jax.Array
    dense: bool = struct.field(pytree_node=False)
    when: Programming = struct.field(pytree_node=False)


def seeded_weights(key: jax.Array, *, dense: bool, when: Programming) -> SeededWeights:
    """What `program` returns, as a key: the same weights, but never all of them at once.

    | programmed | memory beside the clean weights | programming is done |
    |---|---|---|
    | `program(...)` | all matrices, for every seed | once |
    | `when="layer"` | those of one layer | in every forward pass, layer by layer |
    | `when="kernel"` | one matrix; with `implementation="pallas"` none | in every forward pass, at every product |

    All draw the same noise. XLA differentiates it, where it depends on the weights, as the device model says; kernels
    that draw it take the difference to the clean weights as a constant.

    Under `jax.vmap` the memory of the last two is that for every seed. A kernel draws a weight once for all blocks of
    rows that it multiplies together on TPU, and once for every block (up to 128 rows) on a GPU: it is for few rows, as
    in decoding. The maxima that the ADCs need cost one more drawing.

    Args:
        key: the noise seed, a scalar threefry key (of several, one for each element of a `jax.vmap`).
        dense: also program what is outside the routed experts (needed by plans that put any of it on crossbars).
        when: `"layer"` or `"kernel"`.

    Raises:
        TypeError: if the key is not a threefry key.
        InputError: for another `when`.
    """
    if when not in ("layer", "kernel"):
        raise InputError(f"when={when!r} must be 'layer' or 'kernel'; program() stores all weights at once")
    return SeededWeights(key=require_key(key), dense=dense, when=when)


def program_matrix(
    key: jax.Array, w: Float[Array, "K N"], spec: AnalogSpec, *, expert: Array | int, shard: Shard = WHOLE
) -> Array:
    """Programs one matrix; float32 [K, N].

    Args:
        key: already folded with the layer and the matrix.
        w: target weights.
        spec: device, noise scale, time.
        expert: folded in after the stream; 0 for matrices outside experts.
        shard: which columns of the matrix `w` holds.

    The draw of element (i, j) of a stream depends on the key, the stream, the expert and `i * N + j` only, N being the
    columns of the whole matrix.
    """
    return as_read(drawn_matrix(key, w, spec, expert=expert, shard=shard), spec, shard)


def as_read(result: Programmed, spec: AnalogSpec, shard: Shard = WHOLE) -> Array:
    """What a drawn matrix is at the time of reading, drift compensation included; float32."""
    if spec.drift_compensation:
        return global_drift_compensation(result.initial, result.at_time, spec.options.tile_rows, shard)
    return result.at_time


def drawn_matrix(
    key: jax.Array, w: Float[Array, "K N"], spec: AnalogSpec, *, expert: Array | int, shard: Shard = WHOLE
) -> Programmed:
    """As `program_matrix`, but without drift compensation: right after programming, and at the time of reading."""
    count = w.shape[1]
    rows = jnp.arange(w.shape[0], dtype=jnp.uint32)
    columns = jnp.arange(count, dtype=jnp.uint32) + shard.first("tensor", count).astype(jnp.uint32)

    def draw(stream: Stream) -> Array:
        return rows_normal(stream_key(key, stream, expert), rows, count * shard.tensor, columns)

    device, target = spec.device, w.astype(jnp.float32)
    scale = group_range(target, device.scale_group, spec.options.tile_rows)
    if device.scale_group in {"tile", "matrix"}:  # of all columns; the other groups lie within one
        scale = GroupRange(shard.smallest_column(scale.low), shard.largest_column(scale.high))
    return device.program(target, scale=scale, draw=draw, noise_scale=spec.noise_scale, time_s=spec.time_s)


def stream_key(key: jax.Array, stream: Stream | int, expert: Array | int) -> jax.Array:
    """Key of one stream of one expert's matrix."""
    return jax.random.fold_in(jax.random.fold_in(key, stream), expert)


def program_named(
    key: jax.Array, name: str, w: Float[Array, "K N"], spec: AnalogSpec, *, layer: Array | int, expert: Array | int
) -> ProgrammedMatrix:
    """The matrix `name` of one layer (and expert) as `program` programs it for the seed `key`, in the dtype of `w`.

    `layer` is the number that `program` folds into the key.
    """
    return _stored(matrix_key(key, name, layer), w, spec, expert, WHOLE)


def matrix_key(key: jax.Array, name: str, layer: Array | int) -> jax.Array:
    """Key of the matrix `name` of a layer."""
    return jax.random.fold_in(jax.random.fold_in(key, layer), Matrix[name.upper()])


def _stored(key: jax.Array, w: Array, spec: AnalogSpec, expert: Array | int, shard: Shard) -> ProgrammedMatrix:
    return with_maxima(program_matrix(key, w, spec, expert=expert, shard=shard).astype(w.dtype), spec, shard)


def with_maxima(stored: Float[Array, "K N"], spec: AnalogSpec, shard: Shard = WHOLE) -> ProgrammedMatrix:
    """A programmed matrix, or some of its columns, with the maxima that its ADCs use."""
    per_column = spec.options.bound_axis == "column"
    maxima = block_max(stored.astype(jnp.float32), spec.options.tile_rows, per_column=per_column)
    return ProgrammedMatrix(w=stored, weight_max=maxima if per_column else shard.largest_column(maxima))


def realise(
    matrix: ProgrammedMatrix | SeededMatrix,
    w: Float[Array, "*experts K N"],
    spec: AnalogSpec,
    first: Array | int = 0,
    shard: Shard = WHOLE,
) -> ProgrammedMatrix:
    """The programmed weights of a matrix, or of the experts of a layer: those stored, or made from the key.

    `first` is the number of the first expert of `w`; `shard` says which experts and columns `w` holds.
    """
    if isinstance(matrix, ProgrammedMatrix):
        return matrix
    if w.ndim == 2:
        return _stored(matrix.key, w, spec, 0, shard)
    first += shard.first("expert", w.shape[0])
    return jax.lax.map(
        lambda item: _stored(matrix.key, item[0], spec, item[1], shard),
        (w, first + jnp.arange(w.shape[0])),
        batch_size=_at_once(*w.shape),
    )


def _program_mixed(key: jax.Array, name: str, mixed: MixedMatrix, spec: AnalogSpec, first: int) -> ProgrammedMatrix:
    """Experts that are not quantized, in a pool again, as `program` would program them in a model without quantization.

    The maxima of quantized experts are NaN.
    """
    pool, has_own = unquantized(mixed)
    if pool is None:  # all are quantized: a matrix of zeros stands for those that could be on crossbars
        pool = jnp.zeros((1, *mixed.shape[-2:]), mixed.dtype)
    count, experts = pool.shape[0], has_own.shape[-1]
    slot = jnp.where(has_own, mixed.places.slot, count)  # `count` is none of them
    owner = jnp.zeros((count,), jnp.int32).at[slot.reshape(-1)].set(jnp.arange(slot.size), mode="drop")
    layer, expert = jnp.divmod(owner, experts)
    found = jax.lax.map(
        lambda item: _stored(matrix_key(key, name, first + item[1]), item[0], spec, item[2], WHOLE),
        (pool, layer, expert),
        batch_size=_at_once(*pool.shape),
    )  # fmt: skip
    maxima = jnp.where(has_own[..., None, None], found.weight_max[jnp.minimum(slot, count - 1)], jnp.nan)
    places = Places(pool=jnp.zeros_like(slot), slot=jnp.minimum(slot, count - 1))
    return ProgrammedMatrix(w=MixedMatrix(pools=(found.w,), places=places), weight_max=maxima)


def _at_once(experts: int, rows: int, columns: int) -> int:
    """How many experts' matrices are drawn together: float32 draws of all are several times as large as the layer."""
    most = max(1, DRAWN_AT_ONCE // (rows * columns))
    return next(size for size in range(min(experts, most), 0, -1) if experts % size == 0)


def program(
    key: jax.Array, params: Params, spec: AnalogSpec, *, dense: bool, shard: Shard = WHOLE
) -> ProgrammedWeights:
    """Programs a model once: one noise seed.

    Every expert is programmed whatever the plan, so that one set of weights serves all placements; draws are float32,
    results are stored in the dtype of the weights. Keys number the layers with experts from 0 in model order, then the
    LM head, then the layers without experts.

    Args:
        key: the noise seed, a scalar threefry key.
        params: the model.
        spec: device and magnitudes.
        dense: also program attention, shared experts, dense layers and LM head (needed by plans that put any of them on
            crossbars).
        shard: which experts and columns `params` hold, inside a program for a mesh (`hetmoe.parallel`).

    Raises:
        TypeError: if the key is not a threefry key.
    """
    key = require_key(key)

    def one(name: str, w: Array, layer: Array | int) -> ProgrammedMatrix:
        return realise(SeededMatrix(key=matrix_key(key, name, layer)), w, spec, shard=shard)

    def stack(layers: Layer | DenseLayer, first: int) -> dict[str, ProgrammedMatrix]:
        everything = crossbar_matrices(layers, dense=dense)
        targets = {name: w for name, w in everything.items() if not is_mixed(w)}
        mixed = {name: _program_mixed(key, name, w, spec, first) for name, w in everything.items() if is_mixed(w)}
        if not targets:
            return mixed

        def one_layer(index: Array) -> dict[str, ProgrammedMatrix]:  # the draws of all would be as large again
            return {name: one(name, take(w, index), first + index) for name, w in targets.items()}

        return jax.lax.map(one_layer, jnp.arange(layers.input_norm.shape[0])) | mixed

    count = params.layers.input_norm.shape[0]
    head = params.embed.T if params.lm_head is None else params.lm_head
    return ProgrammedWeights(
        layers=stack(params.layers, 0),
        dense_layers={} if params.dense_layers is None else stack(params.dense_layers, count + 1),
        lm_head=one("lm_head", head, count) if dense else None,
    )
