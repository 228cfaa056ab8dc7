"""The model card of the embedded reference model, as text; `export_reference.py` writes it."""

from typing import Any

import numpy as np

from hetmoe.models.config import ModelConfig

CARD = """# hetmoe reference model

A mixture-of-experts language model small enough to ship with the package ({parameters:,} parameters,
bfloat16), in the OLMoE layout (`config.json`, `model.safetensors`, `tokenizer.json`): {layers} layers,
hidden {hidden}, {experts} experts a layer of intermediate size {inner}, top-{copies},
{vocabulary}-entry byte-level BPE, context {context}.
It exists so that every experiment of hetmoe runs anywhere in minutes. It is not useful as a language model.

## Training

```
python experiments/train_reference.py --out build/reference --steps {steps}
python experiments/export_reference.py --run build/reference --out hetmoe/models/reference
```

{steps:,} steps of {batch} x {seq} tokens ({millions:.1f} M tokens), AdamW, peak learning rate {rate}, constant and then
linear to zero over the last {decay} steps, load-balancing loss {balance}, router z-loss {router_z}, seed {seed}, on two
CPU cores. `routers_step0.safetensors` holds the routers before training.

![training loss](loss.png)

## Held-out text

Whole chapters, plays and blocks of synsets never trained on, embedded in `heldout/`. The first two columns are for
windows of {context} tokens that do not overlap, as everywhere in hetmoe; a window's first tokens then have little
context. The third is the usual sliding window: every token is predicted once, behind at least {overlap} others.

| source | bits per byte | perplexity per token | bits per byte, sliding | tokens | bytes |
|---|---|---|---|---|---|
{heldout}

Greedy continuations (prompt in bold, line breaks as /):

{quotes}

## Expert load

On held-out text the busiest expert of a layer gets {most} times the uniform load (layers 0 to {last}),
the least busy {least} times.

![expert load](load.png)

## Data and licences

| source | training bytes | sampling share | held out | licence |
|---|---|---|---|---|
{sources}

Weights and card: Apache-2.0, as the project. The notices of the sources:

{notices}
"""


def card(
    config: ModelConfig, record: dict[str, Any], manifest: dict[str, Any], samples: list[tuple[str, str]], overlap: int
) -> str:
    """Fills in the card from `training.json`'s record, the text's manifest and greedy continuations."""
    recipe = record["recipe"]
    load = np.array(record["expert_load"]) * config.num_experts
    heldout = "\n".join(
        f"| {name} | {r['bits_per_byte']:.3f} | {r['perplexity']:.2f} | {r['bits_per_byte_sliding']:.3f} "
        f"| {r['tokens']:,} | {r['bytes']:,} |"
        for name, r in record["heldout"].items()
    )
    sources = "\n".join(
        f"| {name} | {m['train']['bytes']:,} | {recipe['weights'].get(name, 1.0):.2f} "
        f"| {', '.join(m['heldout_titles'])} | {m['licence']} |"
        for name, m in manifest.items()
    )
    return CARD.format(
        parameters=record["parameters"],
        layers=config.num_layers,
        hidden=config.hidden_size,
        experts=config.num_experts,
        inner=config.expert_intermediate_size,
        copies=config.experts_per_token,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        overlap=overlap,
        steps=record["steps"],
        millions=record["tokens_seen"] / 1e6,
        batch=recipe["batch"],
        seq=recipe["seq"],
        rate=recipe["learning_rate"],
        decay=recipe["decay"],
        balance=recipe["balance"],
        router_z=recipe["router_z"],
        seed=recipe["seed"],
        heldout=heldout,
        quotes="\n".join(f"- **{prompt}** {text}".replace("\n", " / ") for prompt, text in samples),
        most=", ".join(f"{x:.2f}" for x in load.max(axis=1)),
        least=", ".join(f"{x:.2f}" for x in load.min(axis=1)),
        last=config.num_layers - 1,
        sources=sources,
        notices="\n\n".join(f"### {name}\n\n```\n{m['notice'].strip()}\n```" for name, m in manifest.items()),
    )
