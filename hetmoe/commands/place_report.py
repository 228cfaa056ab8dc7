"""Tables of `hetmoe place`."""

import dataclasses

import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.evaluate.statistics import spearman
from hetmoe.models.config import ModelConfig
from hetmoe.placement.module_scores import ModuleScores
from hetmoe.placement.plan import Plan


def print_experts(console: Console, title: str, scores: np.ndarray, plan: Plan, config: ModelConfig) -> None:
    """Scores of every layer with experts, their spread, and which experts stay digital."""
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "lowest", "median", "highest", "std / mean", "digital experts, highest score first"):
        table.add_column(heading, justify="left" if heading.startswith("digital") else "right")
    for layer, row, analog in zip(config.moe_layers, scores, np.asarray(plan.experts), strict=True):
        digital = [e for e in np.argsort(-row, kind="stable") if not analog[e]]
        spread = (f"{v:.4g}" for v in (row.min(), np.median(row), row.max()))
        relative = f"{row.std() / row.mean():.1%}" if row.min() > 0 else "-"  # of scores of both signs it says nothing
        table.add_row(str(layer), *spread, relative, " ".join(str(e) for e in digital) or "none")
    console.print(table)


def print_dense(console: Console, scores: ModuleScores, plan: Plan) -> None:
    """Every dense module that competed, its score, and where it runs."""
    table = Table(title="dense modules, score in nats per token", title_justify="left")
    for heading in ("module", "layer", "score", "runs on"):
        table.add_column(heading, justify="right" if heading in ("layer", "score") else "left")
    for field in dataclasses.fields(scores):
        values, flags = getattr(scores, field.name), getattr(plan, field.name)
        if field.name == "experts" or values is None:
            continue
        pairs = zip(np.atleast_1d(np.asarray(values)), np.atleast_1d(np.asarray(flags)), strict=True)
        for number, (value, analog) in enumerate(pairs):
            layer = "" if np.ndim(values) == 0 else str(number)
            table.add_row(field.name, layer, f"{value:.4g}", "analog" if analog else "digital")
    console.print(table)


def print_comparison(
    console: Console, title: str, scores: ModuleScores, others: dict[str, np.ndarray], config: ModelConfig
) -> None:
    """Spearman correlation of other rules' scores with this rule's, per layer and over all experts."""
    table = Table(title=title, title_justify="left")
    table.add_column("rule")
    for layer in config.moe_layers:
        table.add_column(f"layer {layer}", justify="right")
    table.add_column("all experts", justify="right")
    own = np.asarray(scores.experts)
    for name, values in others.items():
        cells = [_shown(a, b) for a, b in zip(own, values, strict=True)]
        table.add_row(name, *cells, _shown(own.ravel(), values.ravel()))
    console.print(table)


def _shown(a: np.ndarray, b: np.ndarray) -> str:
    if np.all(a == a[0]) or np.all(b == b[0]):
        return "-"  # no order to compare
    return f"{spearman(a, b):+.2f}"
