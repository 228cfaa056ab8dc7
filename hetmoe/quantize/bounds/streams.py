"""Residual streams of the clean and the quantized models, side by side, through attention and dense networks."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from hetmoe.models.config import ModelConfig
from hetmoe.quantize.bounds.attention import Heads, attention, project
from hetmoe.quantize.bounds.attention_change import attention_change
from hetmoe.quantize.bounds.attention_norms import attention_norms
from hetmoe.quantize.bounds.dense_network import dense_network
from hetmoe.quantize.bounds.rms_norm import norm_change, rms_norm
from hetmoe.quantize.bounds.rounding import rounding, widened

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Streams:
    """Residual streams `[batch, seq, hidden]`, and bounds `[batch, seq]` of their distance from the clean one.

    `runs` of quantized models are by reading ("one_layer", "whole_model"); `radii` are by reading and by what they
    start from ("bound", "measured").
    """

    clean: Array
    runs: dict[str, Array]
    radii: dict[str, dict[str, Array]]

    def moved(self, clean: Array, runs: dict[str, Array], change: Callable[[list[Array]], list[Array]]) -> "Streams":
        """After something is added, whose changes for some radii are bounded by `change(radii)`."""
        places = [(reading, start) for reading, part in self.radii.items() for start in part]
        before = [self.radii[reading][start] for reading, start in places]
        radii: dict[str, dict[str, Array]] = {reading: {} for reading in self.radii}
        for (reading, start), radius, moved in zip(places, before, change(before), strict=True):
            radii[reading][start] = radius_of_sum(radius, moved, clean)
        return Streams(clean, runs, radii)


def radius_of_sum(radius: Array, change: Array, result: Array) -> Array:
    """Bounds the change of a sum by those of its terms, with the rounding of the addition."""
    total = radius + change
    return widened(total) + rounding(1, np.linalg.norm(result, axis=-1) + total)


def after_attention(streams: Streams, layer: Any, config: ModelConfig) -> Streams:
    """Behind the attention of a layer with weights in float64."""
    weights, eps = layer.attention, config.rms_norm_eps

    def heads_of(x: Array) -> Heads:
        return project(layer.input_norm * rms_norm(x, eps), weights, config)

    heads, norms = heads_of(streams.clean), attention_norms(layer.input_norm, weights, config)

    def change(radii: list[Array]) -> list[Array]:
        normed = [norm_change(streams.clean, radius, eps) for radius in radii]
        return attention_change(heads, norms, weights, normed, config)

    runs = {name: x + attention(heads_of(x), weights, config) for name, x in streams.runs.items()}
    return streams.moved(streams.clean + attention(heads, weights, config), runs, change)


def ffn_inputs(x: Array, layer: Any, config: ModelConfig) -> Array:
    """What the second half of a layer reads, `[tokens, hidden]`."""
    return (layer.ffn_norm * rms_norm(x, config.rms_norm_eps)).reshape(-1, x.shape[-1])


def ffn_radius(x: Array, radius: Array, config: ModelConfig) -> Array:
    """How far that may move without the norm's gain, `[tokens]`."""
    return norm_change(x, radius, config.rms_norm_eps).reshape(-1)


def after_dense(streams: Streams, layer: Any, config: ModelConfig) -> Streams:
    """Behind the feed-forward network of a layer without experts."""
    network, shape, gain = dense_network(layer.ffn), streams.clean.shape, float(np.abs(layer.ffn_norm).max())

    def add(x: Array) -> Array:
        return x + network.out(ffn_inputs(x, layer, config)).reshape(shape)

    inputs = ffn_inputs(streams.clean, layer, config)

    def change(radii: list[Array]) -> list[Array]:
        normed = (gain * ffn_radius(streams.clean, radius, config) for radius in radii)
        return [network.change(inputs, radius).reshape(shape[:2]) for radius in normed]

    return streams.moved(add(streams.clean), {name: add(x) for name, x in streams.runs.items()}, change)
