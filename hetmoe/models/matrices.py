"""Every matrix of a decoder layer that may run on crossbars: its number in a noise key, its module, its input."""

import dataclasses
import enum
import functools
from typing import Any, Literal

from hetmoe.models.params import DenseLayer, Layer

Module = Literal["experts", "attention", "shared_experts", "dense_ffn"]


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
    SHARED_GATE = 8
    SHARED_UP = 9
    SHARED_DOWN = 10
    FFN_GATE = 11
    FFN_UP = 12
    FFN_DOWN = 13
    Q_A = 14
    Q_B = 15
    KV_A = 16
    KV_B = 17


@dataclasses.dataclass(frozen=True)
class MatrixInfo:
    """`module` is what a plan switches, `site` the input that the matrix reads, `path` where a layer holds it.

    Matrices that read one site share a DAC range.
    """

    module: Module
    site: str
    path: str


MATRICES: dict[str, MatrixInfo] = {
    "gate": MatrixInfo("experts", "experts_in", "moe.experts.gate"),
    "up": MatrixInfo("experts", "experts_in", "moe.experts.up"),
    "down": MatrixInfo("experts", "experts_mid", "moe.experts.down"),
    "q": MatrixInfo("attention", "attention_in", "attention.q"),
    "k": MatrixInfo("attention", "attention_in", "attention.k"),
    "v": MatrixInfo("attention", "attention_in", "attention.v"),
    "o": MatrixInfo("attention", "attention_out", "attention.o"),
    "q_a": MatrixInfo("attention", "attention_in", "attention.q_a"),
    "q_b": MatrixInfo("attention", "query_latent", "attention.q_b"),
    "kv_a": MatrixInfo("attention", "attention_in", "attention.kv_a"),
    "kv_b": MatrixInfo("attention", "kv_latent", "attention.kv_b"),
    "shared_gate": MatrixInfo("shared_experts", "shared_in", "moe.shared.gate"),
    "shared_up": MatrixInfo("shared_experts", "shared_in", "moe.shared.up"),
    "shared_down": MatrixInfo("shared_experts", "shared_mid", "moe.shared.down"),
    "ffn_gate": MatrixInfo("dense_ffn", "ffn_in", "ffn.gate"),
    "ffn_up": MatrixInfo("dense_ffn", "ffn_in", "ffn.up"),
    "ffn_down": MatrixInfo("dense_ffn", "ffn_mid", "ffn.down"),
}


def crossbar_matrices(layer: Layer | DenseLayer, *, dense: bool = True) -> dict[str, Any]:
    """The matrices that `layer` has, by name; `dense=False` leaves only those of routed experts."""
    found = {n: _follow(layer, i.path) for n, i in MATRICES.items() if dense or i.module == "experts"}
    return {name: leaf for name, leaf in found.items() if leaf is not None}


def replace_matrices(layer: Any, new: dict[str, Any]) -> Any:
    """The layer with some of its matrices, given by name, replaced."""
    for name, value in new.items():
        layer = _replaced(layer, MATRICES[name].path.split("."), value)
    return layer


def _replaced(node: Any, path: list[str], value: Any) -> Any:
    if not path:
        return value
    return dataclasses.replace(node, **{path[0]: _replaced(getattr(node, path[0]), path[1:], value)})


def _follow(layer: Layer | DenseLayer, path: str) -> Any:
    return functools.reduce(lambda node, name: getattr(node, name, None), path.split("."), layer)
