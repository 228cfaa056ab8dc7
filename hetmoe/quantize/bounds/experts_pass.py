"""All routed experts of one layer, one after the other: clean, quantized, and the bounds of the difference."""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float64

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import FeedForward
from hetmoe.quantize.bounds.expert import activation_bound, activations, change_of, norm_bound, norms, unchanged
from hetmoe.quantize.bounds.routing import Routed
from hetmoe.quantize.bounds.weights import expert_weights

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class ExpertsPass:
    """Results of one layer's experts; `[tokens, copies]` are those of each token's chosen experts in the clean run."""

    out: Float64[Array, "tokens hidden"]  # weighted sum, clean
    out_quantized: Float64[Array, "tokens hidden"]  # by quantized experts, with the clean run's inputs and routing
    out_run: Float64[Array, "tokens hidden"]  # by quantized experts, with the quantized run's inputs and routing
    size: Float64[Array, "tokens copies"]  # of clean outputs
    error: Float64[Array, "tokens copies"]  # measured change of the outputs at clean inputs
    bound: Float64[Array, "tokens copies"]  # of that, from activations
    norm_bound: Float64[Array, "tokens copies"]
    altered: Bool[Array, "tokens copies"]  # whether the expert's weights differ at all
    moved: dict[str, Array]  # by start, `[tokens, copies]`: bounds at inputs within the radius
    largest: Float64[Array, "experts"]  # bounds |f'(x)| / |x|^2


def run_experts(
    clean: FeedForward,
    quantized: FeedForward,
    layer: int,
    x: Float64[Array, "tokens hidden"],
    routed: Routed,
    run_x: Float64[Array, "tokens hidden"],
    run_routed: Routed,
    radii: dict[str, Array],
    config: ModelConfig,
) -> ExpertsPass:
    """Runs the experts of layer `layer` (of those with experts).

    Args:
        clean: stacks of all layers.
        quantized: likewise.
        layer: which of them.
        x: inputs in the clean run.
        routed: routing in the clean run.
        run_x: inputs in a run with quantized experts.
        run_routed: routing in that run.
        radii: by start ("bound", "measured"), how far inputs may be from `x`, `[tokens]`.
        config: of the model.
    """
    size = np.linalg.norm(x, axis=1)
    out, out_quantized, out_run = np.zeros_like(x), np.zeros_like(x), np.zeros_like(x)
    copies = {name: np.zeros(routed.chosen.shape) for name in ("size", "error", "bound", "norm_bound")}
    altered = np.zeros(routed.chosen.shape, bool)
    moved = {start: np.zeros(routed.chosen.shape) for start in radii}
    largest = np.zeros(config.num_experts)
    for expert in range(config.num_experts):
        old, new = expert_weights(clean, layer, expert), expert_weights(quantized, layer, expert)
        where = np.nonzero(routed.chosen == expert)
        rows = where[0]
        run_where = np.nonzero(run_routed.chosen == expert)
        out_run[run_where[0]] += run_routed.weights[run_where][:, None] * activations(run_x[run_where[0]], new).out
        if not rows.size:
            largest[expert] = norms(new).output
            continue
        altered[where] = any(np.any(before != after) for before, after in zip(old.matrices, new.matrices, strict=True))
        change = change_of(old, new)
        largest[expert] = change.changed.output
        before, after = activations(x[rows], old), activations(x[rows], new)
        out[rows] += routed.weights[where][:, None] * before.out
        out_quantized[rows] += routed.weights[where][:, None] * after.out
        by_norm = norm_bound(change, size[rows])
        copies["size"][where] = np.linalg.norm(before.out, axis=1)
        copies["error"][where] = np.linalg.norm(after.out - before.out, axis=1)
        copies["norm_bound"][where] = by_norm
        copies["bound"][where] = activation_bound(change, before, size[rows], np.zeros(len(rows)))
        for start, radius in radii.items():
            if start == "measured":
                same = activation_bound(unchanged(change.changed), after, size[rows], radius[rows])
                moved[start][where] = copies["error"][where] + same
            else:
                moved[start][where] = activation_bound(change, before, size[rows], radius[rows])
    return ExpertsPass(
        out=out, out_quantized=out_quantized, out_run=out_run, size=copies["size"], error=copies["error"],
        bound=copies["bound"], norm_bound=copies["norm_bound"], altered=altered, moved=moved, largest=largest,
    )  # fmt: skip
