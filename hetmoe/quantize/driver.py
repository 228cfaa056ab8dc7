"""Quantizing the experts of a model, layer after layer."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.model import Model
from hetmoe.models.params import FeedForward, with_experts
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import BITS
from hetmoe.quantize.hessian import check_calibration
from hetmoe.quantize.layer import LayerQuantized, Pools, quantize_layer
from hetmoe.quantize.layer_inputs import Activations
from hetmoe.quantize.levels import used_levels
from hetmoe.quantize.mixed import MixedMatrix, make_mixed, refuse_quantized
from hetmoe.quantize.partial import PartialRun
from hetmoe.quantize.recipe import Recipe

CALIBRATION_BATCH = 8  # windows run at once

Bits = Int[np.ndarray, "layers experts matrices"]


def quantize_experts(
    model: Model,
    bits: Bits,
    recipe: Recipe,
    *,
    windows: Int[Any, "sequences context"] | None = None,
    partial: PartialRun | None = None,
    progress: Callable[[int], Any] | None = None,
) -> tuple[Model, list[dict[str, Any]]]:
    """A model whose experts are quantized.

    For GPTQ every layer's Hessians are of inputs that went through the layers before it as quantized, and through its
    own matrices as they were.

    Args:
        model: not quantized.
        bits: of each of `EXPERT_MATRICES` of every expert, 0 = stays as it is.
        recipe: quantiser and grids.
        windows: calibration text, for `gptq`.
        partial: where finished layers are kept, and taken from; None = nowhere.
        progress: called with the number of each finished layer (of those with experts).

    Returns:
        the model, and what `quantize_layer` says of each layer with experts.

    Raises:
        InputError: for a model that is quantized, bits that do not exist or do not fit the model, groups that do not
            divide a matrix's rows, weights that are not finite, and calibration text that is missing or too short.
    """
    refuse_quantized(model.params, "hetmoe cannot quantize again")
    config, experts = model.config, model.params.layers.moe.experts
    _check(config, bits, recipe)
    activations = None
    if recipe.method == "gptq":
        activations = Activations(model.params.embed, _calibration(windows, config), config, CALIBRATION_BATCH)
    done: list[LayerQuantized] = []
    for layer in range(config.num_layers):
        is_moe = layer in config.moe_layers
        if not is_moe:
            if activations is not None:
                activations.advance(_layer(model.params.dense_layers, config.dense_layers.index(layer)))
            continue
        place = len(done)
        stack = _layer(model.params.layers, place)
        matrices: dict[str, Array] = {name: getattr(stack.moe.experts, name) for name in EXPERT_MATRICES}
        found = None if partial is None else partial.load(place, _shapes(experts), _counts(bits[place]), recipe)
        if found is None:
            hessians = None if activations is None else activations.hessians(stack)
            found = quantize_layer(matrices, bits[place], recipe, hessians, name=f"layer {layer}")
            if partial is not None:
                partial.save(place, found)
        if activations is not None:
            new = FeedForward(**found.weights(matrices, bits[place]))
            activations.advance(stack.replace(moe=stack.moe.replace(experts=new)))
        done.append(found)
        if progress is not None:
            progress(place)
    mixed = {
        name: assemble(getattr(experts, name), bits[..., column], name, [d.pools for d in done])
        for column, name in enumerate(EXPERT_MATRICES)
    }
    params = with_experts(model.params, FeedForward(**mixed))
    return dataclasses.replace(model, params=params), [d.facts for d in done]


def assemble(w: Array, bits: Int[np.ndarray, "layers experts"], name: str, layers: list[Pools]) -> MixedMatrix:
    """One matrix of all experts: pools of one precision each, lowest first, and last what is not quantized."""
    pools: list[Any] = []
    pool_of = np.empty(bits.shape, np.int64)
    for level in used_levels(bits):
        pool_of[bits == level] = len(pools)
        parts = [pools[name, level] for pools in layers if (name, level) in pools]
        pools.append(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts))
    if np.any(bits == 0):
        pool_of[bits == 0] = len(pools)
        pools.append(w[np.nonzero(bits == 0)])
    return make_mixed(pools, pool_of)


def _layer(stack: Any, place: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[place], stack)


def _shapes(experts: FeedForward) -> dict[str, tuple[int, int]]:
    return {name: tuple(getattr(experts, name).shape[2:]) for name in EXPERT_MATRICES}


def _counts(bits: Int[np.ndarray, "experts matrices"]) -> dict[str, dict[int, int]]:
    counters = {name: collections.Counter(bits[:, column].tolist()) for column, name in enumerate(EXPERT_MATRICES)}
    return {name: {level: n for level, n in counter.items() if level} for name, counter in counters.items()}


def _check(config: ModelConfig, bits: Bits, recipe: Recipe) -> None:
    wanted = (len(config.moe_layers), config.num_experts, len(EXPERT_MATRICES))
    if bits.shape != wanted:
        raise InputError(f"bits has the shape {list(bits.shape)}; this model needs {list(wanted)}")
    levels = used_levels(bits)
    if unknown := sorted(set(levels) - set(BITS)):
        raise InputError(f"bits={unknown[0]} does not exist: use {', '.join(map(str, BITS))}, or 0 for none")
    if not levels:
        raise InputError("no expert gets any bits: nothing is to be quantized")
    check_groups(config, recipe, levels)


def check_groups(config: ModelConfig, recipe: Recipe, levels: Sequence[int]) -> None:
    """Raises InputError unless the groups of all levels divide the rows of the experts' matrices."""
    for name, rows in (("gate and up", config.hidden_size), ("down", config.expert_intermediate_size)):
        for level in levels:
            try:
                recipe.grid(level).groups_of(rows)
            except InputError as error:
                raise InputError(f"experts' {name}: {error}") from None


def _calibration(windows: Any, config: ModelConfig) -> Any:
    if windows is None or windows.ndim != 2 or not windows.size:
        raise InputError("GPTQ needs calibration text: windows [sequences, context] of tokens")
    check_tokens(jnp.asarray(windows), config)
    # Every token reaches `experts_per_token` experts of the layer.
    check_calibration(windows.size, config.hidden_size, "gate")
    check_calibration(windows.size * config.experts_per_token, config.expert_intermediate_size, "down")
    return windows
