"""Turns a run of `train_reference.py` into the model directory that ships with the package, with its model card.

    python experiments/export_reference.py --run build/reference --out hetmoe/models/reference

Writes config.json, model.safetensors (bfloat16), tokenizer.json, routers_step0.safetensors (the routers before
training: their norm change drives bit allocation), heldout/*.txt, training.json (loss curve, recipe, held-out results,
expert load), loss.png, load.png and README.md, the model card. Held-out figures are of the bfloat16 weights as shipped,
computed in float32. Cost: one minute on two CPU cores.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, cast

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import orbax.checkpoint as ocp
import typer
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from heldout_bits import measure
from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.save import save_model
from hetmoe.evaluate.text import load_windows
from hetmoe.models.abstract import init_params
from hetmoe.models.generate import greedy
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.models.transformer import hidden_states
from reference_card import card
from train_reference import CONFIG, SEPARATOR, Recipe, make_optimizer

PROMPTS = (
    "It was the opinion of her sister that",
    "MACBETH.\nWhat is the",
    "a small domesticated animal (noun): an animal that",
    "Mr. Bennet was so",
    "My lord, I will",
)


def restore(run: Path, recipe: Recipe) -> tuple[Params, int]:
    """Parameters of the latest checkpoint, and its step."""
    params = init_params(jax.random.key(recipe.seed), CONFIG)
    with ocp.CheckpointManager((run / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise SystemExit(f"{run}/checkpoints holds no checkpoint: run train_reference.py first")
        state = (params, make_optimizer(recipe, step + 1).init(cast("Any", params)))  # optax.Params is too narrow
        return manager.restore(step, args=ocp.args.StandardRestore(state))[0], step


def expert_load(model: Model, files: list[Path]) -> np.ndarray:
    """Share of held-out token copies that each expert gets, [layers, experts]."""
    tokens = np.concatenate([w.tokens[:, :-1] for w in load_windows(model, files, CONFIG.max_position_embeddings)])
    counts = np.zeros((CONFIG.num_layers, CONFIG.num_experts))
    chosen_of = jax.jit(lambda params, part: hidden_states(params, part, CONFIG)[1].chosen)
    for start in range(0, len(tokens) - len(tokens) % 16, 16):
        chosen = np.asarray(chosen_of(model.params, jnp.asarray(tokens[start : start + 16])))
        counts += [np.bincount(layer.ravel(), minlength=CONFIG.num_experts) for layer in chosen]
    return counts / counts.sum(axis=1, keepdims=True)


def plot(path: Path, draw: Any, size: tuple[float, float]) -> None:
    """Saves one figure drawn by `draw(figure)`."""
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    draw(figure)
    figure.savefig(path, dpi=100)


def plot_loss(figure: Any, rows: list[dict[str, float]]) -> None:
    """Training loss, each point one batch, with a running mean."""
    panel = figure.subplots()
    steps, loss = np.array([r["step"] for r in rows]), np.array([r["cross_entropy"] for r in rows])
    panel.plot(steps, loss, color="#56B4E9", lw=0.6, label="one batch of 4096 tokens")
    width = 15
    if len(loss) > width:
        panel.plot(steps[width // 2 : -(width // 2)], np.convolve(loss, np.ones(width) / width, "valid"),
                   color="#D55E00", label=f"mean of {width}")  # fmt: skip
    panel.set(xlabel="step", ylabel="cross-entropy (nats per token)", ylim=(min(loss) - 0.2, 7))
    panel.legend(frameon=False)


def plot_load(figure: Any, load: np.ndarray) -> None:
    """Load of every expert, sorted, one panel per layer."""
    panels = figure.subplots(1, len(load), sharey=True)
    for layer, (panel, row) in enumerate(zip(panels, load, strict=True)):
        panel.bar(np.arange(row.size), np.sort(row)[::-1] * row.size, color="#0072B2")
        panel.axhline(1.0, color="0.4", lw=1, ls="--")
        panel.set(title=f"layer {layer}", xlabel="expert, by load")
    panels[0].set_ylabel("load / uniform load")


def main(
    run: Annotated[Path, typer.Option(help="Working directory of train_reference.py.")],
    out: Annotated[Path, typer.Option(help="Model directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed that the run was started with.")] = 0,
) -> None:
    """Export the trained model."""
    recipe = Recipe(seed=seed)
    params, step = restore(run, recipe)
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    out.mkdir(parents=True, exist_ok=True)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    end = tokenizer.token_to_id(SEPARATOR)
    save_model(out, Model(params=half, config=CONFIG, tokenizer=tokenizer, eos_token_id=end, name="reference"))
    routers = init_params(jax.random.key(seed), CONFIG).layers.moe.router
    tensors = {
        f"model.layers.{i}.mlp.gate.weight": np.ascontiguousarray(np.asarray(r.astype(jnp.bfloat16)).T)
        for i, r in enumerate(routers)
    }
    save_file(tensors, out / "routers_step0.safetensors")
    shutil.rmtree(out / "heldout", ignore_errors=True)
    shutil.copytree(run / "text" / "heldout", out / "heldout")

    model = load_model(out, "float32")
    files = sorted((out / "heldout").glob("*.txt"))
    rows = {r["step"]: r for r in map(json.loads, (run / "loss.jsonl").read_text().splitlines())}
    manifest = json.loads((run / "text" / "manifest.json").read_text(encoding="utf-8"))
    record: dict[str, Any] = {
        "steps": step + 1,
        "tokens_seen": (step + 1) * recipe.batch * recipe.seq,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "recipe": dataclasses.asdict(recipe) | {"weights": dict(recipe.weights)},
        "heldout": measure(model, files),
        "expert_load": expert_load(model, files).round(5).tolist(),
        "loss": [rows[s] for s in sorted(rows) if s <= step],
    }
    plot(out / "loss.png", lambda f: plot_loss(f, record["loss"]), (7, 3.2))
    plot(out / "load.png", lambda f: plot_load(f, np.array(record["expert_load"])), (10, 2.6))
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    samples = [(prompt, greedy(model, prompt, 40)) for prompt in PROMPTS]
    (out / "README.md").write_text(
        card(CONFIG, record, manifest, samples, CONFIG.max_position_embeddings // 2), encoding="utf-8"
    )
    for name, row in record["heldout"].items():
        typer.echo(f"{name}: {row}")
    for prompt, text in samples:
        typer.echo(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    typer.run(main)
