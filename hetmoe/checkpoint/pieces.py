"""From leaves of the parameter tree to tensors of a checkpoint, in whichever of the known layouts it has."""

import dataclasses
import re
import warnings
from collections.abc import Iterator

import numpy as np

from hetmoe.checkpoint.fp8 import SUFFIX, scale_shape
from hetmoe.checkpoint.safetensors_file import DTYPES
from hetmoe.checkpoint.storage import Storage
from hetmoe.checkpoint.weight_files import WeightFiles
from hetmoe.errors import CheckpointWarning, InputError
from hetmoe.models.abstract import Leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.tensor_names import TensorNames, names_of

_LAYER = re.compile(r"model\.layers\.(\d{1,6})\.")


@dataclasses.dataclass(frozen=True)
class Piece:
    """One stored tensor, or rows of one: it fills `leaf[index]`.

    `rows` are the stored rows (second axis from the end) that belong to the leaf, None = all.
    """

    index: tuple[int, ...]
    key: str
    rows: tuple[int, int] | None = None


def checkpoint_keys(leaf: Leaf) -> Iterator[Piece]:
    """The tensors of a leaf in the hub's layout, one per layer and expert; the layout in which models are saved."""
    if leaf.layers is None:
        yield Piece((), leaf.key)
        return
    for position, layer in enumerate(leaf.layers):
        if "{expert}" in leaf.key:
            for expert in range(leaf.shape[1]):
                yield Piece((position, expert), leaf.key.format(layer=layer, expert=expert))
        else:
            yield Piece((position,), leaf.key.format(layer=layer))


def _fused_or_renamed(leaf: Leaf, position: int, layer: int, names: TensorNames) -> Piece:
    """The tensor of one layer under the names that transformers 5 uses in memory.

    Experts are stacked, gate above up in one tensor `[experts, 2 * inner, hidden]`; every family calls its block `mlp`.
    """
    prefix = f"model.layers.{layer}.mlp"
    if "{expert}" in leaf.key:
        inner = leaf.shape[-1]
        kind = leaf.key.split(".")[-2]
        if kind == names.down:
            return Piece((position,), f"{prefix}.experts.down_proj")
        rows = (0, inner) if kind == names.gate else (inner, 2 * inner)
        return Piece((position,), f"{prefix}.experts.gate_up_proj", rows)
    return Piece((position,), leaf.key.format(layer=layer).replace(f".{names.block}.", ".mlp."))


def pieces_of(leaf: Leaf, names: TensorNames, found: set[str]) -> list[Piece]:
    """The tensors that make up a leaf, layer by layer in the layout that the checkpoint has there.

    A layer that has neither layout gets the hub's, so that the missing keys are named as users know them.
    """
    pieces: list[Piece] = []
    by_layer: dict[int, list[Piece]] = {}
    for piece in checkpoint_keys(leaf):
        if leaf.layers is None:
            return [piece]
        by_layer.setdefault(piece.index[0], []).append(piece)
    for (position, plain), layer in zip(by_layer.items(), leaf.layers or (), strict=True):
        other = _fused_or_renamed(leaf, position, layer, names)
        fused = other.key in found and not any(p.key in found for p in plain)
        pieces.extend([other] if fused else plain)
    return pieces


def stored_shape(leaf: Leaf, piece: Piece) -> tuple[int, ...]:
    """The shape that the whole stored tensor of a piece must have."""
    shape = leaf.shape[len(piece.index) :]
    if leaf.transposed:
        shape = (*shape[:-2], shape[-1], shape[-2])
    if piece.rows is not None:
        shape = (*shape[:-2], 2 * shape[-2], shape[-1])
    return shape


def match(leaves: list[Leaf], config: ModelConfig, files: WeightFiles, storage: Storage) -> list[list[Piece]]:
    """The pieces of every leaf, after comparing the checkpoint with what the config demands. Reads headers only.

    Warns (`CheckpointWarning`) when multi-token-prediction layers are left out.

    Raises:
        InputError: naming file, key, found and expected, for missing or unknown tensors, wrong shapes and dtypes, and
            FP8 weights without scales.
    """
    found = set(files.tensors)
    pieces = [pieces_of(leaf, names_of(config.family), found) for leaf in leaves]
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
    skipped = {key for key in found if _skipped(key, config, files, storage)}
    if unknown := sorted(found - wanted - scales - skipped):
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
