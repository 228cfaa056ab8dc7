"""Rows of a report about certificates."""

from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.models.config import ModelConfig
from hetmoe.models.params import FeedForward, Params, with_experts
from hetmoe.quantize.bounds.a_priori import a_priori_ratios
from hetmoe.quantize.bounds.certificate import Certificate, LayerCertificate, Reading
from hetmoe.quantize.bounds.certify import certify
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.grid import Grid
from hetmoe.quantize.mixed import MixedMatrix, make_mixed, refuse_quantized
from hetmoe.quantize.packed import pack
from hetmoe.quantize.rtn import round_to_nearest

Row = dict[str, Any]


def rounded_rows(params: Params, tokens: Int[Array, "batch seq"], config: ModelConfig, grid: Grid) -> list[Row]:
    """Certificates with all routed experts rounded to the nearest level of a grid, one row for each layer.

    Args:
        params: the unquantized model.
        tokens: of the text that the statements are about.
        config: of the model.
        grid: to round to.

    Returns:
        As `rows_of`, with "bits", and "step_bound": that of an expert's error from step sizes and the input's norm.

    Raises:
        InputError: as `certify`; if the experts are quantized already; if the group does not divide the rows.
    """
    quantized = rounded_experts(params, grid)
    certificate = certify(params, quantized, tokens, config)
    clean, packed = params.layers.moe.experts, quantized.layers.moe.experts
    rows = list[Row]()
    for index, (layer, row) in enumerate(zip(certificate.layers, rows_of(certificate, config), strict=True)):
        bound = layer.expert_norm_bound * a_priori_ratios(clean, packed, index)[layer.chosen]
        rows.append({"bits": grid.bits, **row, "step_bound": float(np.median(bound))})
    return rows


def rounded_experts(params: Params, grid: Grid) -> Params:
    """The model with all routed experts rounded to the nearest level of one grid, and packed.

    Raises:
        InputError: if experts are quantized already, or cannot be (`round_to_nearest`).
    """
    refuse_quantized(params, "hetmoe cannot quantize again")
    experts = {name: _rounded(getattr(params.layers.moe.experts, name), grid, name) for name in EXPERT_MATRICES}
    return with_experts(params, FeedForward(**experts))


def _rounded(stack: Float[Array, "layers experts K N"], grid: Grid, name: str) -> MixedMatrix:
    matrices = stack.reshape(-1, *stack.shape[2:])
    return make_mixed([pack(round_to_nearest(matrices, grid, name=name))], np.zeros(stack.shape[:2], np.int32))


def rows_of(certificate: Certificate, config: ModelConfig) -> list[Row]:
    """One row for each layer with experts.

    Norms are medians (of experts: over those whose weights differ; 0 where none does), fractions are of tokens, and a
    tightness is measured / bound (at most 1):

    - "layer": its number in the model;
    - "expert_error", "expert_bound", "tightness", "largest_tightness": of single experts' outputs on the unquantized
      model's inputs, bounded from weight differences and activations; "norm_bound", "norm_tightness",
      "largest_norm_tightness": bounded from weight differences and the inputs' norms;
    - "output_error", "output_bound": of the experts' weighted sum;
    - for "one_layer" (only the layer with experts before is quantized; None in the first such layer) and "whole_model":
      "…_certified" (the set of experts cannot change), "…_certified_measured" (the same from measured errors of
      experts), "…_observed" (it does not change), and "…_logit_change", "…_logit_bound" of router logits;
    - "violations": measurements beyond bounds, and certain sets that changed: 0.
    """
    return [
        {"layer": number, **_row(layer)} for number, layer in zip(config.moe_layers, certificate.layers, strict=True)
    ]


def expert_rows(certificate: Certificate, config: ModelConfig) -> list[Row]:
    """One row for each expert that a token chose.

    "layer", "expert", "tokens", and over these tokens the medians of "error", "bound" and "norm_bound" (as in
    `rows_of`) and the "largest_tightness".
    """
    rows = list[Row]()
    for number, layer in zip(config.moe_layers, certificate.layers, strict=True):
        for expert in np.unique(layer.chosen):
            here = layer.chosen == expert
            error, bound = layer.expert_error[here], layer.expert_bound[here]
            rows.append(
                {
                    "layer": number, "expert": int(expert), "tokens": int(here.sum()),
                    "error": float(np.median(error)), "bound": float(np.median(bound)),
                    "norm_bound": float(np.median(layer.expert_norm_bound[here])),
                    "largest_tightness": float(np.max(_tightness(error, bound))),
                }
            )  # fmt: skip
    return rows


def _row(layer: LayerCertificate) -> Row:
    some = layer.altered if layer.altered.any() else np.ones_like(layer.altered)
    error, bound, by_norm = (v[some] for v in (layer.expert_error, layer.expert_bound, layer.expert_norm_bound))
    tight, tight_by_norm = _tightness(error, bound), _tightness(error, by_norm)
    return {
        "expert_error": float(np.median(error)),
        "expert_bound": float(np.median(bound)),
        "tightness": float(np.median(tight)),
        "largest_tightness": float(np.max(tight)),
        "norm_bound": float(np.median(by_norm)),
        "norm_tightness": float(np.median(tight_by_norm)),
        "largest_norm_tightness": float(np.max(tight_by_norm)),
        "output_error": float(np.median(layer.output_error)),
        "output_bound": float(np.median(layer.output_bound)),
        **_of_reading("one_layer", layer.one_layer),
        **_of_reading("whole_model", layer.whole_model),
        "violations": layer.violations,
    }


def _tightness(measured: np.ndarray, bound: np.ndarray) -> np.ndarray:
    """Measured over bound; 1 where nothing can change (experts whose outputs are 0)."""
    return np.where(bound > 0, measured, 1) / np.where(bound > 0, bound, 1)


def _of_reading(name: str, reading: Reading | None) -> Row:
    kinds = ("certified", "certified_measured", "observed", "logit_change", "logit_bound")
    if reading is None:
        return {f"{name}_{kind}": None for kind in kinds}
    values = (
        np.mean(reading.certified), np.mean(reading.certified_measured), np.mean(~reading.changed),
        np.median(reading.logit_change), np.median(reading.logit_bound),
    )  # fmt: skip
    return {f"{name}_{kind}": float(value) for kind, value in zip(kinds, values, strict=True)}
