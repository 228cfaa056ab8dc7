"""The same bounds on a real model's experts and inputs, layer by layer, beside what is measured there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hetmoe.analog.converter_error import converter_error_bound
from hetmoe.analog.error_tail import noise_of
from hetmoe.analog.gaussian_moments import swiglu_exact
from hetmoe.analog.second_moment import ExpertNoise, expert_second_moment, linear_second_moment
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.evaluate.prepare import unevaluated_text
from hetmoe.evaluate.text import heldout_files
from hetmoe.models.model import Model
from hetmoe.models.trajectory import trajectory
from hetmoe.ops.crossbar_matmul.api import crossbar_matmul
from hetmoe.quantize.bounds.certify import certify
from hetmoe.quantize.bounds.expert import Expert, activations
from hetmoe.quantize.bounds.report import rounded_experts, rows_of
from hetmoe.quantize.bounds.weights import expert_weights
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import Grid
from theory.cases import over, programmed, root_mean_square

ADC_BOUND = 12.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Of one layer: by kind of error, of every token and expert that it chose.

    Attributes:
        number: in the model.
        measured: errors, relative to the size of the clean output.
        bound: of them, likewise.
        exact: kinds whose bound is the root mean square itself.
        rounded: what `hetmoe.quantize.bounds.report.rows_of` says of the layer, with its bits.
    """

    number: int
    measured: dict[str, np.ndarray]
    bound: dict[str, np.ndarray]
    exact: frozenset[str]
    rounded: dict[str, Any]


def reference_layers(
    model: Model, *, device: str, noise_scale: float, tokens: int, chips: int, bits: int, seed: int
) -> list[Layer]:
    """Bounds and measurements of all layers with experts.

    Args:
        model: not quantized.
        device: whose noise is bounded; it is also measured with the Gaussian noise of `proportional`, exactly.
        noise_scale: c of the device; `proportional` takes a twentieth of it.
        tokens: of held-out text.
        chips: noise seeds.
        bits: of quantized experts.
        seed: of all keys.
    """
    windows, _ = unevaluated_text(model, heldout_files(), tokens=tokens, seq=min(tokens, 64))
    text = jnp.asarray(windows.tokens[:, :-1])
    kept = trajectory(model.params, text, model.config)
    quantized = rounded_experts(model.params, Grid(bits=bits, group=128, symmetric=False))
    certificate = certify(model.params, quantized, text, model.config)
    rounded = [{"bits": bits, **row} for row in rows_of(certificate, model.config)]
    specs = {
        device: analog_spec(device, noise_scale=noise_scale),
        "proportional": analog_spec("proportional", noise_scale=noise_scale / 20),
    }
    found = list[Layer]()
    for index, number in enumerate(model.config.moe_layers):
        x, chosen = np.asarray(kept.ffn_in[index], np.float64), np.asarray(kept.routing.chosen[index])
        measured, bound = dict[str, list[np.ndarray]](), dict[str, list[np.ndarray]]()
        for expert in np.unique(chosen):
            taken = (chosen == expert).any(axis=1)
            clean = expert_weights(model.params.layers.moe.experts, index, int(expert))
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), int(expert))
            for name, (error, limit) in _of_expert(x, taken, clean, key, device, specs, chips).items():
                measured.setdefault(name, []).append(error)
                bound.setdefault(name, []).append(limit)
        found.append(
            Layer(
                number=number, measured={name: np.concatenate(parts) for name, parts in measured.items()},
                bound={name: np.concatenate(parts) for name, parts in bound.items()}, rounded=rounded[index],
                exact=frozenset({f"matrix 'up', {device}", "expert, proportional"}),
            )
        )  # fmt: skip
    return found


def _of_expert(
    all_x: np.ndarray, taken: np.ndarray, clean: Expert, key: jax.Array, device: str, specs: dict[str, AnalogSpec],
    chips: int,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """(measured, bound) of every kind of error, relative to the clean output's norm."""
    x = all_x[taken]
    before = activations(x, clean)
    found = dict[str, tuple[np.ndarray, np.ndarray]]()
    size, size_up = np.linalg.norm(before.out, axis=1), np.linalg.norm(before.up, axis=1)
    for name, spec in specs.items():
        noise = ExpertNoise(*(noise_of(w, spec) for w in clean.matrices))
        keys = jax.random.split(key, len(EXPERT_MATRICES))
        held = [programmed(k, w, spec, chips) for k, w in zip(keys, clean.matrices, strict=True)]
        errors = np.stack([activations(x, Expert(*one)).out for one in zip(*held, strict=True)]) - before.out
        rms, _ = root_mean_square(errors)
        if name == device:
            of_up, _ = root_mean_square(np.einsum("tk,ckn->ctn", x, held[1] - clean.up))
            exact = np.sqrt(linear_second_moment(x, noise.up).sum(axis=1))
            found[f"matrix 'up', {name}"] = of_up / size_up, exact / size_up
            found[f"expert, {name}"] = rms / size, expert_second_moment(x, before, clean, noise).rms / size
        else:
            found[f"expert, {name}"] = rms / size, swiglu_exact(x, clean, noise) / size
    # All tokens at once: of one shape for every expert, so that one program is compiled.
    single, w = jnp.asarray(all_x, jnp.float32), jnp.asarray(clean.up, jnp.float32)
    got = np.asarray(crossbar_matmul(single, w, adc_bound=ADC_BOUND), np.float64)[taken]
    options = specs[device].options
    limit = converter_error_bound(single[taken], w, input_range=None, adc_bound=ADC_BOUND, options=options)
    moved, allowed = np.linalg.norm(got - before.up, axis=1), np.linalg.norm(limit, axis=1)
    found["matrix 'up', converters"] = moved / size_up, allowed / size_up
    return found


def rows(layers: list[Layer]) -> list[dict[str, Any]]:
    """One row for each layer and kind: medians, and the ratio of measured to bound."""
    found = list[dict[str, Any]]()
    for layer in layers:
        for kind, measured in layer.measured.items():
            ratio = over(measured, layer.bound[kind])
            found.append(
                {
                    "layer": layer.number, "kind": kind, "measured": float(np.median(measured)),
                    "bound": float(np.median(layer.bound[kind])), "ratio": float(np.median(ratio)),
                    "largest": float(ratio.max()),
                }
            )  # fmt: skip
        found.append(
            {
                "layer": layer.number, "kind": f"expert, rounded to {layer.rounded['bits']} bits (absolute)",
                "measured": layer.rounded["expert_error"], "bound": layer.rounded["expert_bound"],
                "ratio": layer.rounded["tightness"], "largest": layer.rounded["largest_tightness"],
            }
        )  # fmt: skip
    return found
