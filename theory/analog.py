"""Experts on crossbars: hetmoe's devices program their matrices, and hetmoe's crossbar multiplies by them.

Routers and fixed votes are digital, so what noise changes are the outputs of experts. Of tokens without noise there are
only as many different ones as patterns: each is multiplied once, and sequences weigh patterns instead of tokens.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from hetmoe.analog.devices import Stream, group_range
from hetmoe.analog.programming import matrix_key, stream_key
from hetmoe.analog.random import matrix_normal, require_key
from hetmoe.analog.spec import AnalogSpec
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from theory.data import DataSpec
from theory.model import Mixture, ModelSpec, expert_outputs, margins, routing_weights
from theory.train import Test

# Right after programming no others are used.
_STREAMS = (Stream.PROGRAM_PLUS, Stream.PROGRAM_MINUS)
Draws = Mapping[str, Mapping[Stream, Float[Array, "experts K N"]]]


class Bench(NamedTuple):
    """Test sequences of all levels and what a mixture makes of them without noise.

    Inputs are shared by all sequences, `[inputs]`, or each sequence has its own, `[levels, count, sequence]`.
    """

    inputs: Float[Array, "*inputs dim"]
    label: Int[Array, "levels count"]
    weights: Float[Array, "levels count inputs experts"]  # of a sequence's inputs, in every expert
    clean: Float[Array, "*inputs experts outputs"]


def make_bench(
    mixture: Mixture, dictionary: Float[Array, "patterns dim"], test: Test, data: DataSpec, spec: ModelSpec
) -> Bench:
    """See `Bench`."""
    weights = jax.vmap(lambda tokens: routing_weights(mixture.router, tokens, spec))(test.tokens)
    inputs = test.tokens.inputs
    if not data.token_noise:
        inputs, places = dictionary, jax.nn.one_hot(test.drawn.ids, data.patterns)
        weights = jnp.einsum("lbje,lbjp->lbpe", weights, places, precision=jax.lax.Precision.HIGHEST)
    clean = _all_inputs(lambda flat: expert_outputs(mixture, flat, spec), inputs)
    return Bench(inputs=inputs, label=test.drawn.label, weights=weights, clean=clean)


def _all_inputs(made: Callable[[Array], Array], inputs: Float[Array, "*inputs dim"]) -> Array:
    """Of a function that takes rows."""
    rows = made(inputs.reshape(-1, inputs.shape[-1]))
    return rows.reshape(*inputs.shape[:-1], *rows.shape[1:])


def draw_chip(key: jax.Array, mixture: Mixture, spec: ModelSpec) -> Draws:
    """The normals that `hetmoe.program` would use for a chip, of this key, that holds the mixture as its layer 0.

    Drawn once for all noise scales and placements (common random numbers).
    """
    key = require_key(key)

    def of_matrix(name: str, w: Array) -> dict[Stream, Array]:
        here = matrix_key(key, name, 0)
        experts = jnp.arange(w.shape[0])
        return {
            stream: jax.vmap(lambda e, s=stream: matrix_normal(stream_key(here, s, e), (w.shape[1], w.shape[2])))(
                experts
            )
            for stream in _STREAMS
        }

    return {name: of_matrix(name, w) for name, w in analog_matrices(mixture, spec).items()}


def analog_matrices(mixture: Mixture, spec: ModelSpec) -> dict[str, Float[Array, "experts K N"]]:
    """Those that crossbars hold, by hetmoe's names."""
    found = {"up": mixture.up}
    if mixture.gate is not None:
        found["gate"] = mixture.gate
    if spec.trained_output:
        found["down"] = mixture.down
    return found


def program_mixture(mixture: Mixture, draws: Draws, spec: ModelSpec, analog: AnalogSpec, scale: Array) -> Mixture:
    """What a chip holds, with programming noise of this scale."""

    def programmed(name: str, w: Array) -> Array:
        ranges = group_range(w, analog.device.scale_group, analog.options.tile_rows)
        return analog.device.program(
            w, scale=ranges, draw=draws[name].__getitem__, noise_scale=scale, time_s=None
        ).initial

    return dataclasses.replace(
        mixture, **{name: programmed(name, w) for name, w in analog_matrices(mixture, spec).items()}
    )


def noisy_outputs(
    mixture: Mixture,
    draws: Draws,
    inputs: Float[Array, "*inputs dim"],
    spec: ModelSpec,
    analog: AnalogSpec,
    scale: Array,
) -> Float[Array, "*inputs experts outputs"]:
    """What experts on one chip make of the inputs, through its converters; DAC ranges are dynamic."""
    options = analog.options

    def product(x: Array, w: Array) -> Array:
        return crossbar_matmul(
            x, w, dac_bits=options.dac_bits, adc_bits=options.adc_bits, adc_bound=analog.adc_bound,
            bound_axis=options.bound_axis, tile_rows=options.tile_rows,
        )  # fmt: skip

    held = program_mixture(mixture, draws, spec, analog, scale)
    return _all_inputs(lambda flat: expert_outputs(held, flat, spec, product), inputs)


def expert_parts(
    bench: Bench, made: Float[Array, "*inputs experts outputs"]
) -> Float[Array, "levels count experts outputs"]:
    """What every expert adds to the outputs of every sequence."""
    inputs = "p" if bench.inputs.ndim == 2 else "lbp"
    return jnp.einsum(f"lbpe,{inputs}eo->lbeo", bench.weights, made, precision=jax.lax.Precision.HIGHEST)


def mixed_accuracy(
    bench: Bench, noisy: Float[Array, "chips *inputs experts outputs"], digital: Bool[Array, "placements experts"]
) -> Float[Array, "placements levels"]:
    """Accuracy of every level over all chips, for every choice of digital experts."""
    clean = expert_parts(bench, bench.clean)

    def of_chip(made: Array) -> Array:
        parts = expert_parts(bench, made)

        def of_placement(digital: Array) -> Array:
            outputs = jnp.sum(jnp.where(digital[:, None], clean, parts), axis=2)
            return jnp.mean(margins(outputs, bench.label) > 0, axis=1, dtype=jnp.float32)

        return jax.vmap(of_placement)(digital)

    return jnp.mean(jax.vmap(of_chip)(noisy), axis=0)


def output_errors(bench: Bench, noisy: Float[Array, "chips *inputs experts outputs"]) -> Float[Array, "experts"]:
    """Mean square change of a sequence's outputs when only this expert is noisy, over chips, levels and sequences."""
    moved = jax.vmap(lambda made: expert_parts(bench, made - bench.clean))(noisy)
    return jnp.mean(jnp.sum(jnp.square(moved), axis=-1), axis=(0, 1, 2))
