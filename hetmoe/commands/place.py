"""`hetmoe place`: scores, and a plan."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model, model_directory, model_name, open_checkpoint
from hetmoe.commands.common import choose_text, make_console
from hetmoe.errors import InputError
from hetmoe.evaluate.text import load_windows, split_windows
from hetmoe.files import check_writable
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import model_fingerprint
from hetmoe.placement.plan import Plan, digital_count, place
from hetmoe.placement.plan_file import write_plan
from hetmoe.placement.scores import RULES, check_down_axis, score_experts
from hetmoe.placement.streaming import STREAMED, stream_scores


def run(
    model_source: str, rule: str, fraction: float, output: Path | None, text: Path | None, tokens: int, seq: int,
    seed: int, down_axis: str, dtype: str | None,
) -> None:  # fmt: skip
    """Scores the experts, prints them layer by layer, and writes the plan if asked."""
    if rule not in RULES:
        raise InputError(f"unknown rule {rule!r}: use one of {', '.join(RULES)}")
    digital_count(fraction, 1)
    if seq < 1 or tokens < seq or seed < 0:
        raise InputError(f"need --seq >= 1, --tokens >= --seq and --seed >= 0, got {seq}, {tokens}, {seed}")
    if output is not None:
        check_writable(output)
    axis = check_down_axis(down_axis)
    directory = model_directory(model_source)
    key = jax.random.key(seed) if rule == "random" else None
    if rule in STREAMED and not orbax_directory.is_one(directory):
        checkpoint = open_checkpoint(model_source)
        config = checkpoint.config
        scores, identity = stream_scores(checkpoint, rule, key=key, down_axis=axis, dtype=dtype)
    else:
        model = load_model(model_source, dtype)
        config, identity, sample = model.config, model_fingerprint(model), None
        if rule.startswith("activation"):
            sources = load_windows(model, choose_text(text), seq)
            count = min(tokens // seq, sum(len(s) for s in sources))
            sample = jnp.asarray(split_windows(sources, count, 0)[0].tokens[:, :-1])
        scores = np.asarray(score_experts(model, rule, key=key, tokens=sample, down_axis=axis))
    plan = place(scores, fraction)
    console = make_console()
    name = model_name(model_source, directory)
    _print(console, f"{name}: {rule}, {fraction:.1%} of experts digital", scores, plan, config)
    if output is not None:
        made_by = {
            "rule": rule, "digital_fraction": fraction, "down_axis": down_axis if rule == "max_neuron_norm" else None,
            "seed": seed if rule == "random" else None, "scores": scores.astype(float).round(6).tolist(),
        }  # fmt: skip
        write_plan(output, plan, name=name, fingerprint=identity, made_by=made_by)
        console.print(f"plan: {output}")


def _print(console: Console, title: str, scores: np.ndarray, plan: Plan, config: ModelConfig) -> None:
    """Scores of every layer with experts, their spread, and which experts stay digital."""
    table = Table(title=title, title_justify="left")
    for heading in ("layer", "lowest", "median", "highest", "std / mean", "digital experts, highest score first"):
        table.add_column(heading, justify="left" if heading.startswith("digital") else "right")
    for layer, row, analog in zip(config.moe_layers, scores, np.asarray(plan.experts), strict=True):
        digital = [e for e in np.argsort(-row, kind="stable") if not analog[e]]
        spread = (f"{v:.4g}" for v in (row.min(), np.median(row), row.max()))
        relative = f"{row.std() / row.mean():.1%}" if row.mean() else "-"
        table.add_row(str(layer), *spread, relative, " ".join(str(e) for e in digital) or "none")
    console.print(table)
