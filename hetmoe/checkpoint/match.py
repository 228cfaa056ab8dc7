"""Whether the tensors of a checkpoint are those that its config demands."""

import re
import warnings

import numpy as np

from hetmoe.checkpoint.fp8 import SUFFIX, scale_shape
from hetmoe.checkpoint.packed_tensors import check_tensors, packed_matrices, tensor_names
from hetmoe.checkpoint.pieces import Piece, pieces_of, stored_shape
from hetmoe.checkpoint.safetensors_file import DTYPES
from hetmoe.checkpoint.storage import Storage
from hetmoe.checkpoint.weight_files import WeightFiles
from hetmoe.errors import CheckpointWarning, InputError
from hetmoe.models.abstract import Leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.tensor_names import names_of

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


def match(leaves: list[Leaf], config: ModelConfig, files: WeightFiles, storage: Storage) -> list[list[Piece]]:
    """The pieces of every leaf, after comparing the checkpoint with what the config demands. Reads headers only.

    Quantized matrices are compared likewise, and are no pieces.

    Warns (`CheckpointWarning`) when multi-token-prediction layers are left out.

    Raises:
        InputError: naming file, key, found and expected, for missing or unknown tensors, wrong shapes and dtypes,
            FP8 weights without scales, and a layout of quantized experts that is not this model's.
    """
    found = set(files.tensors)
    pieces = [pieces_of(leaf, names_of(config.family), found) for leaf in leaves]
    packed = {} if storage.layout is None else packed_matrices(config, storage.layout, str(files.directory))
    pieces = [[piece for piece in group if piece.key not in packed] for group in pieces]
    wanted = {piece.key for group in pieces for piece in group}
    if missing := sorted(wanted - found):
        owners = {piece.key: (leaf, piece) for leaf, group in zip(leaves, pieces, strict=True) for piece in group}
        shape = stored_shape(*owners[missing[0]])
        raise InputError(
            f"{files.directory}: {len(missing)} tensors are missing in its weight files, the first is {missing[0]} "
            f"{list(shape)}"
        )
    scales = {key + SUFFIX for key in wanted if files.tensors[key].dtype == "F8_E4M3"}
    if missing := sorted(scales - found):
        weight = missing[0].removesuffix(SUFFIX)
        raise InputError(f"{files.where(weight)} is stored as FP8, but there is no {missing[0]} with its scales")
    parts = {name for key, matrix in packed.items() for name in tensor_names(key, matrix.grid)}
    for key, matrix in packed.items():
        check_tensors(files, key, matrix)
    skipped = {key for key in found if _skipped(key, config, files, storage)}
    if unknown := sorted(found - wanted - scales - parts - skipped):
        raise InputError(
            f"{files.tensors[unknown[0]].path}: {len(unknown)} tensors do not belong to this config, "
            f"the first is {unknown[0]}"
        )
    for leaf, group in zip(leaves, pieces, strict=True):
        for piece in group:
            _check(leaf, piece, files, storage)
    if extra := sorted({int(m[1]) for key in skipped if (m := _LAYER.match(key)) and int(m[1]) >= config.num_layers}):
        warnings.warn(
            f"{files.directory}: left out {len(extra)} layer(s) that predict further tokens (multi-token prediction), "
            f"{', '.join(f'model.layers.{i}' for i in extra)}: logits of the next token do not depend on them",
            CheckpointWarning,
            stacklevel=2,
        )
    return pieces


def _skipped(key: str, config: ModelConfig, files: WeightFiles, storage: Storage) -> bool:
    """Tensors that take no part in the logits of the next token."""
    if key.endswith(".rotary_emb.inv_freq"):
        return True  # old files store the rotary frequencies, which follow from the config
    if key == "lm_head.weight" and config.tie_embeddings:
        embed = "model.embed_tokens.weight"
        same = embed in files.tensors and files.tensors[embed].shape == files.tensors[key].shape
        same = same and files.tensors[embed].dtype == files.tensors[key].dtype and files.tensors[key].dtype in DTYPES
        same = same and len(files.tensors[key].shape) == 2
        if not same or not _same_bytes(files, embed, key):
            raise InputError(f"{files.where(key)} differs from {embed}, but config.json has tie_word_embeddings=true")
        return True
    layer = _LAYER.match(key)
    return layer is not None and config.num_layers <= int(layer[1]) < config.num_layers + storage.extra_layers


def _same_bytes(files: WeightFiles, left: str, right: str) -> bool:
    """Whether two tensors of one shape and dtype are equal bit by bit (equal NaN are equal), 16 MB at a time."""
    a, b = (files.view(key).reshape(-1).view(np.uint8) for key in (left, right))
    same = all(np.array_equal(a[i : i + (1 << 24)], b[i : i + (1 << 24)]) for i in range(0, a.size, 1 << 24))
    for key in (left, right):
        files.release(key)
    return same


def _check(leaf: Leaf, piece: Piece, files: WeightFiles, storage: Storage) -> None:
    tensor, wanted = files.tensors[piece.key], stored_shape(leaf, piece)
    if tensor.shape != wanted:
        raise InputError(f"{files.where(piece.key)} has shape {list(tensor.shape)}, expected {list(wanted)}")
    if tensor.dtype not in DTYPES:
        raise InputError(f"{files.where(piece.key)} is stored as {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    if tensor.dtype != "F8_E4M3":
        return
    if len(wanted) < 2:
        raise InputError(f"{files.where(piece.key)} is stored as FP8, but only matrices have block-wise scales")
    if storage.fp8_block is None:
        raise InputError(
            f"{files.where(piece.key)} is stored as FP8, but config.json has no quantization_config with "
            "weight_block_size"
        )
    scale = files.tensors[piece.key + SUFFIX]
    shape = scale_shape(wanted, storage.fp8_block)
    if scale.shape != shape or scale.dtype not in ("F32", "BF16"):
        raise InputError(
            f"{files.where(scale.key)} is {scale.dtype} {list(scale.shape)}, expected F32 (or BF16) {list(shape)} for "
            f"blocks of {list(storage.fp8_block)}"
        )
