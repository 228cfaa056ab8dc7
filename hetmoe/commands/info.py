"""`hetmoe info`: what a model is. Of safetensors it reads headers and routers; Orbax checkpoints are loaded."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.table import Table
from tokenizers import Tokenizer

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model, load_tokenizer, model_directory, model_name, open_checkpoint, parse_dtype
from hetmoe.commands.common import make_console, write_json
from hetmoe.commands.info_mesh import MeshQuestion, answer, devices_for, workload_of
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import check_writable
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf
from hetmoe.models.hf_fields import read_json
from hetmoe.models.model import model_fingerprint
from hetmoe.placement.streaming import stored_identity
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.layout import QuantizedLayout, layout_of

_DIGITAL, _EITHER = "digital", "digital, or analog by plan"
_RUNS_ON = {
    "embedding": _DIGITAL,
    "norms and biases": _DIGITAL,
    "routers": _DIGITAL,
    "attention": _EITHER,
    "shared experts": _EITHER,
    "dense FFN": _EITHER,
    "LM head": _EITHER,
    "experts": "analog, or digital by plan",
}


def module_of(path: str, leaf: Leaf) -> str:
    """The kind of module that a parameter (its path in the tree, such as `layers.moe.router`) belongs to."""
    if path == "embed":
        return "embedding"
    if path == "lm_head":
        return "LM head"
    if not leaf.transposed:
        return "norms and biases"
    if path.endswith(("router", "shared_gate")):
        return "routers"
    for part, name in ((".attention.", "attention"), (".experts.", "experts"), (".shared.", "shared experts")):
        if part in path:
            return name
    return "dense FFN"


def parameters_by_module(config: ModelConfig) -> dict[str, int]:
    """Number of parameters of each kind of module."""
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config), is_leaf=is_leaf):
        name = module_of(".".join(part.name for part in path), leaf)
        counts[name] = counts.get(name, 0) + math.prod(leaf.shape)
    return counts


def active_parameters(config: ModelConfig, counts: dict[str, int]) -> int:
    """Parameters that a token is multiplied by; a tied embedding counts as LM head."""
    total = sum(counts.values()) - (0 if config.tie_embeddings else counts["embedding"])
    return round(total - counts["experts"] * (1 - config.experts_per_token / config.num_experts))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of a model; identity and dtype are None where there are no weights."""

    name: str
    config: ModelConfig
    identity: str | None
    dtype: str | None
    layout: QuantizedLayout | None
    tokenizer: Tokenizer | None


def _identify(source: str, dtype: str | None) -> _Known:
    """A model directory, or a config.json of whatever name without weights."""
    if source.endswith(".json") and Path(source).is_file():
        config = config_from_hf(read_json(Path(source)), source=source)
        return _Known(name=source, config=config, identity=None, dtype=dtype, layout=None, tokenizer=None)
    directory = model_directory(source)
    if orbax_directory.is_one(directory):
        model = load_model(source, dtype)
        config, identity, stored = model.config, model_fingerprint(model), str(model.params.embed.dtype)
        layout = layout_of(model.params.layers.moe.experts)
    else:
        checkpoint = open_checkpoint(source)
        identity, found = stored_identity(checkpoint, dtype)
        config, stored, layout = checkpoint.config, str(found), checkpoint.storage.layout
    return _Known(
        name=model_name(source, directory), config=config, identity=identity, dtype=stored, layout=layout,
        tokenizer=load_tokenizer(directory / "tokenizer.json", config),
    )  # fmt: skip


def _expert_bits(config: ModelConfig, layout: QuantizedLayout) -> tuple[dict[str, int], int, int]:
    """(expert matrices on each grid, in words; weights of these; bits that they take, steps and zeros included)."""
    weights = config.hidden_size * config.expert_intermediate_size
    kinds: dict[str, int] = {}
    bits = 0
    for name in EXPERT_MATRICES:
        for grid, where in layout.pools(name):
            if grid is not None:
                said = f"{grid.bits} bits (groups of {grid.group}, {'symmetric' if grid.symmetric else 'with zeros'})"
                kinds[said] = kinds.get(said, 0) + len(where)
                bits += round(len(where) * weights * grid.bits_per_weight)
    return kinds, sum(kinds.values()) * weights, bits


def run(source: str, dtype: str | None, json_file: Path | None, question: MeshQuestion | None) -> None:
    """Prints the description, and writes it as JSON if asked; with a question, also what a mesh would take."""
    if json_file is not None:
        check_writable(json_file)
    parse_dtype(dtype)
    devices = None if question is None else devices_for(question)
    known, console = _identify(source, dtype), make_console()
    name, config, identity, layout = known.name, known.config, known.identity, known.layout
    workload = None if question is None else workload_of(question, config)
    counts = parameters_by_module(config)
    total, active = sum(counts.values()), active_parameters(config, counts)

    title = f"{name} ({identity or 'no weights'}{'' if layout is None else ', quantized'})"
    about = Table(title=title, title_justify="left", show_header=False)
    for field, value in _described(config):
        about.add_row(field, value)
    stored = known.dtype or "bfloat16"
    about.add_row("dtype", stored)
    about.add_row("tokenizer", "none" if known.tokenizer is None else f"{known.tokenizer.get_vocab_size()} entries")
    width = jnp.dtype(stored).itemsize
    runs_on = dict(_RUNS_ON)
    memory = {module: count * width for module, count in counts.items()}
    if layout is not None:
        kinds, quantized, bits = _expert_bits(config, layout)
        for said, count in sorted(kinds.items()):
            about.add_row("quantized experts", f"{count} matrices at {said}")
        whole = quantized == counts["experts"]
        runs_on["experts"] = _DIGITAL if whole else "digital if quantized, others analog or digital by plan"
        memory["experts"] += bits // 8 - quantized * width
    console.print(about)

    table = Table(title="Parameters", title_justify="left")
    for heading in ("module", "parameters", "share", "memory", "runs on"):
        table.add_column(heading, justify="left" if heading in ("module", "runs on") else "right")
    for module, count in sorted(counts.items(), key=lambda item: -item[1]):
        table.add_row(module, f"{count:,}", f"{count / total:.2%}", f"{memory[module] / 1e6:,.2f} MB", runs_on[module])
    table.add_row("total", f"{total:,}", "100.00%", f"{sum(memory.values()) / 1e6:,.2f} MB", "")
    console.print(table)
    console.print(f"multiplied per token: {active:,} parameters")
    mesh = None if question is None or workload is None else answer(question, config, workload, devices, console)
    if json_file is not None:
        record = {
            "format": "hetmoe-info-1",
            "provenance": provenance(),
            "mesh": mesh,
            "model": {"name": name, "fingerprint": identity, "config": dataclasses.asdict(config)},
            "parameters": counts,
            "active_parameters": active,
            "quantization": None if layout is None else layout.to_json(),
        }
        write_json(json_file, record)


def _described(config: ModelConfig) -> list[tuple[str, str]]:
    """Fields and values worth a line: what is off is left out."""
    rows: list[tuple[str, str]] = []
    for field in dataclasses.fields(config):
        value: Any = getattr(config, field.name)
        if value is None or value is False or value == ():
            continue
        if dataclasses.is_dataclass(value):
            inner = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
            value = ", ".join(f"{n}={v}" for n, v in inner.items() if v is not None and v is not False)
        rows.append((field.name, str(value)))
    return rows
