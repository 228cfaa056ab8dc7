"""Tables of `hetmoe quantize`."""

import collections
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.models.model import Model
from hetmoe.quantize.allocation import used_levels
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.sizes import Sizes


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
