"""Expected increase of the loss, to second order, when one module alone is programmed on noisy devices.

Programming changes weights by independent deviations of mean b and variance s^2 (the device's own, clipping included).
With the gradient g of the loss and its Hessian replaced by the Fisher matrix F, the expected loss grows by

    g . b + (b' F b + sum_i F_ii s_i^2) / 2

F is that of the model's own predictions (`hetmoe.placement.loss_gradients`); g is taken with the text's own labels.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int

from hetmoe.analog.devices import NoiseMoments
from hetmoe.analog.noise_moments import programming_moments, sampled_moments
from hetmoe.analog.random import require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.matrices import MATRICES, crossbar_matrices, replace_matrices
from hetmoe.models.model import Model
from hetmoe.models.params import DenseLayer, Layer, Params
from hetmoe.models.transformer import LayerHook, head_matrix
from hetmoe.placement.loss_gradients import Reduce, per_sequence, tap
from hetmoe.placement.module_scores import ModuleScores, empty_scores


@struct.dataclass
class NoiseSensitivity:
    """Parts of the expected increase of the mean loss per token, in nats, of every module on its own."""

    variance: ModuleScores  # sum_i F_ii s_i^2 / 2
    bias: ModuleScores  # b' F b / 2
    gradient: ModuleScores  # g . b
    standard_error: ModuleScores  # of the sum of the three, over the sequences of the text

    @property
    def total(self) -> ModuleScores:
        """The expected increase."""
        return jax.tree.map(lambda *parts: sum(parts), self.variance, self.bias, self.gradient)


def _gradient_moments(
    moments_of: Callable[[Array, Any], NoiseMoments], gradient: Array, w: Array, source: Any
) -> Float[Array, "*experts 2"]:
    """(sum g^2 s^2, g . b) of one matrix, per expert if stacked."""
    moments = moments_of(w, source)
    spread = jnp.sum(jnp.square(gradient) * moments.variance, axis=(-2, -1))
    pulled = jnp.sum(gradient * moments.mean, axis=(-2, -1))
    return jnp.stack([spread, pulled], axis=-1)


def _given(w: Array, moments: NoiseMoments) -> NoiseMoments:
    del w  # Unused.
    return moments


def noise_sensitivity(
    model: Model,
    windows: Int[Array, "sequences context"],
    spec: AnalogSpec,
    *,
    key: jax.Array,
    dense: bool,
    chips: int = 8,
) -> NoiseSensitivity:
    """Expected loss increase of every module under the programming noise (drift, static read noise) of `spec`.

    Converters and per-product read noise are not part of it.

    Args:
        model: the model.
        windows: text; each row predicts its tokens from the second on. Two backward passes per row, one per loss.
        spec: device, noise scale, time. Without a time the moments of the noise are exact; with one they are estimated
            from `chips` programmings, and the estimate of the squared bias is corrected for the error of its mean.
        key: of the sampled labels, and of the chips.
        dense: also attention, shared experts, dense layers and the LM head.
        chips: programmings that moments at a given time are estimated from.

    Raises:
        InputError: for tokens outside the vocabulary, fewer than two sequences, or chips below 2.
    """
    require_key(key)
    check_tokens(windows, model.config)
    if windows.ndim != 2 or windows.shape[0] < 2 or windows.shape[1] < 2:
        raise InputError(f"noise_sensitivity needs windows [at least 2, at least 2] of text, got {list(windows.shape)}")
    label_key, chip_key = jax.random.split(key)
    sampled = None if spec.time_s is None else sampled_moments(chip_key, model.params, spec, dense=dense, chips=chips)
    keys = jax.random.split(label_key, windows.shape[0])
    sums = _per_sequence(model.params, windows, keys, spec, sampled, model.config, dense)
    share = 0.0 if sampled is None else 1.0 / chips
    per_token = windows.shape[0] / windows[:, 1:].size  # the mean over sequences of a sum over tokens, per token

    def reduce(spread: Any, pulled: Any, gradient: Any) -> tuple[np.ndarray, ...]:
        spread, pulled, gradient = (np.asarray(v, np.float64) * per_token for v in (spread, pulled, gradient))
        variance, bias = spread / 2, (np.square(pulled) / per_token - share * spread) / 2
        total = variance + bias + gradient
        error = np.std(total, axis=0, ddof=1) / np.sqrt(len(total))
        return (*(np.mean(v, axis=0) for v in (variance, bias, gradient)), error)

    parts = jax.tree.map(reduce, *sums)
    pick = [jax.tree.map(lambda p, i=i: p[i], parts, is_leaf=lambda p: isinstance(p, tuple)) for i in range(4)]
    return NoiseSensitivity(variance=pick[0], bias=pick[1], gradient=pick[2], standard_error=pick[3])


@functools.partial(jax.jit, static_argnames=("config", "dense"))
def _per_sequence(
    params: Params,
    windows: Array,
    keys: jax.Array,
    spec: AnalogSpec,
    sampled: Any,
    config: ModelConfig,
    dense: bool,
) -> tuple[ModuleScores, ModuleScores, ModuleScores]:
    """`sum g^2 s^2` and `g . b` for sampled labels, `g . b` for the text's own; leaves `[sequences, ...]`."""
    moments_of = programming_moments if sampled is None else _given
    reduce = functools.partial(_gradient_moments, moments_of)

    def tapped(slots: ModuleScores) -> tuple[LayerHook, Array]:
        head: Any = head_matrix(params)
        if slots.lm_head is not None:
            head = tap(reduce, head, slots.lm_head, spec if sampled is None else sampled.lm_head)
        return _hook(slots, spec, sampled, config, reduce), head

    def keep(of_sampled: ModuleScores, of_own: ModuleScores) -> tuple[ModuleScores, ModuleScores, ModuleScores]:
        return (
            jax.tree.map(lambda v: v[..., 0], of_sampled),
            jax.tree.map(lambda v: v[..., 1], of_sampled),
            jax.tree.map(lambda v: v[..., 1], of_own),
        )

    slots = empty_scores(config, dense=dense, last=(2,))
    return per_sequence(params, windows, keys, slots, tapped, keep, config)


def _hook(slots: ModuleScores, spec: AnalogSpec, sampled: Any, config: ModelConfig, reduce: Reduce) -> LayerHook:
    """Taps every matrix whose module has a slot."""
    moe, plain = list(config.moe_layers), list(config.dense_layers)
    attention = slots.attention

    def change(layer: Layer | DenseLayer, extra: tuple[dict[str, Array], Any]) -> Layer | DenseLayer:
        mine, moments = extra
        tapped: dict[str, Array] = {}
        for name, w in crossbar_matrices(layer).items():
            if (module := MATRICES[name].module) in mine:
                tapped[name] = tap(reduce, w, mine[module], spec if moments is None else moments[name])
        return replace_matrices(layer, tapped)

    def part(named: dict[str, Any], numbers: list[int]) -> dict[str, Any]:
        named = {name: slot for name, slot in named.items() if slot is not None}
        return named if attention is None else {**named, "attention": attention[np.asarray(numbers)]}

    of_layers = part({"experts": slots.experts, "shared_experts": slots.shared_experts}, moe)
    of_plain = part({"dense_ffn": slots.dense_ffn}, plain) if plain else {}
    return LayerHook(
        change=change,
        layers=(of_layers, None if sampled is None else sampled.layers),
        dense_layers=(of_plain, None if sampled is None else sampled.dense_layers),
    )
