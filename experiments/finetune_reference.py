"""Fine-tunes the embedded reference model on one kind of its training text.

    python experiments/finetune_reference.py --run build/finetune/wordnet           # fetch, train, or resume
    python experiments/finetune_reference.py --run build/finetune/wordnet --text FILE

The optimiser, the losses and the batches are those of `train_reference.py`, with a new optimiser state and a sixth of
the learning rate. `FILE` is UTF-8 text with `<|endoftext|>` lines between documents, as `reference_text.py` writes it
(`train/KIND.txt`). Cost: 0.8 s a step of 4096 tokens on two idle CPU cores (three minutes), 2.5 GB of memory.
Result: `RUN/checkpoints/` (Orbax), `RUN/loss.jsonl`, which `experiments/finetune_bits.py` goes on from.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import typer
from tokenizers import Tokenizer

from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError
from hetmoe.evaluate.text import SEPARATOR, read_text
from hetmoe.models.model import Model
from reference_text import Document, Split, build, fetch
from train_reference import CONFIG, Recipe, run_steps, token_streams

KINDS = ("austen", "shakespeare", "wordnet")
RECIPE = Recipe(learning_rate=5e-4, warmup=20, decay=150)
STEPS = 200
SAVE_EVERY = 50


def training_text(kind: str, text: Path | None, cache: Path) -> Split:
    """Documents of one kind, from a file or fetched."""
    if text is None:
        fetch(cache)
        return build(cache)[kind]
    return Split([Document(f"{kind} {n}", part) for n, part in enumerate(read_text(text).split(SEPARATOR))], [])


def finetune(model: Model, run: Path, kind: str, text: Path | None, steps: int, recipe: Recipe = RECIPE) -> Model:
    """The model after `steps` steps; resumes, or returns at once what is already trained.

    Raises:
        InputError: for an unknown kind, another architecture than the reference model's, or a run directory that
            holds a run with other settings or text.
    """
    if kind not in KINDS:
        raise InputError(f"--kind {kind!r} must be one of {', '.join(KINDS)}")
    if model.config != CONFIG or not isinstance(model.tokenizer, Tokenizer):
        raise InputError(f"model {model.name!r} is not the reference model, which this experiment fine-tunes")
    streams = token_streams({kind: training_text(kind, text, run / "cache")}, model.tokenizer)
    digest = hashlib.sha256(streams[kind].tobytes()).hexdigest()
    settings = {"kind": kind, "tokens": digest, "steps": steps, "recipe": dataclasses.asdict(recipe)}
    wanted, note = json.loads(json.dumps(settings)), run / "settings.json"
    if note.exists() and json.loads(note.read_text()) != wanted:
        raise InputError(f"{run} holds a run with other settings or text ({note.name}): give another --run")
    run.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(wanted) + "\n")
    copy = jax.tree.map(jnp.copy, model.params)
    return dataclasses.replace(model, params=run_steps(run, streams, copy, steps, recipe, SAVE_EVERY))


def main(
    run: Annotated[Path, typer.Option(help="Working directory of the run.")],
    kind: Annotated[str, typer.Option(help=", ".join(KINDS))] = "wordnet",
    text: Annotated[Path | None, typer.Option(help="UTF-8 file of training text; default: fetched.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps of 4096 tokens.")] = STEPS,
) -> None:
    """Fine-tune, or resume."""
    finetune(load_model("reference", "float32"), run, kind, text, steps)


if __name__ == "__main__":
    typer.run(main)
