"""From stored tensors to parameters: each straight to its dtype, its layout and its place on the devices."""

import dataclasses
import math
import mmap
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from hetmoe.checkpoint.fp8 import SUFFIX, dequantize
from hetmoe.checkpoint.match import match
from hetmoe.checkpoint.packed_tensors import PackedMatrix, read_pool
from hetmoe.checkpoint.pieces import Piece, checkpoint_keys
from hetmoe.checkpoint.safetensors_file import DTYPES
from hetmoe.checkpoint.storage import Storage
from hetmoe.checkpoint.weight_files import WeightFiles
from hetmoe.errors import CheckpointWarning, InputError
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Params
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.layout import QuantizedLayout
from hetmoe.quantize.mixed import MixedMatrix, make_mixed

_HUGE = 1 << 21  # bytes of a huge page
_BAND = 1 << 24  # bytes that are turned at once
_COUNTED = 1 << 19  # values that are looked at for NaN at once


def read_params(
    files: WeightFiles, config: ModelConfig, storage: Storage, dtype: Any, shardings: Params | None
) -> Params:
    """Reads every tensor into the parameter tree of `config`.

    Args:
        files: the checkpoint.
        config: what it must hold.
        storage: how it is stored.
        dtype: of the parameters; None = as stored or, if that is mixed, as config.json says.
        shardings: where each leaf goes, None = the default device. Only the parts that this process holds are read.

    Raises:
        InputError: see `match`; also for a mixture of dtypes of which config.json does not say what it should become,
            and for quantized experts that are to be sharded.
    """
    tree = abstract_params(config)
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    quantized: dict[Leaf, str] = {getattr(tree.layers.moe.experts, name): name for name in EXPERT_MATRICES}
    if storage.layout is not None and shardings is not None:
        raise InputError(f"{files.directory}: quantized experts cannot be spread over a mesh: load them without one")
    pieces = match(leaves, config, files, storage)
    dtype = target_dtype(files, dict(zip(leaves, pieces, strict=True)), storage, dtype)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        places: list[Any] = [here] * len(leaves)
    else:
        places = jax.tree.leaves(shardings)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        reader = _Reader(files, storage, pool)
        arrays = [
            _mixed(reader, quantized[leaf], leaf, group, storage.layout, np.dtype(dtype), place)
            if storage.layout is not None and leaf in quantized
            else reader.leaf(leaf, group, np.dtype(leaf.dtype(dtype)), place)
            for leaf, group, place in zip(leaves, pieces, places, strict=True)
        ]
    warn_of_non_finite(files.directory, reader.non_finite)
    return jax.tree.unflatten(treedef, arrays)


def _mixed(
    reader: "_Reader",
    name: str,
    leaf: Leaf,
    plain: list[Piece],
    layout: QuantizedLayout,
    dtype: np.dtype,
    place: jax.sharding.Sharding,
) -> MixedMatrix:
    """A matrix of the experts in its pools; `plain` are the tensors of those that are not quantized."""
    keys = {piece.index: piece for piece in checkpoint_keys(leaf)}
    pools: list[Any] = []
    pool_of = np.empty(leaf.shape[:2], np.int64)
    for number, (grid, where) in enumerate(layout.pools(name)):
        pool_of[tuple(where.T)] = number
        if grid is None:
            stack = dataclasses.replace(leaf, shape=(len(plain), *leaf.shape[2:]))
            pieces = [dataclasses.replace(piece, index=(slot,)) for slot, piece in enumerate(plain)]
            pools.append(reader.leaf(stack, pieces, dtype, place))
        else:
            matrix = PackedMatrix(grid, *leaf.shape[2:])
            pools.append(read_pool(reader.files, [keys[tuple(index)] for index in where.tolist()], matrix))
    return make_mixed(pools, pool_of)


def target_dtype(files: WeightFiles, pieces: dict[Leaf, list[Piece]], storage: Storage, dtype: Any) -> np.dtype:
    """The dtype of the parameters: as asked for, else as stored, else as config.json says.

    Raises:
        InputError: for a mixture of dtypes of which config.json does not say what it should become.
    """
    if dtype is not None:
        return np.dtype(dtype)
    stored = {files.tensors[p.key].dtype: p.key for leaf, group in pieces.items() if not leaf.float32 for p in group}
    if len(stored) == 1 and stored.keys() <= {"F32", "BF16", "F16"}:
        return DTYPES[next(iter(stored))]
    if storage.dtype is not None:
        return np.dtype(storage.dtype)
    found = ", ".join(f"{name} ({key})" for name, key in sorted(stored.items()))
    raise InputError(f"{files.directory}: stored as {found}, and config.json names no dtype; choose one with dtype=")


def load_leaf(files: WeightFiles, storage: Storage, leaf: Leaf, pieces: list[Piece], dtype: np.dtype) -> np.ndarray:
    """One leaf alone, in host memory."""
    with ThreadPoolExecutor(1) as pool:
        return _Reader(files, storage, pool).region(leaf, pieces, dtype, [range(n) for n in leaf.shape])


class _Reader:
    """Fills arrays from the pieces of leaves, several pieces at a time."""

    def __init__(self, files: WeightFiles, storage: Storage, pool: ThreadPoolExecutor) -> None:
        self.files, self.storage, self.pool = files, storage, pool
        self.non_finite: dict[str, int] = {}  # by key
        self._lock = threading.Lock()

    def leaf(self, leaf: Leaf, pieces: list[Piece], dtype: np.dtype, sharding: jax.sharding.Sharding) -> jax.Array:
        """One array of the parameter tree, on its devices."""

        def part(index: Any) -> np.ndarray:
            bounds = [s.indices(n) for s, n in zip(index, leaf.shape, strict=True)]
            return self.region(leaf, pieces, dtype, [range(a, b) for a, b, _ in bounds])

        return jax.make_array_from_callback(leaf.shape, sharding, part)

    def region(self, leaf: Leaf, pieces: list[Piece], dtype: np.dtype, region: list[range]) -> np.ndarray:
        """The part of a leaf that lies in `region`, a range of indices per axis."""
        out = host_memory(tuple(len(r) for r in region), dtype)

        def fill(piece: Piece) -> None:
            depth = len(piece.index)
            target = out[tuple(i - r.start for i, r in zip(piece.index, region[:depth], strict=True))]
            with np.errstate(over="ignore", invalid="ignore"):  # what overflows is counted and told of once
                self.fill(target, leaf, piece, region[depth:])

        inside = [p for p in pieces if all(i in r for i, r in zip(p.index, region[: len(p.index)], strict=True))]
        for done in [self.pool.submit(fill, piece) for piece in inside]:
            done.result()
        return out

    def fill(self, target: np.ndarray, leaf: Leaf, piece: Piece, region: list[range]) -> None:
        """Copies one piece into `target`, which is the part of it that lies in `region`."""
        experts = region[0] if len(region) > 2 else None
        for number, stored in stored_matrices(self.files, self.storage, piece, target.dtype, experts):
            cut = tuple(slice(r.start, r.stop) for r in region[-2:])
            destination = target if number is None or experts is None else target[number - experts.start]
            if leaf.transposed:
                copy_transposed(destination, stored[cut[1], cut[0]])
            else:
                destination[...] = stored[cut]
        if bad := count_non_finite(target):
            with self._lock:
                self.non_finite[piece.key] = self.non_finite.get(piece.key, 0) + bad


def stored_matrices(
    files: WeightFiles, storage: Storage, piece: Piece, dtype: Any, experts: range | None = None
) -> Iterator[tuple[int | None, np.ndarray]]:
    """The matrices (or the vector) of a piece as stored, `[output, input]`, each with its expert number.

    The number is None for a tensor of one expert or none; `experts` selects from a tensor that stacks them. FP8 values
    come dequantised to `dtype`, all others in their stored dtype and without a copy. Pages are given back once the next
    matrix is asked for.
    """
    stored = files.view(piece.key)
    scales = files.view(piece.key + SUFFIX) if stored.dtype.itemsize == 1 else None
    if stored.ndim < 3:
        yield None, _stored_matrix(stored, scales, storage, piece, dtype)
        files.release(piece.key)
    else:
        for number in range(len(stored)) if experts is None else experts:
            scale = None if scales is None else scales[number]
            yield number, _stored_matrix(stored[number], scale, storage, piece, dtype)
            files.release(piece.key, number)
    if scales is not None:
        files.release(piece.key + SUFFIX)


def _stored_matrix(
    matrix: np.ndarray, scale: np.ndarray | None, storage: Storage, piece: Piece, dtype: Any
) -> np.ndarray:
    """The rows of a matrix that are the piece's, dequantised if it has scales.

    Not a function within `stored_matrices`, which runs in threads: tests check types by decorating functions where they
    are defined, under `warnings.catch_warnings`, and that is not safe in threads.
    """
    if scale is not None:
        assert storage.fp8_block is not None
        matrix = dequantize(matrix, scale, storage.fp8_block, np.dtype(dtype))
    return matrix if piece.rows is None else matrix[slice(*piece.rows)]


def copy_transposed(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source.T`; JAX's transfer to the host's own device turns it faster than numpy."""
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to leave the CPU out
        target[...] = source.T
        return
    rows = max(1, _BAND // max(source[:1].nbytes, 1))  # so that no second copy of a large matrix is made
    for start in range(0, len(source), rows):
        target[:, start : start + rows] = np.asarray(jax.device_put(source[start : start + rows].T, cpu))


def host_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that JAX takes over without a copy, in huge pages where the system has them.

    Touching fresh memory page by page can take longer than reading the file (`experiments/bench_load.py`: a plain read
    into new memory beside one into a used buffer).
    """
    size = math.prod(shape) * dtype.itemsize
    # Page-aligned: JAX copies what is not aligned to 64 bytes.
    memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)


def count_non_finite(values: np.ndarray) -> int:
    """How many values are NaN or infinite: all bits of the exponent are set."""
    integers, mask = {
        "float32": (np.uint32, 0x7F800000), "bfloat16": (np.uint16, 0x7F80), "float16": (np.uint16, 0x7C00),
    }[str(values.dtype)]  # fmt: skip
    bits = values.view(integers).reshape(-1)
    parts = (bits[i : i + _COUNTED] for i in range(0, bits.size, _COUNTED))
    return sum(int(np.count_nonzero((part & integers(mask)) == mask)) for part in parts)


def warn_of_non_finite(directory: Path, counts: dict[str, int]) -> None:
    """Warns (`CheckpointWarning`) of tensors with NaN or infinity, given their counts by key."""
    if counts:
        listed = ", ".join(f"{key} ({count:,})" for key, count in sorted(counts.items())[:5])
        more = f" and {len(counts) - 5} more tensors" if len(counts) > 5 else ""
        warnings.warn(
            f"{directory}: {sum(counts.values()):,} weights are NaN or infinite: {listed}{more}",
            CheckpointWarning,
            stacklevel=2,
        )
