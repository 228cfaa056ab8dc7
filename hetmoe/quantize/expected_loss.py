"""Expected increase of the loss, to second order, when one expert matrix alone is quantized.

The change d of the weights is known, dequantized less original. With the gradient g of the loss and its Hessian
replaced by the Fisher matrix F of the model's own predictions, the loss grows by

    g . d + d' F d / 2

as in `hetmoe.placement.noise_sensitivity`, whose deviations are random. F is not taken to be diagonal: within a matrix
d' F d is the mean square of the projections of one sequence's gradient on d.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.analog.random import require_key
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.matrices import crossbar_matrices, replace_matrices
from hetmoe.models.model import Model
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.models.transformer import LayerHook, head_matrix
from hetmoe.placement.loss_gradients import per_sequence, tap
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import Quantized, dequantize
from hetmoe.quantize.mixed import refuse_quantized

Levels = dict[str, tuple[Quantized, ...]]


@struct.dataclass
class ExpectedIncrease:
    """Parts of the expected increase of the mean loss per token, nats, of every expert matrix on its own; float64.

    Matrices are in the order of `EXPERT_MATRICES`, levels in that of what was given.
    """

    gradient: Float[np.ndarray, "layers experts matrices levels"]  # g . d
    curvature: Float[np.ndarray, "layers experts matrices levels"]  # d' F d / 2, at least 0
    expert_curvature: Float[np.ndarray, "layers experts levels"]  # the same with all matrices of an expert changed
    standard_error: Float[np.ndarray, "layers experts matrices levels"]  # of their sum, over the sequences of the text

    @property
    def total(self) -> Float[np.ndarray, "layers experts matrices levels"]:
        """The expected increase; below 0 where the text's gradient says that quantizing helps."""
        return self.gradient + self.curvature


def expected_increase(
    model: Model,
    windows: Int[Array, "sequences context"],
    quantized: Mapping[str, Sequence[Quantized]],
    *,
    key: jax.Array,
) -> ExpectedIncrease:
    """Expected loss increase of every expert matrix at every level that it was quantized to, by any quantiser.

    Args:
        model: the model, not quantized.
        windows: text; each row predicts its tokens from the second on. Two backward passes per row, one per loss.
        quantized: for each of `EXPERT_MATRICES` that matrix of all experts, `[moe_layers, experts, K, N]`, once per
            level. One call per level takes less memory; for the same key it draws the same labels.
        key: of the sampled labels.

    Raises:
        InputError: for tokens outside the vocabulary, fewer than two sequences, matrices that are missing, of other
            shapes than the model's or of different numbers of levels, and for results that are not finite.
    """
    require_key(key)
    check_tokens(windows, model.config)
    if windows.ndim != 2 or windows.shape[0] < 2 or windows.shape[1] < 2:
        raise InputError(f"expected_increase needs windows [at least 2, at least 2] of text, got {list(windows.shape)}")
    levels = _checked(model, quantized)
    keys = jax.random.split(key, windows.shape[0])
    of_sampled, of_own = _per_sequence(model.params, windows, keys, levels, model.config)
    tokens = windows.shape[1] - 1  # of one sequence
    own, sampled = (
        np.stack([np.asarray(part[name], np.float64) for name in EXPERT_MATRICES], axis=-2)
        for part in (of_own, of_sampled)
    )
    gradient, curvature = own / tokens, np.square(sampled) / (2 * tokens)
    total = gradient + curvature
    if not np.isfinite(total).all():
        raise InputError("the expected increase is not finite: are there NaN or infinite weights?")
    return ExpectedIncrease(
        gradient=np.mean(gradient, axis=0),
        curvature=np.mean(curvature, axis=0),
        expert_curvature=np.mean(np.square(sampled.sum(axis=-2)), axis=0) / (2 * tokens),
        standard_error=np.std(total, axis=0, ddof=1) / np.sqrt(len(total)),
    )


def _checked(model: Model, quantized: Mapping[str, Sequence[Quantized]]) -> Levels:
    refuse_quantized(model.params, "expected_increase is not of")
    if set(quantized) != set(EXPERT_MATRICES):
        raise InputError(f"quantized holds {', '.join(sorted(quantized))}: give {', '.join(EXPERT_MATRICES)}")
    counts = {name: len(quantized[name]) for name in EXPERT_MATRICES}
    if len(set(counts.values())) != 1 or not counts["gate"]:
        raise InputError(f"every matrix needs the same levels, at least one; got {counts}")
    for name in EXPERT_MATRICES:
        wanted = getattr(model.params.layers.moe.experts, name).shape
        for level in quantized[name]:
            if level.codes.shape != wanted:
                raise InputError(f"quantized {name} has the shape {list(level.codes.shape)}, not {list(wanted)}")
    return {name: tuple(quantized[name]) for name in EXPERT_MATRICES}


@functools.partial(jax.jit, static_argnames="config")
def _per_sequence(
    params: Params, windows: Array, keys: jax.Array, levels: Levels, config: ModelConfig
) -> tuple[dict[str, Array], dict[str, Array]]:
    """`g . d` for sampled labels and for the text's own; `[sequences, layers, experts, levels]` by matrix."""
    slots = {name: jnp.zeros((*q[0].codes.shape[:2], len(q))) for name, q in levels.items()}

    def change(layer: Layer | DenseLayer, extra: Any) -> Layer | DenseLayer:
        if isinstance(layer, DenseLayer):
            return layer
        mine, sources = extra
        plain = crossbar_matrices(layer, dense=False)
        return replace_matrices(layer, {n: tap(_projections, w, mine[n], sources[n]) for n, w in plain.items()})

    def tapped(slots: dict[str, Array]) -> tuple[LayerHook, Array]:
        return LayerHook(change=change, layers=(slots, levels), dense_layers=()), head_matrix(params)

    def keep(of_sampled: dict[str, Array], of_own: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
        return of_sampled, of_own

    return per_sequence(params, windows, keys, slots, tapped, keep, config)


def _projections(gradient: Array, w: Array, levels: tuple[Quantized, ...]) -> Float[Array, "experts levels"]:
    changes = (dequantize(level) - w.astype(jnp.float32) for level in levels)
    return jnp.stack([jnp.sum(gradient * change, axis=(-2, -1)) for change in changes], axis=-1)
