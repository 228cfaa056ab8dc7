"""Tables of `hetmoe quantize`."""

import collections
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.models.model import Model
from hetmoe.quantize.bounds.certify import certify
from hetmoe.quantize.bounds.report import Row, expert_rows, rounded_rows, rows_of
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.levels import used_levels
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.sizes import Sizes

_REACH = ("one_layer", "whole_model")


def print_layers(
    console: Console, model: Model, analog: np.ndarray, bits: np.ndarray, facts: list[dict[str, Any]]
) -> None:
    """Experts (or, where an expert's matrices differ, matrices) at each level and how far their weights moved."""
    levels = used_levels(bits)
    whole = bool(np.all(bits == bits[..., :1]))
    table = Table(title=f"{'Experts' if whole else 'Expert matrices'} by layer", title_justify="left")
    table.add_column("layer", justify="right")
    for level in levels:
        table.add_column(f"{level} bits", justify="right")
    if analog.any():
        table.add_column("analog", justify="right")
    for name in EXPERT_MATRICES:
        table.add_column(f"{name}: |dW| / |W|", justify="right")
    by_gptq = any("tokens" in part for layer in facts for part in layer["matrices"]["gate"])
    if by_gptq:
        for heading in ("columns by rtn", "fewer tokens than inputs", "without tokens", "more damping"):
            table.add_column(heading, justify="right")
    for number, (row, kept, layer) in enumerate(zip(bits, analog, facts, strict=True)):
        counts = collections.Counter((row[:, 0] if whole else row).flat)
        cells = [str(model.config.moe_layers[number]), *(str(counts[level]) for level in levels)]
        if analog.any():
            cells.append(str(int(kept.sum())))
        for name in EXPERT_MATRICES:
            errors = [part["relative_error"] for part in layer["matrices"][name]]
            cells.append(f"{np.mean(errors):.3f}" if errors else "")
        if by_gptq:
            cells.extend(_gptq_cells(model, layer))
        table.add_row(*cells)
    console.print(table)
    if by_gptq:
        console.print(
            "experts with few tokens are quantized for a mixture with the layer's mean inputs (regularised Hessian); "
            "columns that GPTQ made worse on the calibration text are rounded to nearest"
        )


def _gptq_cells(model: Model, layer: dict[str, Any]) -> list[str]:
    parts = [part for name in EXPERT_MATRICES for part in layer["matrices"][name]]
    gate = layer["matrices"]["gate"]
    few = sum(part["tokens"] < model.config.hidden_size for part in gate)
    none = sum(part["tokens"] == 0 for part in gate)
    least = min((part["damping"] for part in parts), default=0.0)
    more = sum(part["damping"] > 1.5 * least or not part["factored"] for part in parts)
    return [f"{sum(part['fell_back'] for part in parts):,}", str(few), str(none), str(more)]


def print_guarantees(
    console: Console, model: Model, quantized: Model, recipe: Recipe, tokens: jax.Array
) -> dict[str, Any]:
    """Bounds and certified routing of this quantization, and of all experts rounded to 8, 4, 3 and 2 bits.

    Returns:
        the rows of both, and of every expert of this quantization (`hetmoe.quantize.bounds.report`).
    """
    console.print(
        f"What is certain, on {tokens.size:,} tokens, in exact arithmetic. Expert errors: norms of changed outputs and "
        "their bounds, medians; 'bound' is from weight differences and activations, 'by norms' from weight differences "
        "and the input's norm, 'by steps' from step sizes and that norm. Routing: tokens whose set of experts cannot "
        "change (certified; or if experts' measured errors are taken as known) and does not (observed), when only the "
        "layer with experts before is quantized, and when all are. Experts that are not quantized count as exact. "
        "Router logits move by 'at most' what the farthest normed states make of them where the residual stream may "
        "move by more than its own length: then nothing is certain."
    )
    certificate = certify(model.params, quantized.params, tokens, model.config)
    own = rows_of(certificate, model.config)
    _print_guarantees(console, f"this model ({recipe.method})", own)
    rounded: list[Row] = []
    for bits in (8, 4, 3, 2):
        rounded += rounded_rows(model.params, tokens, model.config, recipe.grid(bits))
        console.print(f"bounded: all experts rounded to {bits} bits")
    _print_guarantees(console, "all experts rounded to nearest", rounded)
    violations = sum(row["violations"] for row in [*own, *rounded])
    console.print(f"violations of bounds and certificates: {violations}")
    return {
        "tokens": int(tokens.size), "this_model": own, "experts": expert_rows(certificate, model.config),
        "rounded": rounded, "violations": violations,
    }  # fmt: skip


def _print_guarantees(console: Console, of: str, rows: list[Row]) -> None:
    """Error bounds and certified routing, a line for each layer (and bits)."""
    stepped = "bits" in rows[0]
    first = ["bits", "layer"] if stepped else ["layer"]
    errors = Table(title=f"Expert errors: {of}", title_justify="left")
    for heading in (
        *first,
        "measured",
        "bound",
        "tightness",
        "largest",
        "by norms",
        *(["by steps"] if stepped else []),
    ):
        errors.add_column(heading, justify="right")
    routing = Table(title=f"Routing: {of}", title_justify="left")
    shares = [f"{kind}, {reach}" for kind in ("certified", "from measured", "observed") for reach in ("one", "all")]
    for heading in (*first, "logits moved", "at most", *shares):
        routing.add_column(heading, justify="right")
    for row in rows:
        place = [str(row[name]) for name in first]
        numbers = [
            row["expert_error"],
            row["expert_bound"],
            row["tightness"],
            row["largest_tightness"],
            row["norm_bound"],
        ]
        if stepped:
            numbers.append(row["step_bound"])
        errors.add_row(*place, *(f"{value:.3g}" for value in numbers))
        shown = [f"{reach}_{kind}" for kind in ("certified", "certified_measured", "observed") for reach in _REACH]
        cells = ["-" if row[kind] is None else f"{row[kind]:.1%}" for kind in shown]
        moved = f"{row['whole_model_logit_change']:.3g}", f"{row['whole_model_logit_bound']:.3g}"
        routing.add_row(*place, *moved, *cells)
    console.print(errors)
    console.print(routing)


def print_sizes(console: Console, found: Sizes, before: Sizes, output: Path) -> None:
    """Average bits with and without overhead, and bytes against those before and on disk."""
    table = Table(title="Bits per weight", title_justify="left")
    for heading in ("", "weights", "without overhead", "with steps and zeros", "bytes"):
        table.add_column(heading, justify="left" if not heading else "right")
    weights = {"quantized experts": found.quantized, "whole model": found.quantized + found.rest}
    size = {"quantized experts": (found.codes + found.overhead) // 8, "whole model": found.bytes}
    for name, (without, including) in found.averages().items():
        table.add_row(name, f"{weights[name]:,}", f"{without:.4f}", f"{including:.4f}", f"{size[name]:,}")
    console.print(table)
    files = sum(path.stat().st_size for path in output.glob("*.safetensors"))
    console.print(
        f"{found.bytes / before.bytes:.1%} of the {before.bytes:,} bytes before; {files:,} bytes in files, headers "
        "included"
    )
