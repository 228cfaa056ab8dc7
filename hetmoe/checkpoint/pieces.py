"""From leaves of the parameter tree to tensors of a checkpoint, in whichever of the known layouts it has."""

import dataclasses
from collections.abc import Iterator

from hetmoe.models.abstract import Leaf
from hetmoe.models.tensor_names import TensorNames


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
