"""One bound of what analog and quantized experts change together in each layer's output, and the measured change.

For every token the experts' weighted sum changes by `sum_e g_e df_e`. An analog expert's df is random, with a bound of
its mean and of its second moment (`hetmoe.analog.second_moment`); a quantized one's is fixed, with a bound of its norm
(`hetmoe.quantize.bounds.expert`). Inputs and routing are those of the unchanged model; converters are left out, and
measured beside.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float64, Int

from hetmoe.analog.error_tail import noise_of
from hetmoe.analog.programming import program_named
from hetmoe.analog.second_moment import ExpertNoise, expert_second_moment, sum_second_moment
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.params import FeedForward
from hetmoe.models.trajectory import Trajectory, trajectory
from hetmoe.quantize.bounds.expert import Expert, activation_bound, activations, change_of
from hetmoe.quantize.bounds.weights import expert_weights
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.technologies.choices import Assignment


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerErrors:
    """Of one layer with experts; norms of output changes, `[tokens]`.

    Attributes:
        size: of the experts' weighted sum itself.
        bound: of the root mean square over noise.
        measured: root mean square over the seeds.
        deviation: standard error of the mean square over the seeds.
    """

    size: Float64[np.ndarray, "tokens"]
    bound: Float64[np.ndarray, "tokens"]
    measured: Float64[np.ndarray, "tokens"]
    deviation: Float64[np.ndarray, "tokens"]

    @property
    def violations(self) -> int:
        """Tokens whose mean square is above the squared bound by more than five standard errors."""
        return int(np.sum(np.square(self.measured) - 5 * self.deviation > np.square(self.bound)))

    def row(self) -> dict[str, float]:
        """Root mean squares over tokens, relative to the output's, and the ratio of measured to bound."""
        size, bound, measured = (float(np.sqrt(np.mean(np.square(v)))) for v in (self.size, self.bound, self.measured))
        some = self.bound > 0
        ratios = self.measured[some] / self.bound[some]
        return {
            "output": size, "bound": bound, "measured": measured,
            "relative_bound": bound / size if size else 0.0, "relative_measured": measured / size if size else 0.0,
            "tightness": float(np.median(ratios)) if some.any() else 1.0,
            "largest_tightness": float(ratios.max()) if some.any() else 1.0, "violations": self.violations,
        }  # fmt: skip


def layer_errors(
    model: Model,
    quantized: FeedForward | None,
    found: Assignment,
    spec: AnalogSpec,
    tokens: Int[Array, "sequences seq"],
    keys: jax.Array,
) -> list[LayerErrors]:
    """Bounds and measurements of every layer with experts.

    Args:
        model: not quantized.
        quantized: experts of the model with those of `found` quantized; None = none is.
        found: what runs where.
        spec: the analog hardware, right after programming.
        tokens: of a text.
        keys: one for each noise seed, at least 2.

    Raises:
        InputError: for a time after programming (whose noise has no moments in closed form), or too few seeds.
    """
    if spec.time_s is not None:
        raise InputError("errors are bounded right after programming: leave out the time, whose moments are not exact")
    if len(keys) < 2:
        raise InputError(f"errors are measured over at least 2 noise seeds, got {len(keys)}")
    kept = trajectory(model.params, tokens, model.config)
    layers = range(len(model.config.moe_layers))
    return [_layer(model, quantized, found, spec, keys, layer, kept) for layer in layers]


def _layer(
    model: Model, quantized: FeedForward | None, found: Assignment, spec: AnalogSpec, keys: jax.Array, layer: int,
    kept: Trajectory,
) -> LayerErrors:  # fmt: skip
    x = np.asarray(kept.ffn_in[layer], np.float64)
    chosen = np.asarray(kept.routing.chosen[layer])
    weights = np.asarray(kept.routing.weights[layer], np.float64)
    mean, rms = np.zeros(chosen.shape), np.zeros(chosen.shape)
    out = np.zeros_like(x)
    changes = np.zeros((len(keys), *x.shape))
    stacks = model.params.layers.moe.experts
    for expert in range(model.config.num_experts):
        where = np.nonzero(chosen == expert)
        rows = where[0]
        if not rows.size:
            continue
        clean = expert_weights(stacks, layer, expert)
        before = activations(x[rows], clean)
        share = weights[where][:, None]
        out[rows] += share * before.out
        if found.analog[layer, expert]:
            bounds = expert_second_moment(x[rows], before, clean, _noise(stacks, spec, layer, expert))
            mean[where], rms[where] = bounds.mean, bounds.rms
            for seed, key in enumerate(keys):
                noisy = _programmed(stacks, spec, key, layer, expert)
                changes[seed, rows] += share * (activations(x[rows], noisy).out - before.out)
        elif quantized is not None and found.bits[layer, expert].any():
            coarse = expert_weights(quantized, layer, expert)
            size = np.linalg.norm(x[rows], axis=1)
            mean[where] = activation_bound(change_of(clean, coarse), before, size, np.zeros(len(rows)))
            changes[:, rows] += share * (activations(x[rows], coarse).out - before.out)
    squares = np.sum(np.square(changes), axis=2)  # [seeds, tokens]
    return LayerErrors(
        size=np.linalg.norm(out, axis=1),
        bound=sum_second_moment(weights, mean, rms),
        measured=np.sqrt(squares.mean(axis=0)),
        deviation=squares.std(axis=0, ddof=1) / np.sqrt(len(keys)),
    )


def _noise(stacks: FeedForward, spec: AnalogSpec, layer: int, expert: int) -> ExpertNoise:
    return ExpertNoise(**{name: noise_of(getattr(stacks, name)[layer, expert], spec) for name in EXPERT_MATRICES})


def _programmed(stacks: FeedForward, spec: AnalogSpec, key: jax.Array, layer: int, expert: int) -> Expert:
    matrices = [
        _programmed_matrix(key, name, getattr(stacks, name)[layer, expert].astype(jnp.float32), spec, layer, expert)
        for name in EXPERT_MATRICES
    ]
    return Expert(*(np.asarray(matrix, np.float64) for matrix in matrices))


@jax.jit(static_argnames="name")
def _programmed_matrix(key: jax.Array, name: str, w: Array, spec: AnalogSpec, layer: Any, expert: Any) -> Array:
    return program_named(key, name, w, spec, layer=layer, expert=expert).w
