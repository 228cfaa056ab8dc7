"""Deployments that a search compares: rules with a fraction of digital experts, at bits, and assignments."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from hetmoe.errors import InputError
from hetmoe.evaluate.run import Batches, evaluate_seeds
from hetmoe.models.model import Model
from hetmoe.models.params import FeedForward, Params, with_experts
from hetmoe.placement.plan import Plan, stack_plans
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.mixed import dense
from hetmoe.quantize.recipe import Recipe

EXPERTS_ANALOG = "experts analog"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """What runs where.

    Attributes:
        rule: how it came about.
        fraction: of digital experts that was asked for; None where none was.
        bits: of digital experts, in words.
        analog: which experts are.
        expert_bits: of each of `EXPERT_MATRICES`, 0 = not quantized.
    """

    rule: str
    fraction: float | None
    bits: str
    analog: Bool[np.ndarray, "layers experts"]
    expert_bits: Int[np.ndarray, "layers experts matrices"]

    @property
    def name(self) -> str:
        """For tables."""
        digital = 1 - float(self.analog.mean())
        if digital == 0:
            return EXPERTS_ANALOG
        share = "" if digital == 1 else f", {digital:.1%} digital"
        return f"{self.rule}{share}, {self.bits}"

    def equals(self, other: "Candidate") -> bool:
        """Whether both run the same on the same."""
        return np.array_equal(self.analog, other.analog) and np.array_equal(self.expert_bits, other.expert_bits)


def uniform_candidate(rule: str, fraction: float | None, analog: np.ndarray, bits: int | None) -> Candidate:
    """All digital experts at the same bits; None = not quantized, which is 16 bits."""
    level = np.where(analog, 0, bits or 0)
    said = f"{bits or 16} bit{'' if bits == 1 else 's'}"
    return Candidate(
        rule=rule, fraction=fraction, bits=said, analog=analog,
        expert_bits=np.repeat(level[..., None], len(EXPERT_MATRICES), axis=-1),
    )  # fmt: skip


class Digital:
    """The values that experts stand for at every precision, so that all candidates run in one compiled program."""

    def __init__(self, model: Model, recipe: Recipe, levels: Sequence[int]) -> None:
        if recipe.method == "gptq":
            raise InputError("a search compares many precisions: use hqq or rtn, whose codes do not depend on others")
        self._model = model
        shape = (len(model.config.moe_layers), model.config.num_experts, len(EXPERT_MATRICES))
        self._by_level = {}
        for level in levels:
            quantized: Any = quantize_experts(model, np.full(shape, level), recipe)[0].params.layers.moe.experts
            parts = {name: dense(getattr(quantized, name), model.params.embed.dtype) for name in EXPERT_MATRICES}
            self._by_level[level] = FeedForward(**parts)

    def params(self, bits: Int[np.ndarray, "layers experts matrices"]) -> Params:
        """The model with every expert matrix at its bits."""
        experts = self._model.params.layers.moe.experts
        if not bits.any():
            return self._model.params
        found: dict[str, Any] = {}
        for column, name in enumerate(EXPERT_MATRICES):
            chosen = jnp.asarray(bits[..., column, None, None])
            w = getattr(experts, name)
            for level, quantized in self._by_level.items():
                w = jnp.where(chosen == level, getattr(quantized, name), w)
            found[name] = w
        return with_experts(self._model.params, FeedForward(**found))


def evaluate_candidates(
    model: Model, digital: Digital, candidates: Sequence[Candidate], spec: Any, calibration: Any, keys: jax.Array,
    batches: Batches, progress: Any,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """(summed negative log-likelihood, credit of questions) of every candidate on every chip `[candidates, seeds]`.

    One program for all: a call takes the digital weights of one set of bits, and the crossbars' targets beside them.
    """
    nll, correct = (np.zeros((len(candidates), len(keys))) for _ in range(2))
    for number, candidate in enumerate(candidates):
        plans = stack_plans([stack_plans([Plan(experts=jnp.asarray(candidate.analog))])])
        params = digital.params(candidate.expert_bits)
        for seed in range(len(keys)):
            totals = evaluate_seeds(
                params, keys[seed : seed + 1], plans, spec, calibration, batches, model.config, targets=model.params
            )
            nll[number, seed], correct[number, seed] = float(totals.nll[0, 0]), float(totals.correct[0, 0])
            progress(1)
            if not candidate.analog.any():  # nothing is random
                nll[number], correct[number] = nll[number, 0], correct[number, 0]
                progress(len(keys) - 1)
                break
    return nll, correct
