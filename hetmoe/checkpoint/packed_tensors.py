"""Quantized expert matrices in safetensors files.

A matrix that would be `X.weight`, `[output, input]`, is instead stored as it lies in memory, inputs first:

    X.weight_codes        uint8   [input * b / 8, output]  codes, or the two lower bits of 3-bit codes (b = 2)
    X.weight_codes_high   uint8   [input / 8, output]      only of 3-bit codes: the upper bit
    X.weight_scale        float16 [input / group, output]  steps
    X.weight_zero         float16 [input / group, output]  zeros; not of symmetric grids

How codes share bytes says `hetmoe.quantize.packed`; a weight is `(code - zero) * scale`, with the zero
`(2**bits - 1) / 2` where none is stored. `quantization_config` of config.json says which grid each matrix lies on
(`hetmoe.quantize.layout`).
"""

import dataclasses

import jax
import numpy as np

from hetmoe.checkpoint.pieces import Piece, checkpoint_keys
from hetmoe.checkpoint.weight_files import WeightFiles
from hetmoe.errors import InputError
from hetmoe.models.abstract import abstract_params
from hetmoe.models.config import ModelConfig
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.layout import QuantizedLayout, abstract_packed, check_layout
from hetmoe.quantize.packed import PLANES, Packed

_CODES = ("_codes", "_codes_high")
_DTYPES = {"U8": np.uint8, "F16": np.float16}


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """A quantized matrix in a checkpoint: grid and shape `[input, output]`."""

    grid: Grid
    rows: int
    columns: int


def packed_matrices(config: ModelConfig, layout: QuantizedLayout, source: str) -> dict[str, PackedMatrix]:
    """The quantized matrices of a model, by the key that they have where they are not quantized.

    Raises:
        InputError: naming the source if the layout is not that of such a model.
    """
    experts = abstract_params(config).layers.moe.experts
    check_layout(layout, experts, source)
    found: dict[str, PackedMatrix] = {}
    for name in EXPERT_MATRICES:
        leaf, table = getattr(experts, name), layout.table(name)
        for piece in checkpoint_keys(leaf):
            index = table[piece.index]
            if index >= 0:
                found[piece.key] = PackedMatrix(layout.grids[index], *leaf.shape[2:])
    return found


def tensor_names(key: str, grid: Grid) -> list[str]:
    """The keys of the tensors that take the place of the weight `key`."""
    codes = [key + suffix for suffix in _CODES[: len(PLANES[grid.bits])]]
    return [*codes, f"{key}_scale", *([] if grid.symmetric else [f"{key}_zero"])]


def to_tensors(key: str, packed: Packed, slot: int) -> dict[str, np.ndarray]:
    """The tensors of one matrix of a pool."""
    names, leaves = tensor_names(key, packed.grid), jax.tree.leaves(packed)
    return {name: np.ascontiguousarray(leaf[slot]) for name, leaf in zip(names, leaves, strict=True)}


def check_tensors(files: WeightFiles, key: str, matrix: PackedMatrix) -> None:
    """Raises InputError unless all tensors of a matrix are there, of the right shape and dtype. Reads headers only."""
    wanted = jax.tree.leaves(abstract_packed(1, matrix.rows, matrix.columns, matrix.grid))
    for name, leaf in zip(tensor_names(key, matrix.grid), wanted, strict=True):
        if name not in files.tensors:
            raise InputError(
                f"{files.directory}: {name} is missing, but config.json has {key} quantized to {matrix.grid.bits} bits"
            )
        stored = files.tensors[name]
        if stored.shape != leaf.shape[1:] or _DTYPES.get(stored.dtype) != leaf.dtype:
            raise InputError(
                f"{files.where(name)} is {stored.dtype} {list(stored.shape)}, expected {np.dtype(leaf.dtype).name} "
                f"{list(leaf.shape[1:])}"
            )


def read_pool(files: WeightFiles, pieces: list[Piece], matrix: PackedMatrix) -> Packed:
    """The matrices of one pool, all of one grid and shape, each from its tensors.

    Raises:
        InputError: for steps or zeros that are not finite, and negative steps.
    """
    pool = abstract_packed(len(pieces), matrix.rows, matrix.columns, matrix.grid)
    targets = [np.empty(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(pool)]
    for slot, piece in enumerate(pieces):
        for name, target in zip(tensor_names(piece.key, matrix.grid), targets, strict=True):
            target[slot] = files.view(name)
            files.release(name)
            if target.dtype == np.float16 and not np.isfinite(target[slot]).all():
                raise InputError(f"{files.where(name)} holds NaN or infinity")
            if name.endswith("_scale") and (target[slot] < 0).any():
                raise InputError(f"{files.where(name)} holds negative steps")
    return jax.tree.unflatten(jax.tree.structure(pool), [jax.device_put(target) for target in targets])
