"""From a rule and an average to the bits of every expert matrix."""

import collections
import dataclasses
from fractions import Fraction
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.placement.scores import score_experts
from hetmoe.quantize.budget import EXPERT_MATRICES, average_budget, bits_within, code_bits, expert_bytes
from hetmoe.quantize.expected_loss import expected_increase
from hetmoe.quantize.grid import BITS
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.levels import Alternative, Counts, assign, level_counts
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.quantize.order import (
    Order,
    by_activation_frequency,
    by_router_change,
    by_router_norm,
    max_variance,
    promote,
    random_order,
)
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest

EXPECTED_LOSS, UNIFORM, RANDOM = "expected_loss", "uniform", "random"
RULES: dict[str, str] = {
    "router_change": "growth of router norms from an initial model; least growth gets most bits",
    "router_norm": "router norms, where no initial model is known; smallest get most bits",
    "activation_frequency": "how often the text chooses an expert; rarest get most bits",
    RANDOM: "drawn from the seed",
    UNIFORM: "all the same",
    EXPECTED_LOSS: "least expected increase of the loss on the text, every matrix on its own",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitRule:
    """How bits are given to experts.

    Attributes:
        rule: one of `RULES`.
        average: bits per weight of the digital experts, without steps and zeros; for `expected_loss` what they may
            average at most.
        levels: bits that an expert may get, ascending; two or three for the rules that order experts.
        alternative: for three levels, `three_levels`.
        zeta: experts of large MaxVar move ahead (`promote`); None = they do not.
        variance: of which neurons MaxVar is (`max_variance`).
        more_bits: for `activation_frequency`.
        max_bytes: for `expected_loss`, a budget of bytes of all digital experts, steps and zeros included, instead of
            the average.

    Raises:
        InputError: for values that do not exist or contradict each other.
    """

    rule: str
    average: float | None
    levels: tuple[int, ...]
    alternative: Alternative = "paper"
    zeta: float | None = 3.0
    variance: Literal["highest_norm", "all"] = "highest_norm"
    more_bits: Literal["rare", "frequent"] = "rare"
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise InputError(f"unknown rule {self.rule!r}: use one of {', '.join(RULES)}")
        levels = list(self.levels)
        if not levels or levels != sorted(set(levels)) or any(bits not in BITS for bits in levels):
            raise InputError(
                f"levels={','.join(map(str, levels)) or 'none'} must be ascending ones of {', '.join(map(str, BITS))}"
            )
        if (self.average is None) == (self.max_bytes is None):
            raise InputError("give either an average of bits or, with rule 'expected_loss', a budget of bytes")
        if self.max_bytes is not None and self.rule != EXPECTED_LOSS:
            raise InputError(f"rule {self.rule!r} takes an average of bits; a budget of bytes is for {EXPECTED_LOSS!r}")
        if self.average is not None and not levels[0] <= self.average <= levels[-1]:
            raise InputError(f"{self.average:g} bits are not between the levels {', '.join(map(str, levels))}")
        if self.rule == UNIFORM and self.average not in levels:
            raise InputError(
                f"rule 'uniform' gives all experts the same bits, so {self.average:g} must be one of the levels "
                f"{', '.join(map(str, levels))}"
            )
        if self.zeta is not None and not 1 <= self.zeta < np.inf:
            raise InputError(f"zeta={self.zeta!r} must be finite and at least 1, or none")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise InputError(f"a budget of {self.max_bytes} bytes must be at least 1")
        if self.rule not in (UNIFORM, EXPECTED_LOSS):
            level_counts(8, self.average or 0, levels, self.alternative)  # refuses what no number of experts can do


@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits of every expert matrix.

    Attributes:
        bits: of `EXPERT_MATRICES`, 0 where nothing is quantized.
        notes: what a report says of them, a line each.
    """

    bits: Int[np.ndarray, "layers experts matrices"]
    notes: tuple[str, ...]

    @property
    def average(self) -> Fraction:
        """Bits per weight of what is quantized, without steps and zeros, exactly; all matrices are of one size."""
        some = self.bits[self.bits > 0]
        return Fraction(int(some.sum()), max(len(some), 1))


def allocate(
    model: Model,
    how: BitRule,
    recipe: Recipe,
    *,
    key: jax.Array,
    windows: Int[Any, "sequences context"] | None = None,
    initial: Float[Array, "layers hidden experts"] | None = None,
    digital: Bool[np.ndarray, "layers experts"] | None = None,
) -> Allocation:
    """The bits of every expert matrix by a rule.

    Args:
        model: not quantized.
        how: the rule and its average.
        recipe: grids, and the quantiser whose changes `expected_loss` weighs. (For `gptq`, whose changes depend on
            other layers' bits, those of `hqq` stand in.)
        key: of random orders and of sampled labels.
        windows: text, for `activation_frequency` and `expected_loss`.
        initial: routers before training or fine-tuning, for `router_change`.
        digital: which experts are quantized; None = all.

    Raises:
        InputError: for a missing or unusable text or initial router, no digital expert, or a budget that is too small.
    """
    refuse_quantized(model.params, "no bits are given to")
    shape = (len(model.config.moe_layers), model.config.num_experts)
    wanted = np.ones(shape, bool) if digital is None else np.asarray(digital)
    if wanted.shape != shape:
        raise InputError(f"digital has the shape {list(wanted.shape)}; this model needs {list(shape)}")
    if not wanted.any():
        raise InputError("no expert is digital: there is nothing to quantize")
    if how.rule == EXPECTED_LOSS:
        return _least_loss(model, how, recipe, key, windows, wanted)
    if how.rule == UNIFORM:
        bits = np.where(wanted, int(how.average or 0), 0)
        return Allocation(bits=_each_matrix(bits), notes=())
    order = _order(model, how, key, windows, initial)
    notes: list[str] = []
    if how.zeta is not None:
        first = model.params.layers.moe.experts.gate
        promoted = promote(order, max_variance(first, how.variance), how.zeta)
        moved = int(np.sum(promoted != order))
        notes.append(f"MaxVar (zeta {how.zeta:g}) changed {moved} of {order.size} positions")
        order = promoted
    bits = np.zeros(shape, np.int64)
    statements: collections.Counter[str] = collections.Counter()
    for layer, (ranked, is_digital) in enumerate(zip(order, wanted, strict=True)):
        chosen = ranked[is_digital[ranked]]
        if not len(chosen):
            continue
        counts = level_counts(len(chosen), how.average or 0, how.levels, how.alternative)
        places = assign(np.arange(len(chosen))[None], counts)[0]
        bits[layer, chosen] = places
        statements[_statement(counts, how)] += 1
    notes += [f"{count} layers: {statement}" for statement, count in statements.items()]
    return Allocation(bits=_each_matrix(bits), notes=tuple(notes))


def _statement(counts: Counts, how: BitRule) -> str:
    """The counts, and beside them the other choice that three levels leave."""
    said = counts.statement()
    if len(how.levels) != 3 or how.alternative != "paper":
        return said
    other = level_counts(sum(counts.experts), how.average or 0, how.levels, "fewest_lowest")
    if other.experts == counts.experts:
        return said
    parts = ", ".join(f"{n} at {b}" for b, n in zip(other.levels, other.experts, strict=True))
    return f"{said} (the paper's rule; with fewest_lowest: {parts})"


def _each_matrix(bits: np.ndarray) -> np.ndarray:
    return np.repeat(bits[..., None], len(EXPERT_MATRICES), axis=-1)


def _order(model: Model, how: BitRule, key: jax.Array, windows: Any, initial: Array | None) -> Order:
    router = model.params.layers.moe.router
    if how.rule == "router_change":
        if initial is None:
            raise InputError(
                "rule 'router_change' needs the model before training or fine-tuning (--initial); where it is unknown "
                "use 'router_norm'"
            )
        if np.array_equal(np.asarray(router), np.asarray(initial)):
            raise InputError(
                "the initial model has the same routers as the model itself: give one from before training or "
                "fine-tuning, or use rule 'router_norm'"
            )
        return by_router_change(router, initial)
    if how.rule == "router_norm":
        return by_router_norm(router)
    if how.rule == RANDOM:
        return random_order(key, router.shape[0], router.shape[2])
    tokens = None if windows is None else jnp.asarray(windows)
    frequency = score_experts(model, "activation_frequency", tokens=tokens)
    return by_activation_frequency(frequency, more_bits=how.more_bits)


def _least_loss(
    model: Model, how: BitRule, recipe: Recipe, key: jax.Array, windows: Any, digital: np.ndarray
) -> Allocation:
    if windows is None:
        raise InputError("rule 'expected_loss' needs text")
    config, count = model.config, int(digital.sum())
    quantize = round_to_nearest if recipe.method == "rtn" else half_quadratic
    quantized = {
        name: [
            quantize(getattr(model.params.layers.moe.experts, name), recipe.grid(level), name=f"experts' {name}")
            for level in how.levels
        ]
        for name in EXPERT_MATRICES
    }
    increase = expected_increase(model, jnp.asarray(windows), quantized, key=key).curvature
    if how.max_bytes is None:
        sizes, budget = code_bits(config, how.levels), average_budget(config, count, how.average or 0)
    else:
        sizes, budget = expert_bytes(config, [recipe.grid(level) for level in how.levels]), how.max_bytes
    found = bits_within(increase, sizes, how.levels, budget, digital=digital)
    proven = "the least there is" if found.gap == 0 else f"at most {found.gap:.3g} above the least there is"
    note = f"expected increase {found.increase:.4g} nats per token (curvature; matrices added up), {proven}"
    return Allocation(bits=found.bits, notes=(note,))
