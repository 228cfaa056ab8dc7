"""`hetmoe place`: scores, and a plan."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from hetmoe.commands.common import choose_text, make_console
from hetmoe.errors import InputError
from hetmoe.evaluate.text import load_windows, split_windows
from hetmoe.files import check_writable
from hetmoe.models.hf import load_model
from hetmoe.placement.plan import digital_count, place
from hetmoe.placement.plan_file import save_plan
from hetmoe.placement.scores import RULES, score_experts


def run(
    model_name: str, rule: str, fraction: float, output: Path | None, text: Path | None, tokens: int, seq: int,
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
    model = load_model(model_name, dtype)
    sample = None
    if rule.startswith("activation"):
        sources = load_windows(model, choose_text(text), seq)
        count = min(tokens // seq, sum(len(s) for s in sources))
        sample = jnp.asarray(split_windows(sources, count, 0)[0].tokens[:, :-1])
    key = jax.random.key(seed) if rule == "random" else None
    scores = score_experts(model, rule, key=key, tokens=sample, down_axis=down_axis)  # pyright: ignore[reportArgumentType]
    plan = place(scores, fraction)

    console = make_console()
    table = Table(title=f"{model.name}: {rule}, {fraction:.1%} of experts digital", title_justify="left")
    for heading in ("layer", "lowest", "median", "highest", "digital experts, highest score first"):
        table.add_column(heading, justify="left" if heading.startswith("digital") else "right")
    values = np.asarray(scores)
    for layer, row in enumerate(values):
        digital = [e for e in np.argsort(-row, kind="stable") if not plan.experts[layer, e]]
        spread = (f"{v:.4g}" for v in (row.min(), np.median(row), row.max()))
        table.add_row(str(layer), *spread, " ".join(str(e) for e in digital) or "none")
    console.print(table)
    if output is not None:
        made_by = {
            "rule": rule, "digital_fraction": fraction, "down_axis": down_axis if rule == "max_neuron_norm" else None,
            "seed": seed if rule == "random" else None, "scores": values.astype(float).round(6).tolist(),
        }  # fmt: skip
        save_plan(output, plan, model, made_by=made_by)
        console.print(f"plan: {output}")
