"""Placements by rule, the same for every command that compares them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.spec import AnalogSpec
from hetmoe.evaluate.noise_sweep import Placement, random_placement
from hetmoe.evaluate.prepare import placement_keys
from hetmoe.evaluate.text import Windows
from hetmoe.models.model import Model
from hetmoe.placement.plan import place
from hetmoe.placement.scores import DEVICE_RULES, RANDOM, score_experts

SCORE_STREAM = 2  # folded into a seed's key: chips that scores are measured on are not those that are evaluated


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scorer:
    """What rules look at. `sample` is text that is not evaluated."""

    model: Model
    sample: Windows
    down_axis: str
    seed: int
    calibration: Calibration | None

    def scores(self, rule: str, spec: AnalogSpec) -> np.ndarray:
        """Scores `[layers, experts]` by a rule that is not drawn anew for every seed.

        `spec` is the hardware that the rules which depend on one are scored for (`scoring_scale`).
        """
        tokens, key = None, None
        if rule.startswith("activation"):
            tokens = jnp.asarray(self.sample.tokens[:, :-1])
        elif rule in DEVICE_RULES:
            tokens, key = jnp.asarray(self.sample.tokens), jax.random.fold_in(jax.random.key(self.seed), SCORE_STREAM)
        axis: Any = self.down_axis
        return np.asarray(
            score_experts(
                self.model,
                rule,
                key=key,
                tokens=tokens,
                down_axis=axis,
                spec=spec,
                calibration=self.calibration,
                jobs=2 if jax.default_backend() == "cpu" else 1,
            )
        )

    def placements(self, rule: str, fractions: Sequence[float], seeds: int, spec: AnalogSpec) -> list[Placement]:
        """The rule at every fraction of digital experts; `random` is drawn anew for each of `seeds` noise seeds."""
        if rule == RANDOM:
            keys = placement_keys(self.seed, seeds)
            return [random_placement(f"random {f:.1%} digital", self.model, f, keys) for f in fractions]
        scores = self.scores(rule, spec)
        return [Placement(name=f"{rule} {f:.1%} digital", plans=[place(scores, f)]) for f in fractions]


def scoring_scale(noise_scales: Sequence[float]) -> float:
    """The noise scale that device-dependent rules are scored at: the largest, where the signal is; 1 without noise."""
    return max(noise_scales) or 1.0
