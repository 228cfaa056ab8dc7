"""One layer with experts: what is certified of its router, and how far its output moves."""

import dataclasses
from typing import Any

import numpy as np

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import FeedForward
from hetmoe.quantize.bounds.certificate import LayerCertificate, Reading
from hetmoe.quantize.bounds.dense_network import dense_network
from hetmoe.quantize.bounds.experts_pass import ExpertsPass, run_experts
from hetmoe.quantize.bounds.rounding import rounding, widened
from hetmoe.quantize.bounds.routing import Routed, choose, largest
from hetmoe.quantize.bounds.routing_change import (
    RouterNorms,
    certain_sets,
    largest_weights,
    router_norms,
    weight_change,
)
from hetmoe.quantize.bounds.streams import Streams, ffn_inputs, ffn_radius, radius_of_sum

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class _Router:
    """The clean run's decisions in one layer, with what bounds of their changes need."""

    norms: RouterNorms
    bias: Array | None
    routed: Routed
    config: ModelConfig

    def reading(self, run: Routed, radii: dict[str, Array]) -> tuple[Reading, dict[str, Array]]:
        """Of a quantized run whose normed states are within `radii`, and by start which sets are certain."""
        certain = {
            start: certain_sets(self.routed, self.norms, r, self.bias, self.config) for start, r in radii.items()
        }
        change = np.abs(run.logits - self.routed.logits)
        bounds = {start: self.norms.logit_radius(radius) for start, radius in radii.items()}
        reading = Reading(
            certified=certain["bound"],
            certified_measured=certain["measured"],
            changed=self.routed.differs(run),
            logit_bound=np.max(bounds["bound"], axis=1),
            logit_change=np.max(change, axis=1),
            logits_above=np.array(sum(np.sum(change > bound) for bound in bounds.values())),
        )
        return reading, certain

    def sum_change(self, radius: Array, certain: Array, size: Array, done: ExpertsPass, start: str) -> Array:
        """Bounds the change of the experts' weighted sum.

        Where the set is certain `|g' f' - g f| <= g' |f' - f| + |g' - g| |f|` for each chosen expert. Elsewhere other
        experts may be chosen: the old sum may vanish, and the new one is at most that of the experts with the largest
        products of weight and output that may come about.

        Args:
            radius: of the normed state without gain.
            certain: whether the set is.
            size: bounds `|x'|` of the inputs.
            done: of the experts.
            start: of the bounds.
        """
        turned = weight_change(self.routed, self.norms, radius, self.config)
        moved, weights = done.moved[start], np.abs(self.routed.weights)
        same_set = np.sum((weights + turned) * moved + turned * done.size, axis=1)
        each, total = largest_weights(self.routed, self.norms, radius, self.config)
        products = each * done.largest * np.square(size)[:, None]
        most = np.take_along_axis(products, largest(products, self.config.experts_per_token), axis=1)
        at_once = total * np.max(done.largest) * np.square(size)
        another = np.sum(weights * done.size, axis=1) + np.minimum(np.sum(most, axis=1), at_once)
        bound = np.where(certain, np.minimum(same_set, another), another)
        return widened(bound) + rounding(2 * weights.shape[1], np.sum(weights * done.size, axis=1) + bound)


def after_experts(
    streams: Streams, layer: Any, clean: FeedForward, quantized: FeedForward, index: int, config: ModelConfig
) -> tuple[Streams, LayerCertificate]:
    """Streams behind the layer, and its certificate.

    Args:
        streams: behind attention.
        layer: weights in float64, without routed experts.
        clean: stacks of routed experts.
        quantized: likewise.
        index: of the layer, among those with experts.
        config: of the model.
    """
    shape, gain, moe = streams.clean.shape, float(np.abs(layer.ffn_norm).max()), layer.moe
    x = ffn_inputs(streams.clean, layer, config)
    inputs = {name: ffn_inputs(run, layer, config) for name, run in streams.runs.items()}
    router = _Router(
        router_norms(layer.ffn_norm, moe.router), moe.selection_bias,
        choose(x @ moe.router, moe.selection_bias, config), config,
    )  # fmt: skip
    runs = {name: choose(values @ moe.router, moe.selection_bias, config) for name, values in inputs.items()}
    radii = {
        name: {start: ffn_radius(streams.clean, radius, config) for start, radius in part.items()}
        for name, part in streams.radii.items()
    }
    readings = {name: router.reading(run, radii[name]) for name, run in runs.items()}
    whole, certain = readings["whole_model"]
    done = run_experts(
        clean, quantized, index, x, router.routed, inputs["whole_model"], runs["whole_model"],
        {start: gain * radius for start, radius in radii["whole_model"].items()}, config,
    )  # fmt: skip
    shared = None if moe.shared is None else dense_network(moe.shared, moe.shared_gate)

    def behind(stream: Array, values: Array, out: Array) -> Array:
        return stream + (out if shared is None else out + shared.out(values)).reshape(shape)

    def whole_radius(start: str) -> Array:
        radius = radii["whole_model"][start]
        size = np.minimum(np.linalg.norm(x, axis=1) + gain * radius, gain * shape[-1] ** 0.5)
        change = router.sum_change(radius, certain[start], size, done, start)
        if shared is not None:
            change = change + shared.change(x, gain * radius)
        return radius_of_sum(streams.radii["whole_model"][start], change.reshape(shape[:2]), after)

    after = behind(streams.clean, x, done.out)
    one = _own_change(router.routed, done)
    still = np.zeros(shape[:2])
    certificate = LayerCertificate(
        chosen=router.routed.chosen, altered=done.altered,
        expert_error=done.error, expert_bound=done.bound, expert_norm_bound=done.norm_bound,
        output_error=np.linalg.norm(done.out_quantized - done.out, axis=1), output_bound=one["bound"],
        one_layer=readings["one_layer"][0] if "one_layer" in readings else None, whole_model=whole,
    )  # fmt: skip
    return Streams(
        after,
        {
            "one_layer": behind(streams.clean, x, done.out_quantized),
            "whole_model": behind(streams.runs["whole_model"], inputs["whole_model"], done.out_run),
        },
        {
            "one_layer": {s: radius_of_sum(still, r.reshape(shape[:2]), after) for s, r in one.items()},
            "whole_model": {s: whole_radius(s) for s in radii["whole_model"]},
        },
    ), certificate


def _own_change(routed: Routed, done: ExpertsPass) -> dict[str, Array]:
    """By start, bounds of what this layer's quantized experts change of their weighted sum at clean inputs."""
    bound, weights = np.minimum(done.bound, done.norm_bound), np.abs(routed.weights)
    lost = rounding(2 * weights.shape[1], np.sum(weights * (done.size + bound), axis=1))
    measured = np.linalg.norm(done.out_quantized - done.out, axis=1)
    return {"bound": widened(np.sum(weights * bound, axis=1)) + lost, "measured": widened(measured) + lost}
