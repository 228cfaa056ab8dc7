"""`hetmoe info`: what a model is."""

import dataclasses
import math
from pathlib import Path

import jax
from rich.table import Table

from hetmoe.commands.common import make_console, write_json
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import check_writable
from hetmoe.models.hf import fingerprint, load_model
from hetmoe.models.params import Params

_MODULES = {
    "embed": ("embedding", "digital"),
    "input_norm": ("norms", "digital"),
    "q_norm": ("norms", "digital"),
    "k_norm": ("norms", "digital"),
    "moe_norm": ("norms", "digital"),
    "final_norm": ("norms", "digital"),
    "router": ("routers", "digital"),
    "q": ("attention", "digital, or analog by plan"),
    "k": ("attention", "digital, or analog by plan"),
    "v": ("attention", "digital, or analog by plan"),
    "o": ("attention", "digital, or analog by plan"),
    "lm_head": ("LM head", "digital, or analog by plan"),
    "gate": ("experts", "analog, or digital by plan"),
    "up": ("experts", "analog, or digital by plan"),
    "down": ("experts", "analog, or digital by plan"),
}


def parameters_by_module(params: Params) -> dict[str, int]:
    """Number of parameters of each kind of module."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = _MODULES[path[-1].name][0]
        counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
    return counts


def run(model_name: str, dtype: str | None, json_file: Path | None) -> None:
    """Prints the description, and writes it as JSON if asked."""
    if json_file is not None:
        check_writable(json_file)
    model = load_model(model_name, dtype)
    config, console = model.config, make_console()
    counts = parameters_by_module(model.params)
    total = sum(counts.values())
    share = config.experts_per_token / config.num_experts
    active = total - counts["experts"] * (1 - share) - (counts["embedding"] if model.params.lm_head is not None else 0)
    where = dict(_MODULES.values())

    about = Table(title=f"{model.name} ({fingerprint(model)})", title_justify="left", show_header=False)
    for field in dataclasses.fields(config):
        about.add_row(field.name, str(getattr(config, field.name)))
    about.add_row("dtype", str(model.params.embed.dtype))
    about.add_row("tokenizer", "none" if model.tokenizer is None else f"{model.tokenizer.get_vocab_size()} entries")
    console.print(about)

    table = Table(title="Parameters", title_justify="left")
    for heading in ("module", "parameters", "share", "memory", "runs on"):
        table.add_column(heading, justify="left" if heading in ("module", "runs on") else "right")
    width = model.params.embed.dtype.itemsize
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(name, f"{count:,}", f"{count / total:.2%}", f"{count * width / 1e6:,.2f} MB", where[name])
    table.add_row("total", f"{total:,}", "100.00%", f"{total * width / 1e6:,.2f} MB", "")
    console.print(table)
    console.print(f"multiplied per token: {active:,.0f} parameters")
    if json_file is not None:
        record = {
            "format": "hetmoe-info-1",
            "provenance": provenance(),
            "model": {"name": model.name, "fingerprint": fingerprint(model), "config": dataclasses.asdict(config)},
            "parameters": counts,
            "active_parameters": round(active),
        }
        write_json(json_file, record)
