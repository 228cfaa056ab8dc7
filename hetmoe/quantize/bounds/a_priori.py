"""Error bounds of experts rounded to the nearest level, from what is stored of them alone."""

import numpy as np
from jaxtyping import Float64

from hetmoe.errors import InputError
from hetmoe.models.params import FeedForward
from hetmoe.quantize.bounds.expert import Change, Expert, change_of, error_constant, norms
from hetmoe.quantize.bounds.weights import expert_weights
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.mixed import MixedMatrix
from hetmoe.quantize.packed import Packed, dequantize_packed, take_packed

TINIEST = 2.0**-126  # float32's smallest normal number: steps below it may count as 0


def a_priori_change(gate: Packed, up: Packed, down: Packed) -> Change:
    """Norms of an expert and of its rounding errors, when the weights before quantization are not known.

    Holds for round-to-nearest only. GPTQ and HQQ move single weights by more than half a step, and nothing in packed
    weights tells which of the three made them: for those take `change_of`, the actual differences.

    With round-to-nearest no weight moves by more than half of its group's stored step (`round_to_nearest`), so that the
    differences are at most H_ij = step_ij / 2, element by element, and so are their column norms and row norms; their
    spectral norm is at most that of H, because `|D v| <= |H |v||` (Perron-Frobenius). The norms of the weights before
    are at most those of the weights now plus those of the differences (triangle inequality).

    Args:
        gate: of one expert, without leading axes.
        up: likewise.
        down: likewise.

    Raises:
        InputError: for stacks of experts.
    """
    for name, matrix in (("gate", gate), ("up", up), ("down", down)):
        if not isinstance(matrix, Packed) or len(matrix.shape) != 2:
            raise InputError(f"{name} must be the packed matrix of one expert: take it from its stack with take_packed")
    stored = (np.asarray(dequantize_packed(w)).astype(np.float64) for w in (gate, up, down))
    now = norms(Expert(*stored))
    difference = norms(Expert(*(half_steps(w) for w in (gate, up, down))))
    return Change(clean=now.plus(difference), changed=now, difference=difference)


def a_priori_ratios(clean: FeedForward, rounded: FeedForward, layer: int) -> Float64[np.ndarray, "experts"]:
    """How many times as large the bound from steps is as that from actual differences, for each expert of a layer.

    Args:
        clean: experts of all layers, `[layers, experts, K, N]`.
        rounded: the same, all rounded to the nearest level.
        layer: which of them.
    """
    found: list[float] = []
    for expert in range(clean.gate.shape[1]):
        stored = (_packed_of(getattr(rounded, name), layer, expert) for name in EXPERT_MATRICES)
        actual = change_of(expert_weights(clean, layer, expert), expert_weights(rounded, layer, expert))
        known = error_constant(actual)
        found.append(error_constant(a_priori_change(*stored)) / known if known > 0 else 1.0)
    return np.array(found)


def _packed_of(stack: MixedMatrix, layer: int, expert: int) -> Packed:
    pool = stack.pools[int(stack.places.pool[layer, expert])]
    if not isinstance(pool, Packed):
        raise InputError(f"expert {expert} of layer {layer} (of those with experts) is not quantized")
    return take_packed(pool, stack.places.slot[layer, expert])


def half_steps(packed: Packed) -> np.ndarray:
    """By how much round-to-nearest may have moved each weight: half a step and float32's rounding, float64 `[K, N]`.

    Raises:
        InputError: for what is not packed (`pack(round_to_nearest(w, grid))`).
    """
    if not isinstance(packed, Packed):
        raise InputError(
            f"half_steps takes a Packed matrix, not {type(packed).__name__}: pack(round_to_nearest(w, grid))"
        )
    steps = np.repeat(np.asarray(packed.scale, np.float64), packed.grid.group, axis=-2)
    # Where weights are so small that their step is below float32's normal numbers, it is 0, and so are they.
    return steps * (0.5 + slack(packed.grid)) + 2.0**packed.grid.bits * TINIEST


def slack(grid: Grid) -> float:
    """What rounding in float32 adds to half a step, in steps (`round_to_nearest`)."""
    return 2.0 ** (grid.bits - 22)
