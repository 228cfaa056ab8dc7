"""Trains the embedded reference model from scratch on the redistributable text of `reference_text.py`.

    python experiments/train_reference.py --out build/reference                # fetch, train, resume if cut off
    python experiments/train_reference.py --out build/reference --text DIR     # any folder of UTF-8 .txt files
    python experiments/train_reference.py --out build/reference --steps 300    # a short look

Cost: 0.7 to 0.8 s a step of 4096 tokens on two idle CPU cores (about an hour for the default number of steps); 2.5 GB
of memory.
Result: `build/reference/checkpoints/` (Orbax), `loss.jsonl`, `tokenizer.json`. `experiments/export_reference.py`
turns them into the model directory that ships with the package, with its model card.

The schedule is warm-up, constant, then linear decay to zero over the last `decay` steps, so the part
before the decay does not depend on the number of steps: a run may be stopped early, or continued, by giving another
`--steps`, and is then the same run as one started with that number.

Optimiser: AdamW, because the placement rules to be studied rest on how weights grow under the optimiser that real MoE
models are trained with (an orthogonalising optimiser such as Muon gives every expert the same update norm).
"""

import dataclasses
import functools
import json
import time
from pathlib import Path
from typing import Annotated, Any, cast

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hetmoe.models.abstract import init_params
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.likelihood import choice_log_probs
from hetmoe.models.params import Params
from hetmoe.models.transformer import head_matrix, hidden_states
from reference_text import SEPARATOR, Split, build, fetch, from_directory, leaked_passages, read_notices, write

CONFIG = ModelConfig(
    family="olmoe",
    qk_norm="width",
    vocab_size=4096,
    hidden_size=128,
    expert_intermediate_size=128,
    num_layers=4,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    num_experts=32,
    experts_per_token=2,
    norm_topk_prob=False,
    clip_qkv=None,
    rms_norm_eps=1e-5,
    rope=Rope(theta=10000.0),
    max_position_embeddings=256,
    tie_embeddings=False,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Training hyperparameters. `weights` are the sampling shares of the text sources, in bytes of neither."""

    seed: int = 0
    batch: int = 16
    seq: int = 256
    learning_rate: float = 3e-3
    warmup: int = 100
    decay: int = 1500
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    balance: float = 0.01  # load-balancing loss, as in OLMoE (arXiv 2409.02060, section 4.1)
    router_z: float = 0.001  # router z-loss, likewise
    weights: tuple[tuple[str, float], ...] = (("austen", 0.27), ("shakespeare", 0.33), ("wordnet", 0.40))


def train_tokenizer(splits: dict[str, Split], vocab_size: int) -> Tokenizer:
    """A byte-level BPE learned on the training text only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((d.text for s in splits.values() for d in s.train), trainer)
    return tokenizer


def token_streams(splits: dict[str, Split], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
    """One int32 stream per source: every training document behind an end-of-text token."""
    end = tokenizer.token_to_id(SEPARATOR)
    streams = {}
    for name, split in splits.items():
        documents = datasets.Dataset.from_dict({"text": [d.text for d in split.train]})
        encoded = documents.map(
            lambda rows: {"ids": [[end, *e.ids] for e in tokenizer.encode_batch(rows["text"])]},
            batched=True, remove_columns=["text"], keep_in_memory=True,
        )  # fmt: skip
        streams[name] = np.concatenate([np.asarray(ids, np.int32) for ids in encoded["ids"]])
    return streams


def sample_batch(streams: dict[str, np.ndarray], recipe: Recipe, step: int) -> np.ndarray:
    """Windows of seq + 1 tokens at random places, [batch, seq + 1]; a function of (seed, step) alone, so resumable."""
    rng = np.random.default_rng((recipe.seed, step))
    shares = dict(recipe.weights)
    names = sorted(streams)
    p = np.array([shares.get(n, 1.0) for n in names])
    rows = []
    for pick in rng.choice(len(names), size=recipe.batch, p=p / p.sum()):
        stream = streams[names[pick]]
        start = rng.integers(0, len(stream) - recipe.seq)
        rows.append(stream[start : start + recipe.seq + 1])
    return np.stack(rows)


def loss_fn(params: Params, tokens: jax.Array, recipe: Recipe) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats per token, plus the two router losses averaged over layers."""
    hidden, routing, _ = hidden_states(params, tokens[:, :-1], CONFIG)
    head, flat = head_matrix(params), hidden.reshape(-1, CONFIG.hidden_size)
    log_probs = choice_log_probs(lambda rows, _: rows @ head, flat, tokens[:, 1:].reshape(-1, 1))
    cross_entropy = -jnp.mean(log_probs)
    share = jnp.mean(jax.nn.one_hot(routing.chosen, CONFIG.num_experts), axis=(1, 2))  # [layers, experts]
    probability = jnp.mean(jax.nn.softmax(routing.logits, axis=-1), axis=1)
    balance = CONFIG.num_experts * jnp.mean(jnp.sum(share * probability, axis=-1))
    z = jnp.mean(jnp.square(jax.nn.logsumexp(routing.logits, axis=-1)))
    loss = cross_entropy + recipe.balance * balance + recipe.router_z * z
    return loss, {"cross_entropy": cross_entropy, "balance": balance, "max_load": jnp.max(share) * CONFIG.num_experts}


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """AdamW with global-norm clipping; no decay on norm gains and embeddings."""
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, recipe.warmup),
            optax.constant_schedule(recipe.learning_rate),
            optax.linear_schedule(recipe.learning_rate, 0.0, recipe.decay),
        ],
        [recipe.warmup, max(recipe.warmup, steps - recipe.decay)],
    )

    def decayed(params: Params) -> Any:
        mask = jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in jax.tree_util.keystr(path), params)
        return mask.replace(embed=False)

    return optax.chain(
        optax.clip_by_global_norm(recipe.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=recipe.weight_decay, mask=decayed),
    )


def train(out: Path, splits: dict[str, Split], steps: int, recipe: Recipe) -> None:
    """Runs or resumes training of a tokenizer and a model; every 20 steps a line of `loss.jsonl`."""
    tokenizer_file = out / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(splits, CONFIG.vocab_size)
        tokenizer.save(str(tokenizer_file))
    streams = token_streams(splits, tokenizer)
    typer.echo("tokens: " + ", ".join(f"{name} {len(stream):,}" for name, stream in streams.items()))

    run_steps(out, streams, init_params(jax.random.key(recipe.seed), CONFIG), steps, recipe)


def run_steps(
    out: Path, streams: dict[str, np.ndarray], params: Params, steps: int, recipe: Recipe, save_every: int = 200
) -> Params:
    """Trains from `params`, whose arrays it takes over, or resumes in `out/checkpoints`; returns what it ends with."""
    optimizer = make_optimizer(recipe, steps)
    state = (params, optimizer.init(cast("Any", params)))  # optax.Params is too narrow for pytree dataclasses

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state: Any, tokens: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        params, opt_state = state
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, tokens, recipe)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), metrics

    options = ocp.CheckpointManagerOptions(max_to_keep=3, save_interval_steps=save_every)
    with ocp.CheckpointManager((out / "checkpoints").absolute(), options=options) as manager:
        start = 0
        if (latest := manager.latest_step()) is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            start = latest + 1
            typer.echo(f"resumed after step {latest}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress, (out / "loss.jsonl").open("a", encoding="utf-8") as log:
            task = progress.add_task("training", total=steps, completed=start)
            began = time.perf_counter()
            for step in range(start, steps):
                state, metrics = update(state, jnp.asarray(sample_batch(streams, recipe, step)))
                last = step == steps - 1
                if step % 20 == 0 or last:
                    row = {"step": step, **{k: round(float(v), 5) for k, v in metrics.items()}}
                    log.write(json.dumps(row | {"seconds": round(time.perf_counter() - began, 1)}) + "\n")
                    log.flush()
                    progress.update(task, description=f"loss {row['cross_entropy']:.3f}")
                progress.advance(task)
                manager.save(step, args=ocp.args.StandardSave(state), force=last)
    return state[0]


def main(
    out: Annotated[Path, typer.Option(help="Working directory of the run.")],
    text: Annotated[Path | None, typer.Option(help="Folder of UTF-8 .txt files instead of the three sources.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of 4096 tokens.")] = 4400,
    seed: Annotated[int, typer.Option(help="Seed of initialisation and sampling.")] = 0,
) -> None:
    """Train (or resume training) the reference model."""
    out.mkdir(parents=True, exist_ok=True)
    if text is not None:
        splits, notices = from_directory(text), {}
    else:
        fetch(out / "cache")
        splits, notices = build(out / "cache"), read_notices(out / "cache")
    if leaks := leaked_passages(splits):
        raise SystemExit(f"held-out text occurs in the training text, first in {leaks[0][0]!r}: {leaks[0][1]!r}")
    write(splits, notices, out / "text")
    train(out, splits, steps, Recipe(seed=seed))


if __name__ == "__main__":
    typer.run(main)
