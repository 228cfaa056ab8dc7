"""Loss change when one module alone is analog, measured over noise seeds.

For experts the digital model is run once and kept. An expert on noisy devices changes its layer's output only for the
tokens routed to it, so that of each (expert, seed) only this difference and the layers behind it are computed; behind
the last layer only the tokens it touches. One compiled function serves all layers, experts and seeds of a model.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import program_named
from hetmoe.analog.read_noise import ReadDraw
from hetmoe.analog.spec import AnalogSpec
from hetmoe.evaluate.run import READ_STREAM, Batches, evaluate_digital, evaluate_seeds
from hetmoe.models.config import ModelConfig
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.matrices import MATRICES, Matrix
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.trajectory import Trajectory, resume, trajectory
from hetmoe.models.transformer import head_matrix
from hetmoe.ops.crossbar_matmul.xla import crossbar_matmul
from hetmoe.ops.narrow import take
from hetmoe.placement.module_scores import ModuleScores
from hetmoe.placement.plan import Plan, all_digital, plan_shapes, stack_plans


@struct.dataclass
class Measured:
    """Increase of the mean loss per token, nats, `[seeds, ...]` per module; every seed is the same chip for all."""

    per_seed: ModuleScores

    @property
    def mean(self) -> ModuleScores:
        """Mean over seeds."""
        return jax.tree.map(lambda v: np.mean(v, axis=0), self.per_seed)

    @property
    def standard_error(self) -> ModuleScores:
        """Standard error of that mean; needs two seeds."""
        return jax.tree.map(lambda v: np.std(v, axis=0, ddof=1) / np.sqrt(len(v)), self.per_seed)


@struct.dataclass
class _Clean:
    """The digital pass of one batch, with its number among the batches."""

    number: Array
    batch: Batches
    kept: Trajectory
    log_probs: Float[Array, "tokens"]


@functools.partial(jax.jit, static_argnames="config")
def _clean(params: Params, number: Array, batch: Batches, config: ModelConfig) -> _Clean:
    kept = trajectory(params, batch.tokens[:, :-1], config)
    flat = kept.hidden.reshape(-1, config.hidden_size)
    log_probs = _log_probs(params, flat, batch.tokens[:, 1:].reshape(-1))
    return _Clean(number=number, batch=batch, kept=kept, log_probs=log_probs)


def _log_probs(params: Params, hidden: Array, targets: Array) -> Array:
    head = head_matrix(params)

    def logits_of(rows: Array, first: Array) -> Array:
        del first  # numbers the rows for read noise, which a digital head does not have
        return jnp.matmul(rows, head, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)

    return choice_log_probs(logits_of, hidden, targets[:, None])[:, 0]


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def _increase(
    params: Params,
    clean: _Clean,
    layer: Array,
    experts: Array,
    keys: jax.Array,
    spec: AnalogSpec,
    calibration: Calibration | None,
    config: ModelConfig,
    capacity: int,
) -> Float[Array, "experts seeds"]:
    """Increase of the summed loss of one batch, for some experts of layer `layer` (of those with experts)."""
    batch, kept = clean.batch, clean.kept
    targets, tokens = batch.tokens[:, 1:].reshape(-1), kept.ffn_in.shape[1]
    weight = jnp.broadcast_to(batch.weight[:, None], batch.tokens[:, 1:].shape).reshape(-1)
    number = jnp.asarray(config.moe_layers)[layer]
    ffn_in, out = kept.ffn_in[layer], kept.out[layer]
    chosen, shares = kept.routing.chosen[layer], kept.routing.weights[layer]

    def one(item: tuple[Array, jax.Array]) -> Array:
        expert, key = item
        hits = chosen == expert
        rows = jnp.nonzero(jnp.any(hits, axis=1), size=capacity, fill_value=tokens)[0]
        copies = jnp.argmax(hits, axis=1)
        x = jnp.take(ffn_in, rows, axis=0, mode="fill", fill_value=0)
        numbers = rows * chosen.shape[1] + jnp.take(copies, rows, mode="clip")
        noisy, exact = _expert_outputs(
            x, params, key, spec, calibration, layer, expert, clean.number, numbers.astype(jnp.uint32)
        )
        share = jnp.take(jnp.sum(jnp.where(hits, shares, 0.0), axis=1), rows, mode="fill", fill_value=0)
        change = (noisy - exact) * share[:, None]
        flat = out.reshape(tokens, -1)
        changed = flat.astype(jnp.float32).at[rows].add(change, mode="drop").astype(flat.dtype)

        def behind_last(changed: Array) -> Array:
            touched = jnp.take(changed, rows, axis=0, mode="fill", fill_value=0)
            hidden = resume(params, touched[None], config, jnp.asarray(config.num_layers))[0]
            found = _log_probs(params, hidden, jnp.take(targets, rows, mode="clip"))
            before = jnp.take(clean.log_probs * weight, rows, mode="fill", fill_value=0)
            return jnp.sum(before - found * jnp.take(weight, rows, mode="fill", fill_value=0))

        def before_last(changed: Array) -> Array:
            hidden = resume(params, changed.reshape(out.shape), config, number).reshape(tokens, -1)
            return jnp.sum((clean.log_probs - _log_probs(params, hidden, targets)) * weight)

        return jax.lax.cond(number == config.num_layers - 1, behind_last, before_last, changed)

    pairs = (jnp.repeat(experts, keys.shape[0]), jnp.tile(keys, experts.shape[0]))
    return jax.lax.map(one, pairs).reshape(experts.shape[0], keys.shape[0])


def _expert_outputs(
    x: Array, params: Params, key: jax.Array, spec: AnalogSpec, calibration: Calibration | None, layer: Array,
    expert: Array, batch_number: Array, numbers: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """What one expert gives on its crossbars and digitally, float32; `numbers` are those of the token copies in x."""
    stacks = params.layers.moe.experts
    read_key = None
    if spec.read_noise is not None:
        read_key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, READ_STREAM), batch_number), layer)

    def multiply(inputs: Array, name: str, *, analog: bool) -> Array:
        stack = getattr(stacks, name)
        w = take(stack.reshape(-1, *stack.shape[2:]), layer * stack.shape[1] + expert)
        if not analog:
            return jnp.matmul(inputs, w, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
        matrix = program_named(key, name, w, spec, layer=layer, expert=expert)
        ranges = None if calibration is None else calibration.layers[MATRICES[name].site][layer, expert]
        read = None
        if spec.read_noise is not None and read_key is not None:
            read = ReadDraw(spec.read_noise, jax.random.fold_in(read_key, Matrix[name.upper()]), numbers)
        on = jnp.ones((1, 1), bool)
        return crossbar_matmul(inputs, matrix.w, ranges, spec.adc_bound, matrix.weight_max, spec.options, on, read)

    def feed_forward(*, analog: bool) -> Array:
        gate, up = multiply(x, "gate", analog=analog), multiply(x, "up", analog=analog)
        return multiply((jax.nn.silu(gate) * up).astype(x.dtype), "down", analog=analog)

    return feed_forward(analog=True), feed_forward(analog=False)


def measure(
    model: Model,
    spec: AnalogSpec,
    calibration: Calibration | None,
    keys: jax.Array,
    batches: Batches,
    *,
    dense: bool,
    jobs: int,
    progress: Callable[[int, int], Any] | None = None,
    experts_at_once: int = 8,
) -> Measured:
    """Measures every module on its own.

    Args:
        model: the model.
        spec: analog hardware; converters are part of what is measured.
        calibration: DAC ranges; None = dynamic.
        keys: one noise key per seed.
        batches: text.
        dense: also attention, shared experts, dense layers and the LM head, by plain evaluation of one plan each.
        jobs: calls run side by side in threads; 2 use two CPU cores better than XLA's own threads do. Results do not
            depend on it.
        progress: called with (finished, all) (expert, seed, batch) evaluations after each compiled call.
        experts_at_once: experts per compiled call.
    """
    config = model.config
    layers, experts = plan_shapes(config)["experts"]
    count, seeds = batches.tokens.shape[0], keys.shape[0]
    tokens = float(np.sum(np.asarray(batches.weight))) * (batches.tokens.shape[2] - 1)
    at_once = next(n for n in range(min(experts_at_once, experts), 0, -1) if experts % n == 0)
    increase = np.zeros((seeds, layers, experts))
    done, total = 0, count * layers * experts * seeds
    capacity = _capacity(model, batches)
    with ThreadPoolExecutor(jobs) as executor:
        for number in range(count):
            batch = jax.tree.map(lambda leaf, n=number: leaf[n], batches)
            clean = _clean(model.params, jnp.asarray(number), batch, config)

            def run(work: tuple[int, int], clean: _Clean = clean) -> tuple[int, int, np.ndarray]:
                layer, first = work
                chosen = jnp.arange(first, first + at_once)
                found = _increase(
                    model.params, clean, jnp.asarray(layer), chosen, keys, spec, calibration, config, capacity
                )
                return layer, first, np.asarray(found, np.float64)

            works = [(layer, first) for layer in range(layers) for first in range(0, experts, at_once)]
            for layer, first, found in executor.map(run, works):
                increase[:, layer, first : first + at_once] += found.T
                done += found.size
                if progress is not None:
                    progress(done, total)
    scores: dict[str, Any] = {"experts": increase / tokens}
    if dense:
        scores |= _measure_dense(model, spec, calibration, keys, batches, tokens)
    return Measured(per_seed=ModuleScores(**scores))


def _capacity(model: Model, batches: Batches) -> int:
    """Most tokens that any expert gets in any batch, rounded up so that similar texts share a compiled function."""
    most = 0
    for tokens in batches.tokens:
        routing = _routing(model.params, tokens[:, :-1], model.config)
        most = max(most, int(np.max([np.bincount(np.asarray(row).ravel()).max() for row in routing])))
    every = batches.tokens.shape[1] * (batches.tokens.shape[2] - 1)
    return min(-(-most // 64) * 64, every)


@functools.partial(jax.jit, static_argnames="config")
def _routing(params: Params, tokens: Array, config: ModelConfig) -> Array:
    return trajectory(params, tokens, config).routing.chosen


def _measure_dense(
    model: Model, spec: AnalogSpec, calibration: Calibration | None, keys: jax.Array, batches: Batches, tokens: float
) -> dict[str, np.ndarray]:
    """Every dense module alone, one plan each."""
    shapes = {name: shape for name, shape in plan_shapes(model.config).items() if name != "experts"}
    digital = {name: jnp.zeros(shape, bool) for name, shape in shapes.items()}
    plans: list[Plan] = []
    for name, shape in shapes.items():
        for index in np.ndindex(shape):
            alone = digital | {name: digital[name].at[index].set(True)}
            plans.append(dataclasses.replace(all_digital(model.config), **alone))
    stacked = stack_plans([stack_plans(plans)])
    before = float(evaluate_digital(model.params, batches, model.config).nll)
    rows = [
        np.asarray(
            evaluate_seeds(model.params, key[None], stacked, spec, calibration, batches, model.config).nll, np.float64
        )
        for key in keys
    ]
    increase = (np.concatenate(rows) - before) / tokens
    parts = np.split(increase, np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1], axis=1)
    return {name: part.reshape(-1, *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
