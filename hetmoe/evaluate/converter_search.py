"""The joint choice of DAC ranges (K) and ADC bound (lambda) on calibration text: by output error, or by loss."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.calibration import InputStatistics, RangeMethod, calibration_from
from hetmoe.analog.spec import AnalogSpec
from hetmoe.analog.tiles import block_max
from hetmoe.errors import InputError
from hetmoe.evaluate.run import evaluate_seeds, loss_batches
from hetmoe.models.analog_arguments import check_quantized
from hetmoe.models.config import ModelConfig, check_tokens
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import head_matrix, hidden_states
from hetmoe.ops.crossbar_matmul.base import CrossbarOptions
from hetmoe.ops.grouped_crossbar.xla import grouped_crossbar
from hetmoe.ops.grouped_matmul.xla import grouped_matmul
from hetmoe.placement.plan import Plan, stack_plans
from hetmoe.quantize.mixed import refuse_quantized


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConverterSearch:
    """What every pair of a range method and an ADC bound costs; `by_matrix` splits an output error up by name."""

    methods: list[RangeMethod]
    bounds: list[float]
    cost: Float[np.ndarray, "methods bounds"]
    by_matrix: dict[str, Float[np.ndarray, "methods bounds"]]

    def __post_init__(self) -> None:
        if not np.isfinite(self.cost).all():
            method, bound = np.argwhere(~np.isfinite(self.cost))[0]
            raise InputError(
                f"calibration: {self.methods[method]} with adc_bound={self.bounds[bound]:g} costs "
                f"{self.cost[method, bound]}: activations overflow, perhaps for lack of range in 16 bits"
            )

    @property
    def best(self) -> tuple[RangeMethod, float]:
        """The cheapest pair; of equal ones the first."""
        method, bound = np.unravel_index(int(np.argmin(self.cost)), self.cost.shape)
        return self.methods[method], self.bounds[bound]


def _check(methods: Sequence[RangeMethod], bounds: Sequence[float]) -> None:
    if not methods or not bounds:
        raise InputError("a search needs at least one range method and one ADC bound")
    for bound in bounds:
        if not 0 < bound < float("inf"):
            raise InputError(f"adc_bound={bound!r} must be positive and finite")


def search_by_output(
    model: Model,
    statistics: InputStatistics,
    tokens: Int[Array, "sequences seq"],
    spec: AnalogSpec,
    methods: Sequence[RangeMethod],
    bounds: Sequence[float],
    *,
    dense: bool,
) -> ConverterSearch:
    """Relative squared error that the converters alone make in the outputs of every matrix, without device noise.

    Each matrix gets the inputs of the digital model. The error of a matrix is that over all tokens (and experts) of a
    layer divided by the sum of squares of the exact outputs, averaged over layers; the cost is its mean over matrices.

    Args:
        model: the model.
        statistics: of the calibration text; ranges of all methods follow from them.
        tokens: a sample of that text to compute outputs on; all its inputs are held at once.
        spec: converters; device, noise and `adc_bound` are not looked at.
        methods: candidates for the ranges.
        bounds: candidates for lambda.
        dense: also the matrices outside the routed experts.

    Raises:
        InputError: for no candidates, a bound that is not positive, unusable tokens, or quantized experts.
    """
    _check(methods, bounds)
    refuse_quantized(model.params, "errors of outputs are not measured on")
    check_tokens(tokens, model.config)
    seen, seen_dense, hidden = _capture(model.params, tokens, model.config)
    ranges = [calibration_from(statistics, how) for how in methods]
    values = jnp.asarray(bounds, jnp.float32)
    by_matrix: dict[str, list[np.ndarray]] = {}

    def add(name: str, inputs: Any, weights: Array, of_site: list[Array]) -> None:
        stacked = jnp.stack(of_site)
        if weights.ndim == 3:  # dense: one group
            weights, stacked = weights[:, None], stacked[:, :, None]
        by_matrix.setdefault(name, []).append(np.asarray(_errors(*inputs, weights, stacked, values, spec.options)))

    for found, layer, of_layers in (
        (seen, model.params.layers, [r.layers for r in ranges]),
        (seen_dense, model.params.dense_layers, [r.dense_layers for r in ranges]),
    ):
        for name, w in ({} if layer is None else crossbar_matrices(layer, dense=dense)).items():
            site = MATRICES[name].site
            add(name, found[site], w, [r[site] for r in of_layers])
    if dense:
        flat = hidden.reshape(1, 1, -1, hidden.shape[-1])
        inputs = (flat, jnp.ones(flat.shape[:3], bool), jnp.zeros((1, 1), jnp.int32))
        add("lm_head", inputs, head_matrix(model.params)[None], [r.lm_head[None] for r in ranges])
    means = {name: np.mean(np.concatenate(parts), axis=0) for name, parts in by_matrix.items()}
    return ConverterSearch(
        methods=list(methods), bounds=list(bounds), cost=np.mean(list(means.values()), axis=0), by_matrix=means
    )


@functools.partial(jax.jit, static_argnames="config")
def _capture(params: Params, tokens: Array, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any], Array]:
    """(inputs, which rows are real, whose they are) by site, stacked over layers, and the LM head's inputs."""

    def keep(x: Array, real: Array, group: Array) -> tuple[Array, Array, Array]:
        return x, real, group

    hidden, _, (seen, seen_dense) = hidden_states(params, tokens, config, observe=keep)
    return seen, seen_dense, hidden


@functools.partial(jax.jit, static_argnames="options")
def _errors(
    x: Float[Array, "layers blocks rows K"],
    real: Bool[Array, "layers blocks rows"],
    group: Int[Array, "layers blocks"],
    weights: Float[Array, "layers groups K N"],
    ranges: Float[Array, "methods layers groups tiles"],
    bounds: Float[Array, "bounds"],
    options: CrossbarOptions,
) -> Float[Array, "layers methods bounds"]:
    per_column = options.bound_axis == "column"
    on = jnp.ones((weights.shape[1],), bool)

    def one_layer(part: tuple[Array, ...]) -> Array:
        x, real, group, w, of_methods = part
        maxima = block_max(w.astype(jnp.float32), options.tile_rows, per_column=per_column)
        exact = grouped_matmul(x, w, group, None)
        weight = real.astype(jnp.float32)[..., None]
        norm = jnp.sum(jnp.square(exact) * weight)

        def one(pair: tuple[Array, Array]) -> Array:
            y = grouped_crossbar(
                x, w, group, None, on, of_methods[pair[0]], pair[1], maxima, options, None, stored=group
            )
            return jnp.sum(jnp.square(y - exact) * weight) / jnp.where(norm > 0, norm, 1.0)

        count = of_methods.shape[0]
        pairs = (jnp.repeat(jnp.arange(count), bounds.shape[0]), jnp.tile(bounds, count))
        return jax.lax.map(one, pairs).reshape(count, -1)

    return jax.lax.map(one_layer, (x, real, group, weights, jnp.moveaxis(ranges, 1, 0)))


def search_by_loss(
    model: Model,
    statistics: InputStatistics,
    windows: Int[Array, "sequences context"],
    spec: AnalogSpec,
    plan: Plan,
    methods: Sequence[RangeMethod],
    bounds: Sequence[float],
) -> ConverterSearch:
    """Mean loss per token, nats, of the model with the converters of `spec` where `plan` is analog, without noise.

    Args:
        model: the model.
        statistics: of the calibration text.
        windows: calibration text; each row predicts its tokens from the second on.
        spec: converters; its noise scale, time and read noise are set aside.
        plan: what is analog.
        methods: candidates for the ranges.
        bounds: candidates for lambda.

    Raises:
        InputError: for no candidates, a bound that is not positive, unusable tokens, or a plan that puts quantized
            experts on crossbars.
    """
    _check(methods, bounds)
    check_quantized(model.params, plan)
    check_tokens(windows, model.config)
    batches = loss_batches(np.asarray(windows), min(16, windows.shape[0]))
    keys, plans = jax.random.split(jax.random.key(0), 1), stack_plans([stack_plans([plan])])
    cost = np.zeros((len(methods), len(bounds)))
    for row, how in enumerate(methods):
        calibration = calibration_from(statistics, how)
        for column, bound in enumerate(bounds):
            quiet = dataclasses.replace(
                spec,
                noise_scale=jnp.float32(0),
                adc_bound=jnp.float32(bound),
                time_s=None,
                read_noise=None,
                drift_compensation=False,
            )
            totals = evaluate_seeds(model.params, keys, plans, quiet, calibration, batches, model.config)
            cost[row, column] = float(totals.nll[0, 0]) / windows[:, 1:].size
    return ConverterSearch(methods=list(methods), bounds=list(bounds), cost=cost, by_matrix={})
