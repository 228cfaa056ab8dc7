"""Turns a run of `train_reference.py` into the model directory that ships with the package, with its model card.

    python experiments/export_reference.py --run build/reference --out hetmoe/models/reference

Writes config.json, model.safetensors (bfloat16), tokenizer.json, routers_step0.safetensors (the routers before training:
their norm change drives bit allocation), heldout/*.txt, training.json (loss curve, recipe, held-out results, expert
load), loss.png, load.png and README.md, the model card. Held-out figures are of the bfloat16 weights as shipped,
computed in float32. Cost: one minute on two CPU cores.
"""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
import orbax.checkpoint as ocp
import typer
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from train_reference import CONFIG, SEPARATOR, Recipe, make_optimizer

from hetmoe.evaluate.run import evaluate_digital, make_batches
from hetmoe.evaluate.text import load_windows
from hetmoe.models.generate import greedy
from hetmoe.models.hf import Model, load_model, save_model
from hetmoe.models.params import Params, init_params
from hetmoe.models.transformer import hidden_states

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
        state = (params, make_optimizer(recipe, step + 1).init(params))
        return manager.restore(step, args=ocp.args.StandardRestore(state))[0], step


def heldout_results(model: Model, files: list[Path]) -> dict[str, dict[str, float]]:
    """Bits per byte and perplexity of every held-out source and of all, over whole files (last partial window left)."""
    results, sums = {}, np.zeros(3)
    for file, windows in zip(files, load_windows(model, files, CONFIG.max_position_embeddings), strict=True):
        choices = windows.tokens[:, 1:, None].repeat(2, axis=-1)
        batches = make_batches(windows, choices, np.zeros(windows.whole_word.shape, bool), 16)
        nll = float(evaluate_digital(model.params, batches, model.config).nll)
        row = np.array([nll, windows.byte_count.sum(), windows.byte_count.size])
        sums += row
        results[file.stem] = summary(row)
    return results | {"all": summary(sums)}


def summary(row: np.ndarray) -> dict[str, float]:
    """From (nats, bytes, tokens)."""
    nll, size, tokens = row
    return {
        "bits_per_byte": round(nll / math.log(2) / size, 4),
        "perplexity": round(math.exp(nll / tokens), 2),
        "tokens": int(tokens),
        "bytes": int(size),
    }


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


def card(record: dict[str, Any], manifest: dict[str, Any], samples: list[tuple[str, str]]) -> str:
    """The model card."""
    heldout = "\n".join(
        f"| {name} | {r['bits_per_byte']:.3f} | {r['perplexity']:.2f} | {r['tokens']:,} | {r['bytes']:,} |"
        for name, r in record["heldout"].items()
    )
    sources = "\n".join(
        f"| {name} | {m['train']['bytes']:,} | {record['recipe']['weights'].get(name, 1.0):.2f} "
        f"| {', '.join(m['heldout_titles'])} | {m['licence']} |"
        for name, m in manifest.items()
    )
    notices = "\n\n".join(f"### {name}\n\n```\n{m['notice'].strip()}\n```" for name, m in manifest.items())
    quotes = "\n".join(f"- **{prompt}** {text}".replace("\n", " / ") for prompt, text in samples)
    load = np.array(record["expert_load"])
    return f"""# hetmoe reference model

A mixture-of-experts language model small enough to ship with the package ({record["parameters"]:,} parameters, bfloat16),
in the OLMoE layout (`config.json`, `model.safetensors`, `tokenizer.json`): {CONFIG.num_layers} layers, hidden
{CONFIG.hidden_size}, {CONFIG.num_experts} experts a layer of intermediate size {CONFIG.expert_intermediate_size}, top-{CONFIG.experts_per_token},
{CONFIG.vocab_size}-entry byte-level BPE, context {CONFIG.max_position_embeddings}. It exists so that every experiment of hetmoe runs anywhere
in minutes. It is not useful as a language model.

## Training

```
python experiments/train_reference.py --out build/reference --steps {record["steps"]}
python experiments/export_reference.py --run build/reference --out hetmoe/models/reference
```

{record["steps"]:,} steps of {record["recipe"]["batch"]} x {record["recipe"]["seq"]} tokens ({record["tokens_seen"] / 1e6:.1f} M tokens), AdamW, peak learning rate
{record["recipe"]["learning_rate"]}, constant and then linear to zero over the last {record["recipe"]["decay"]} steps, load-balancing loss {record["recipe"]["balance"]}, router z-loss
{record["recipe"]["router_z"]}, seed {record["recipe"]["seed"]}, on two CPU cores. `routers_step0.safetensors` holds the routers before training.

![training loss](loss.png)

## Held-out text

Whole chapters, plays and blocks of synsets never trained on, embedded in `heldout/`. Windows of 256 tokens that do not
overlap, so a window's first tokens have little context.

| source | bits per byte | perplexity per token | tokens | bytes |
|---|---|---|---|---|
{heldout}

Greedy continuations (prompt in bold, line breaks as /):

{quotes}

## Expert load

On held-out text the busiest expert of a layer gets {", ".join(f"{x:.2f}" for x in load.max(axis=1) * load.shape[1])} times the
uniform load (layers 0 to {load.shape[0] - 1}), the least busy {", ".join(f"{x:.2f}" for x in load.min(axis=1) * load.shape[1])} times.

![expert load](load.png)

## Data and licences

| source | training bytes | sampling share | held out | licence |
|---|---|---|---|---|
{sources}

Weights and card: Apache-2.0, as the project. The notices of the sources:

{notices}
"""


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
    routers = init_params(jax.random.key(seed), CONFIG).layers.router
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
    record = {
        "steps": step + 1,
        "tokens_seen": (step + 1) * recipe.batch * recipe.seq,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "recipe": dataclasses.asdict(recipe) | {"weights": dict(recipe.weights)},
        "heldout": heldout_results(model, files),
        "expert_load": expert_load(model, files).round(5).tolist(),
        "loss": [rows[s] for s in sorted(rows) if s <= step],
    }
    plot(out / "loss.png", lambda f: plot_loss(f, record["loss"]), (7, 3.2))
    plot(out / "load.png", lambda f: plot_load(f, np.array(record["expert_load"])), (10, 2.6))
    (out / "training.json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    samples = [(prompt, greedy(model, prompt, 40)) for prompt in PROMPTS]
    (out / "README.md").write_text(card(record, manifest, samples), encoding="utf-8")
    for name, row in record["heldout"].items():
        typer.echo(f"{name}: {row['bits_per_byte']} bits per byte, perplexity {row['perplexity']}")
    for prompt, text in samples:
        typer.echo(f"{prompt!r} -> {text!r}")


if __name__ == "__main__":
    typer.run(main)
