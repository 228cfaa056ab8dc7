"""What changed weights do to the output of one expert.

An expert is `f(x) = D^T h`, `h = silu(a) * b`, `a = G^T x`, `b = U^T x`; its quantized version has G', U', D'. Written
with `da = a' - a` and so on, the change of a neuron can be split in two ways,

    dh = (silu(a') - silu(a)) b  + silu(a') db
       = (silu(a') - silu(a)) b' + silu(a) db,

and so can that of the output: `df = D'^T dh + dD^T h = D^T dh + dD^T h'`. Everything else is the triangle inequality,
Cauchy-Schwarz for single neurons (`|da_j| <= |dG_j| |x|`), the spectral norm for all together (`|da| <= |dG| |x|`), and
`|silu(z)| <= |z|`, `|silu'| <= 1.09984`.
"""

import dataclasses

import numpy as np
from jaxtyping import Float64

from hetmoe.quantize.bounds.inputs import check_inputs, check_network, check_same_shape, check_sizes
from hetmoe.quantize.bounds.matrix_norms import column_norms, spectral_norm
from hetmoe.quantize.bounds.rounding import UNIT, rounding, widened
from hetmoe.quantize.bounds.silu import STEEPEST, silu, steepest_within

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Expert:
    """The matrices of one SwiGLU network in float64.

    Raises:
        InputError: for shapes that do not fit, or values that are not finite.
    """

    gate: Float64[Array, "hidden inner"]
    up: Float64[Array, "hidden inner"]
    down: Float64[Array, "inner hidden"]

    def __post_init__(self) -> None:
        check_network(gate=self.gate, up=self.up, down=self.down)

    @property
    def matrices(self) -> tuple[Array, Array, Array]:
        """All three."""
        return self.gate, self.up, self.down

    def minus(self, other: "Expert") -> "Expert":
        """Differences of all weights."""
        return Expert(self.gate - other.gate, self.up - other.up, self.down - other.down)


@dataclasses.dataclass(frozen=True)
class Norms:
    """Norms of a network's matrices, from above."""

    gate: Float64[Array, "inner"]  # of every neuron's column
    up: Float64[Array, "inner"]
    down: Float64[Array, "inner"]  # of every neuron's row
    gate_all: float  # spectral
    up_all: float
    down_all: float
    inputs: int  # rows of gate and up

    def plus(self, other: "Norms") -> "Norms":
        """Bounds of the norms of the matrices' sums."""
        return Norms(
            self.gate + other.gate, self.up + other.up, self.down + other.down,
            self.gate_all + other.gate_all, self.up_all + other.up_all, self.down_all + other.down_all, self.inputs,
        )  # fmt: skip

    @property
    def hidden_all(self) -> float:
        """Bounds `|h| / |x|^2`: one factor is bounded for all neurons together, the other for each."""
        each = float(np.linalg.norm(self.gate * self.up))
        return min(each, self.gate_all * self.up.max(), self.gate.max() * self.up_all)

    @property
    def magnitudes(self) -> float:
        """Bounds the sum of the magnitudes of all products that an output is made of, per `|x|^2`."""
        return float(np.sum(self.gate * self.up * self.down))

    @property
    def output(self) -> float:
        """Bounds `|f(x)| / |x|^2`."""
        return widened(min(self.magnitudes, self.hidden_all * self.down_all))


@dataclasses.dataclass(frozen=True)
class Change:
    """Norms of a network, of its changed version, and of the differences."""

    clean: Norms
    changed: Norms
    difference: Norms


def norms(expert: Expert) -> Norms:
    """Of given matrices."""
    return Norms(
        column_norms(expert.gate), column_norms(expert.up), column_norms(expert.down.T),
        spectral_norm(expert.gate), spectral_norm(expert.up), spectral_norm(expert.down), expert.gate.shape[0],
    )  # fmt: skip


def change_of(clean: Expert, changed: Expert) -> Change:
    """The actual differences of two versions of an expert.

    Raises:
        InputError: for experts of different sizes.
    """
    for name in ("gate", "down"):
        check_same_shape(f"changed.{name}", getattr(changed, name), f"clean.{name}", getattr(clean, name))
    return Change(norms(clean), norms(changed), norms(changed.minus(clean)))


def unchanged(same: Norms) -> Change:
    """Of a network whose weights stay as they are and whose inputs may change."""
    none = np.zeros_like(same.gate)
    return Change(same, same, Norms(none, none, none, 0.0, 0.0, 0.0, same.inputs))


def error_constant(change: Change) -> float:
    """The C of `|f'(x) - f(x)| <= C |x|^2`, for every x.

    For each split, both parts are bounded by the sum over neurons and by norms of all neurons together, and the lesser
    is taken; then the lesser of the two splits.
    """
    old, new, diff = change.clean, change.changed, change.difference
    each = np.minimum(
        STEEPEST * diff.gate * old.up + new.gate * diff.up, STEEPEST * diff.gate * new.up + old.gate * diff.up
    )
    together = min(
        float(np.linalg.norm(each)),
        *(
            STEEPEST * min(diff.gate_all * b.up.max(), diff.gate.max() * b.up_all)
            + min(a.gate_all * diff.up.max(), a.gate.max() * diff.up_all)
            for a, b in ((new, old), (old, new))
        ),
    )

    def split(outer: Norms, inner: Norms) -> float:
        neurons = min(float(np.sum(each * outer.down)), together * outer.down_all)
        return neurons + min(float(np.sum(inner.gate * inner.up * diff.down)), inner.hidden_all * diff.down_all)

    return widened(min(split(new, old), split(old, new)))


def norm_bound(change: Change, size: Float64[Array, "tokens"]) -> Float64[Array, "tokens"]:
    """Bounds `|f'(x) - f(x)|` by `|x|` alone.

    Args:
        change: of the expert (`change_of`, or `a_priori_change`).
        size: Euclidean norm of each token's input.

    Raises:
        InputError: for sizes that are not float64 `[tokens]` of at least 0.
    """
    check_sizes("size", size, np.size(size))
    return error_constant(change) * np.square(size) + evaluation_rounding(change, size)


@dataclasses.dataclass(frozen=True)
class Activations:
    """What an expert makes of some tokens."""

    gate: Float64[Array, "tokens inner"]  # a
    up: Float64[Array, "tokens inner"]  # b
    hidden: Float64[Array, "tokens inner"]  # h
    out: Float64[Array, "tokens hidden"]


def activations(x: Float64[Array, "tokens hidden"], expert: Expert) -> Activations:
    """Of tokens with inputs x.

    Raises:
        InputError: for inputs that are not finite float64 `[tokens, hidden]`.
    """
    check_inputs(x, len(expert.gate))
    gate, up = x @ expert.gate, x @ expert.up
    hidden = silu(gate) * up
    return Activations(gate, up, hidden, hidden @ expert.down)


def activation_bound(
    change: Change, clean: Activations, size: Float64[Array, "tokens"], radius: Float64[Array, "tokens"]
) -> Float64[Array, "tokens"]:
    """Bounds `|f'(x') - f(x)|` for every `x'` with `|x' - x| <= radius`, from what the clean expert makes of x.

    The second split of the change of a neuron and the first one of that of the output, with
    `|da_j| <= |dG_j| |x| + |G'_j| radius`, likewise for all neurons together and for b, and with the largest slope of
    SiLU that this range of a_j admits. Where neurons are bounded both one by one and together, the worst case within
    both limits is taken (`_largest_norm`).

    Args:
        change: of the expert.
        clean: activations of x.
        size: `|x|` of each token.
        radius: 0 for the change that the weights alone make.

    Raises:
        InputError: for sizes or radii that are not float64 `[tokens]` of at least 0, or activations of other tokens.
    """
    for name, values in (("size", size), ("radius", radius)):
        check_sizes(name, values, len(clean.gate))
    old, new, diff = change.clean, change.changed, change.difference
    x, r = size[:, None], radius[:, None]
    gate, up = diff.gate * x + new.gate * r, diff.up * x + new.up * r
    gate_all, up_all = diff.gate_all * size + new.gate_all * radius, diff.up_all * size + new.up_all * radius
    # The activations are those of float64: the exact ones may differ by so much.
    gate_off, up_off = rounding(old.inputs, old.gate * x), rounding(old.inputs, old.up * x)
    through_gate = steepest_within(clean.gate, gate + gate_off) * (np.abs(clean.up) + up + up_off)
    through_up = np.abs(silu(clean.gate)) + STEEPEST * gate_off
    together = _largest_norm(through_gate, gate, gate_all) + _largest_norm(through_up, up, up_all)
    each = through_gate * gate + through_up * up
    moved = np.minimum(each @ new.down, together * new.down_all)
    hidden = np.abs(clean.hidden) + rounding(3 * old.inputs, old.gate * old.up * np.square(x))
    stayed = np.minimum(hidden @ diff.down, np.linalg.norm(hidden, axis=1) * diff.down_all)
    return widened(moved + stayed) + evaluation_rounding(change, size + radius)


def _largest_norm(weights: Array, each: Array, together: Array) -> Array:
    """The largest `|w * v|` over v with `|v_j| <= each_j` and `|v| <= together`, row by row.

    `sum w_j^2 v_j^2` is linear in the squares of v: the largest weights take all they may until the limit of all is
    used up (a fractional knapsack).
    """
    order = np.argsort(-weights, axis=1)
    gains = np.take_along_axis(np.square(weights), order, axis=1)
    capacity = np.take_along_axis(np.square(each), order, axis=1)
    used = np.minimum(np.cumsum(capacity, axis=1), np.square(together)[:, None])
    # A running sum of j numbers loses j u of itself, and gains only fall: j^2 u of the result altogether.
    lost = 1 + weights.shape[1] ** 2 * UNIT
    return np.sqrt(np.sum(gains * np.diff(used, axis=1, prepend=0.0), axis=1) * lost)


def evaluation_rounding(change: Change, size: Float64[Array, "tokens"]) -> Float64[Array, "tokens"]:
    """By how much evaluations of both versions in float64 may be off, together.

    The products that an output is made of, in magnitude, sum up to at most `magnitudes |x|^2` (Cauchy-Schwarz for the
    inner sums). They pass two sums over inputs, one of them with SiLU's slope, and one over neurons.
    """
    terms = 3 * change.clean.inputs + len(change.clean.gate)
    return rounding(terms, max(change.clean.magnitudes, change.changed.magnitudes) * np.square(size))
