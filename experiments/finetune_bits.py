"""Bits by rule for a model that was fine-tuned on one kind of text, with the real change of its routers.

    python experiments/finetune_bits.py                        # fetches the training text (once), fine-tunes or resumes
    python experiments/finetune_bits.py --train-text build/text/train/wordnet.txt        # of `reference_text.py`
    python experiments/finetune_bits.py --fast                 # 2 and 2.5 bits, two random draws

The reference model is fine-tuned for 200 steps of 4096 tokens of WordNet glosses (`finetune_reference.py`, which
resumes), and all its experts are quantized by HQQ, in groups of 128 rows, with the levels 1, 2, 3 below 3 bits and 2,
3, 4 from there. `router_change, fine-tuning` is measured from the real routers before and after fine-tuning, `all
training` from those of step 0; expected_loss and frequencies are of WordNet text that is not evaluated; `random` is the
mean of 5 draws. Differences are paired by parts of 1024 tokens, with 95 % intervals. Cost: three minutes of
fine-tuning on two idle CPU cores, and six minutes for the rest on two that other work shared.

Fine-tuning lowers the perplexity on held-out WordNet from 20.89 to 20.06 (loss by 0.041 +- 0.009 nats) and raises it on
the others (33.8 to 37.7, 40.7 to 45.2). Norms of router columns of 1.1 to 1.3 change by 0.005 (standard deviation).
(Not in the record: 300 steps on Shakespeare at twice the learning rate gained next to nothing there, 40.7 to 40.5.)
Paper (arXiv 2604.06515): experts of small change need most bits, where the change is known, rather than small norm.
The reference model agrees in part. On the tuned kind the change over fine-tuning is the best of the rules that read
routers: from 2 bits on it is 0.013 to 0.048 nats better than random orders, and 0.021 to 0.074 better than router_norm
and the change over all training, which are worse than random as in `bits_vs_rules.py`; at 1.5 bits it is level with
random. On the other kinds it is better than random at every average, and better than both orders by frequency nearly
everywhere. But it does not beat uniform bits on the tuned kind: 22.56 and 22.59 at 2 bits, 20.60 and 20.38 at 3. And
there the most frequent experts first is better (21.74 at 2 bits), expected_loss best at every average (21.20 at 2 bits,
20.35 at 3, of 20.06), also on Shakespeare; on Austen's novels, which no rule read, it is best from 2 bits on.
Why the change over fine-tuning serves is not frequency: its Spearman correlation with it is 0.37, 0.23, 0.22 and -0.14
by layer. (With the final norm it is 0.02, -0.52, -0.57 and 0.00.)
"""

import time
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.console import Console

from bits_vs_rules import LEVELS, LOOKS, LOSS, RANDOM, UNIFORM, three_levels
from common import RESULTS, as_record, digits, make_table, panels, plus_minus, write_results
from finetune_reference import KINDS, STEPS, finetune
from hetmoe.checkpoint.load import load_model
from hetmoe.commands.common import make_console
from hetmoe.commands.progress import show_progress
from hetmoe.errors import InputError
from hetmoe.evaluate.prepare import EvalText, prepare_text
from hetmoe.evaluate.statistics import mean_interval, spearman
from hetmoe.evaluate.text import heldout_files
from hetmoe.files import check_writable
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.scores import score_experts
from hetmoe.quantize.allocation import BitRule, allocate
from hetmoe.quantize.recipe import Recipe
from hetmoe.report.style import COLOURS
from quantized import PART, Bits, Quantizer, Score, calibration_windows, initial_router, mean_score, score

NAME = "finetune_bits"
AVERAGES = (1.5, 2.0, 2.5, 3.0, 3.5)
TUNING, TRAINING = "router_change, fine-tuning", "router_change, all training"
LOOKS_HERE = {TUNING: LOOKS["router_change"], TRAINING: (COLOURS[5], "o")} | LOOKS
RECIPE = Recipe(method="hqq")
Scores = dict[str, Score]  # by kind of text


def router_norms(router: Any) -> np.ndarray:
    """`[layers, experts]`."""
    return np.linalg.norm(np.asarray(router, np.float64), axis=1)


def allocations(
    tuned: Model, before: Any, windows: np.ndarray, key: jax.Array, averages: tuple[float, ...], draws: int
) -> dict[tuple[str, float], Bits]:
    """(rule, average) to bits of every expert matrix."""
    initial = {TUNING: before, TRAINING: initial_router("reference")}
    rules: dict[str, dict[str, Any]] = {name: {"rule": "router_change"} for name in initial}
    rules["router_norm"] = {"rule": "router_norm"}
    for more in ("rare", "frequent"):
        rules[f"activation_frequency, {more}"] = {"rule": "activation_frequency", "more_bits": more}
    rules |= {f"{RANDOM} {n}": {"rule": RANDOM} for n in range(draws)}
    rules |= {LOSS: {"rule": LOSS}, UNIFORM: {"rule": UNIFORM}}
    found: dict[tuple[str, float], Bits] = {}
    for average in averages:
        for number, (name, how) in enumerate(rules.items()):
            if name == UNIFORM and average != int(average):
                continue
            rule = BitRule(average=average, levels=three_levels(average), zeta=None, **how)
            own = key if name == LOSS else jax.random.fold_in(key, number)
            done = allocate(tuned, rule, RECIPE, key=own, windows=windows, initial=initial.get(name))
            found[name, average] = done.bits
    return found


def gather(found: dict[tuple[str, float], Scores], whole: Scores) -> list[dict[str, Any]]:
    """One row per rule and average; random draws become one row."""
    draws: dict[float, list[Scores]] = {}
    for (name, average), scores in found.items():
        if name.startswith(RANDOM):
            draws.setdefault(average, []).append(scores)
    every = {key: scores for key, scores in found.items() if not key[0].startswith(RANDOM)}
    every |= {(RANDOM, a): {kind: mean_score([s[kind] for s in each]) for kind in whole} for a, each in draws.items()}
    rows: list[dict[str, Any]] = []
    for (name, average), scores in every.items():
        row: dict[str, Any] = {"rule": name, "average": average, "kinds": {}}
        for kind, of in scores.items():
            part: dict[str, Any] = {**of.record(), "loss_increase": of.more_loss(whole[kind])}
            if name != TUNING:
                part |= {f"loss_minus_{TUNING}": of.more_loss(every[TUNING, average][kind])}
            if name == RANDOM:
                part["loss_over_draws"] = mean_interval([float(s[kind].nll.mean()) for s in draws[average]])
            row["kinds"][kind] = {n: as_record(v) if hasattr(v, "standard_error") else v for n, v in part.items()} | {
                "shown": plus_minus(part[f"loss_minus_{TUNING}"], 1e3, 1) if name != TUNING else ""
            }
        rows.append(row)
    return rows


def show(console: Console, kind: str, rows: list[dict[str, Any]], averages: tuple[float, ...]) -> None:
    """Tables of perplexity, accuracy, and loss beside the rule by fine-tuning's change."""
    by = {(row["rule"], row["average"]): row["kinds"][kind] for row in rows}
    shown = {
        "perplexity": lambda part: f"{part['perplexity']:.2f}",
        "next-word accuracy, %": lambda part: f"{100 * part['accuracy']:.2f}",
        f"loss minus {TUNING}, 0.001 nats": lambda part: part["shown"],
    }
    for what, text in shown.items():
        table = make_table(f"{kind}: {what}", "rule", [f"{a:g} bits" for a in averages])
        for name in dict.fromkeys(name for name, _ in by):
            table.add_row(name, *(text(by[name, a]) if (name, a) in by else "" for a in averages))
        console.print(table)


def draw(rows: list[dict[str, Any]], before: Scores, whole: Scores, tuned_kind: str) -> Any:
    """A panel for each kind of text."""
    title = f"reference model, fine-tuned on {tuned_kind}: perplexity against average bits (HQQ)"
    figure, row = panels(len(whole), title, height=5)
    for axes, kind in zip(row, whole, strict=True):
        for name, (colour, marker) in LOOKS_HERE.items():
            points = [(r["average"], r["kinds"][kind]["perplexity"]) for r in rows if r["rule"] == name]
            if points:
                axes.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, ms=5, lw=1.4)
        points = [(r["average"], r["kinds"][kind]["perplexity"]) for r in rows if r["rule"] == UNIFORM]
        axes.plot(*zip(*points, strict=True), label=UNIFORM, color="#595959", marker="o", ls="none", mfc="white", ms=8)
        axes.axhline(whole[kind].perplexity, color="#595959", lw=1.2, label="fine-tuned, not quantized")
        axes.axhline(before[kind].perplexity, color="#595959", lw=1.2, ls=":", label="before fine-tuning")
        axes.set(xlabel="average bits per expert weight", ylabel="perplexity", title=kind)
    figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def routers(before: Any, after: Any, frequency: Any) -> dict[str, Any]:
    """How the norms of the routers' columns changed, and how that goes with what else orders experts."""
    initial = initial_router("reference")
    old, new = router_norms(before), router_norms(after)
    change, grown = new - old, new - router_norms(initial)

    def by_layer(other: np.ndarray) -> list[float]:
        return [round(spearman(a, b), 3) for a, b in zip(change, other, strict=True)]

    return {
        "mean_norm_before": digits(old.mean(axis=1)), "mean_change": digits(change.mean(axis=1)),
        "standard_deviation_of_change": digits(change.std(axis=1)),
        "spearman_with_change_over_all_training": by_layer(grown), "spearman_with_norm": by_layer(new),
        "spearman_with_activation_frequency": by_layer(np.asarray(frequency)),
        "change": digits(change, 4),
    }  # fmt: skip


def main(
    run: Annotated[Path, typer.Option(help="Working directory of the fine-tuning.")] = Path("build/finetune/wordnet"),
    kind: Annotated[str, typer.Option(help=", ".join(KINDS))] = "wordnet",
    train_text: Annotated[Path | None, typer.Option(help="UTF-8 file of training text; default: fetched.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of fine-tuning.")] = STEPS,
    tokens: Annotated[int, typer.Option(help="Tokens of each kind to evaluate.")] = 12288,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of the fine-tuned kind that rules read.")] = 8192,
    seq: Annotated[int, typer.Option(help="Tokens predicted per window.")] = 256,
    seeds: Annotated[int, typer.Option(help="Random orders.")] = 5,
    seed: Annotated[int, typer.Option(help="Of random orders and labels.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder of the JSON file and the figure.")] = RESULTS,
    *,
    fast: Annotated[bool, typer.Option("--fast", help="2 and 2.5 bits, two random draws.")] = False,
) -> None:
    """Fine-tune, allocate, quantize, evaluate and print."""
    started, console = time.perf_counter(), make_console()
    if seeds < 2 or seed < 0:
        raise InputError(f"--seeds {seeds} must be at least 2, and --seed {seed} at least 0")
    for suffix in ("json", "png"):
        check_writable(output / f"{NAME}.{suffix}")
    reference = load_model("reference", "float32")
    tuned = finetune(reference, run, kind, train_text, steps)
    files = {file.stem: file for file in heldout_files()}
    texts: dict[str, EvalText] = {
        name: prepare_text(reference, [file], tokens=tokens, seq=seq, batch=PART, seed=seed, calibrate=True)
        for name, file in files.items()
    }

    def scores(params: Any) -> Scores:
        return {name: score(params, text.batches, reference) for name, text in texts.items()}

    before, whole = scores(reference.params), scores(tuned.params)
    for name in texts:
        gain = plus_minus(whole[name].more_loss(before[name]), 1e3, 1)
        perplexities = f"{before[name].perplexity:.2f} -> {whole[name].perplexity:.2f}"
        console.print(f"{name}: perplexity {perplexities}, loss {gain} (0.001 nats)")
    windows = calibration_windows(tuned, [files[kind]], seq, tokens, calibration_tokens)
    averages = (2.0, 2.5) if fast else AVERAGES
    router = reference.params.layers.moe.router
    draws, key = 2 if fast else seeds, jax.random.key(seed)
    wanted = allocations(tuned, router, windows, key, averages, draws)
    quantizer = Quantizer(tuned, RECIPE, LEVELS, windows)
    found: dict[tuple[str, float], Scores] = {}
    with show_progress(console, "HQQ", "models", len(wanted)) as advance:
        for which, bits in wanted.items():
            found[which] = scores(quantizer.params(bits))
            advance(1)
    rows = gather(found, whole)
    for name in texts:
        show(console, name, rows, averages)
    for row in rows:
        for part in row["kinds"].values():
            del part["shown"]
    frequency = score_experts(tuned, "activation_frequency", tokens=jnp.asarray(windows))
    norms = routers(router, tuned.params.layers.moe.router, frequency)
    console.print({name: value for name, value in norms.items() if name != "change"})
    record = {
        "options": {
            "kind": kind, "steps": steps, "tokens_per_kind": tokens, "calibration_tokens": calibration_tokens,
            "seq": seq, "seeds": draws, "seed": seed,
        },
        "model": {"name": "reference", "fingerprint": model_fingerprint(reference)},
        "results": {
            "averages": averages, "quantiser": RECIPE.method,
            "before": {name: of.record() for name, of in before.items()},
            "fine_tuned": {
                name: of.record() | {"loss_minus_before": as_record(of.more_loss(before[name]))}
                for name, of in whole.items()
            },
            "router_norms": norms, "rows": rows,
        },
    }  # fmt: skip
    write_results(output, NAME, record, draw(rows, before, whole, kind), started, console)


if __name__ == "__main__":
    typer.run(main)
