"""Perplexity and accuracy against average bits of the experts, by rule, quantiser and spread of levels.

    python experiments/bits_vs_rules.py --tokens 32768 --seeds 6        # docs/experiments/bits_vs_rules.json, .png
    python experiments/bits_vs_rules.py --fast                          # 2 and 2.5 bits, HQQ, two random draws

All experts are quantized, in groups of 128 rows; the rest of the model is not. Averages below 3 bits use the levels 1,
2, 3, from 3 bits on 2, 3, 4. `router_change` is measured from the routers before training, which ship with the
reference model (a bfloat16 copy of what the training's seed makes). `random` is the mean over draws (`--seeds` with
HQQ, 3 with the others). Of `expected_loss` there are four variants: every matrix on its own over the whole model; the
same ranked by gradient and curvature instead of curvature alone; the same with the levels 1 to 4 at every average; and
experts ordered by it within each layer, with the paper's counts. One order (router_change) is kept for other spreads of
levels at the same average: `adjacent levels` (the alternative `fewest_lowest`; whole averages are then uniform), and
`levels two apart` (1 and 3, or 2 and 4). Rules and GPTQ read text that is not evaluated; differences are paired by
parts of 1024 tokens, with 95 % intervals. Cost: 24 minutes on two CPU cores that other work shared; half of it is GPTQ.

Paper (arXiv 2604.06515): experts of small router change need most bits, which beats uniform bits and other orders at
the same average; MaxVar corrects the order.
The reference model disagrees. At 2 bits with HQQ (not quantized: perplexity 30.76) router_change reaches 37.2,
router_norm 37.2, random orders 36.2, uniform 34.9, and the opposite of the paper's argument, most bits for the most
frequent experts, 33.4; rare ones first is the worst (40.7). The order is the same with all three quantisers and at all
averages, but that uniform and frequency change places, and that router_norm and router_change hardly differ. Here
growth of a router goes with use and with need: its Spearman correlation with what bits save of the expected loss is
positive in every layer (0.59, 0.65, 0.14, 0.39), that of frequency 0.76 to 0.87. So least change first gives bits to
experts that need them least. MaxVar changes no position: within a layer it differs by a factor of 1.8 at most, where
zeta asks for 3.

Best of the rules everywhere is expected_loss: 32.5 at 2 bits, 31.0 at 3, and with GPTQ 31.7 and 30.9; from 2.5 bits
on it is 0.2 to 2.6 % above the perplexity without quantization, with every quantiser. Its order within layers alone is
as good as frequency (33.4 at 2 bits with HQQ); the rest of the gain is bits moving between layers and matrices. The
levels 1 to 4 change little. With the gradient it is no better: 23 to 29 thousandths of a nat worse with GPTQ up to 2.5
bits, and from 13 worse to 6 better with the others, so nothing speaks against curvature, which `allocate` ranks by.
Spreads at one order: fewer experts at the lowest level are always better; with router_change at 2 bits uniform (34.9)
beats 1, 2, 3 (37.2), which beats 1 and 3 (38.6). Only allocations as good as expected_loss, or frequency, make mixed
levels worth it. Quantisers: at 2 bits uniform RTN 35.0, HQQ 34.9, GPTQ 33.0; HQQ gains most where there are 1-bit
experts (RTN 48.5, HQQ 37.2, GPTQ 37.8 for router_change at 2 bits). At 4 bits all are within 0.2 of no quantization.
Next-word accuracy (80.3 %) shows the same, less clearly: at 2 bits expected_loss is 0.9 points above router_change with
HQQ and 1.2 with GPTQ, at 3 bits 0.1 and 0.4, within the intervals.
"""

import functools
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np
import typer

from common import Options, Setup, as_record, make_table, panels, plus_minus, prepare, run
from hetmoe.commands.common import choose_text
from hetmoe.commands.progress import show_progress
from hetmoe.evaluate.statistics import mean_interval, spearman
from hetmoe.placement.scores import score_experts
from hetmoe.quantize.allocation import BitRule, allocate
from hetmoe.quantize.levels import Alternative
from hetmoe.quantize.order import by_router_change, by_router_norm, max_variance, promote
from hetmoe.quantize.recipe import METHODS, Method, Recipe
from hetmoe.report.style import COLOURS
from quantized import (
    Bits,
    Quantizer,
    Score,
    calibration_windows,
    in_order,
    increases,
    initial_router,
    least_loss,
    mean_score,
    score,
)

AVERAGES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0)
LEVELS = (1, 2, 3, 4)
ZETA = 3.0
DRAWS = {"rtn": 3, "gptq": 3}  # of random orders; as many as --seeds with HQQ
UNIFORM, RANDOM, LOSS = "uniform", "random", "expected_loss"
ORDERS: dict[str, dict[str, Any]] = {
    "router_change": {"rule": "router_change"},
    "router_norm": {"rule": "router_norm"},
    "activation_frequency, rare": {"rule": "activation_frequency", "more_bits": "rare"},
    "activation_frequency, frequent": {"rule": "activation_frequency", "more_bits": "frequent"},
}
LOSS_GRADIENT, LOSS_FREE, LOSS_ORDER = f"{LOSS}, with gradient", f"{LOSS}, levels 1 to 4", f"{LOSS}, order per layer"
SPREADS = ("three levels", "adjacent levels", "levels two apart")
LOOKS = {
    "router_change": (COLOURS[0], "s"),
    "router_norm": (COLOURS[1], "D"),
    "activation_frequency, rare": (COLOURS[2], "^"),
    "activation_frequency, frequent": (COLOURS[3], "P"),
    RANDOM: (COLOURS[4], "v"),
    LOSS_ORDER: (COLOURS[8], "p"),
    LOSS: (COLOURS[7], "<"),
    LOSS_FREE: (COLOURS[6], "X"),
}
QUANTISER_COLOURS = {"rtn": COLOURS[5], "hqq": COLOURS[0], "gptq": COLOURS[2]}


def three_levels(average: float) -> tuple[int, ...]:
    """1, 2, 3 bits for averages below 3, else 2, 3, 4."""
    return (1, 2, 3) if average < 3 else (2, 3, 4)


def spread(name: str, average: float) -> tuple[tuple[int, ...], Alternative]:
    """Levels at an average, and which of the two ways that three levels leave."""
    levels = three_levels(average)
    if name == "levels two apart":
        return (levels[0], levels[-1]), "paper"
    return levels, "paper" if name == "three levels" else "fewest_lowest"


class Rules:
    """Bits by rule and average."""

    def __init__(self, setup: Setup, windows: np.ndarray) -> None:
        self.model, self.key, self.windows = setup.model, setup.score_key, windows
        self.initial = initial_router(setup.options.model)
        self.orders = {name: how for name, how in ORDERS.items() if name != "router_change" or self.initial is not None}
        self.base = next(iter(self.orders))
        self.shape = (len(setup.config.moe_layers), setup.config.num_experts, 3)

    def by_order(self, how: dict[str, Any], average: float, kind: str = SPREADS[0], key: Any = None) -> Bits:
        """Bits of one of `ORDERS`, or of a random order."""
        levels, alternative = spread(kind, average)
        rule = BitRule(average=average, levels=levels, alternative=alternative, zeta=None, **how)
        found = allocate(
            self.model, rule, Recipe(method="rtn"), key=self.key if key is None else key, windows=self.windows,
            initial=self.initial,
        )  # fmt: skip
        return found.bits

    def correlations(self) -> dict[str, list[float]]:
        """Spearman's correlation, layer by layer, of what orders experts with the expected loss that bits save."""
        router = self.model.params.layers.moe.router
        values = {"router_norm": np.linalg.norm(np.asarray(router, np.float64), axis=1)}
        if self.initial is not None:
            values["router_change"] = values["router_norm"] - np.linalg.norm(np.asarray(self.initial), axis=1)
        tokens = jnp.asarray(self.windows)
        values["activation_frequency"] = np.asarray(score_experts(self.model, "activation_frequency", tokens=tokens))
        saved = self.by_loss("hqq").saved((1, 2, 3))
        pairs = {f"{name}, {LOSS} saved": (value, saved) for name, value in values.items()}
        frequency = values["activation_frequency"]
        pairs |= {f"{n}, activation_frequency": (v, frequency) for n, v in values.items() if v is not frequency}
        return {
            name: [round(spearman(a, b), 3) for a, b in zip(left, right, strict=True)]
            for name, (left, right) in pairs.items()
        }

    @functools.cache  # noqa: B019 (one object, which lives as long as the program)
    def by_loss(self, method: Method) -> "LossRules":
        """The rules by expected loss for a quantiser; for GPTQ those of HQQ, as `allocate` has it."""
        return self.by_loss("hqq") if method == "gptq" else LossRules(self, method)

    def max_variance(self) -> dict[str, Any]:
        """What MaxVar would change at zeta 3."""
        router = self.model.params.layers.moe.router
        orders = {"router_norm": by_router_norm(router)}
        if self.initial is not None:
            orders["router_change"] = by_router_change(router, self.initial)
        record: dict[str, Any] = {"zeta": ZETA}
        for how in ("highest_norm", "all"):
            variance = max_variance(self.model.params.layers.moe.experts.gate, how)
            record[how] = {
                "positions_changed": {n: int(np.sum(promote(o, variance, ZETA) != o)) for n, o in orders.items()},
                "largest_by_smallest_per_layer": [
                    round(float(row.max() / row.min()), 3) for row in np.asarray(variance)
                ],
            }
        return record


class LossRules:
    """Bits by expected loss increase; estimated once for all averages."""

    def __init__(self, rules: Rules, method: Method) -> None:
        self.model = rules.model
        self.found = increases(rules.model, Recipe(method=method), rules.windows, LEVELS, rules.key)

    def saved(self, levels: tuple[int, ...]) -> np.ndarray:
        """Expected increase of every expert at the lowest level minus that at the highest, `[layers, experts]`."""
        of_expert = self.found.curvature.sum(axis=2)
        return of_expert[..., LEVELS.index(levels[0])] - of_expert[..., LEVELS.index(levels[-1])]

    def bits(self, average: float) -> dict[str, Bits]:
        """By name of the variant."""
        levels, curvature = three_levels(average), self.found.curvature
        order = np.argsort(-self.saved(levels), axis=1, kind="stable")
        return {
            LOSS_ORDER: in_order(order, average, levels, "paper"),
            LOSS: least_loss(self.model, curvature, LEVELS, levels, average),
            LOSS_GRADIENT: least_loss(self.model, self.found.total, LEVELS, levels, average),
            LOSS_FREE: least_loss(self.model, curvature, LEVELS, LEVELS, average),
        }


def allocations(rules: Rules, draws: Any, averages: tuple[float, ...]) -> dict[tuple[str, str, float], Bits]:
    """(rule, spread, average) to bits, for the rules that do not depend on the quantiser."""
    found: dict[tuple[str, str, float], Bits] = {}
    for average in averages:
        if average == int(average):
            found[UNIFORM, SPREADS[0], average] = np.full(rules.shape, int(average))
        if average in LEVELS[-1:]:
            continue
        for name, how in rules.orders.items():
            found[name, SPREADS[0], average] = rules.by_order(how, average)
        for kind in SPREADS[1:]:
            found[rules.base, kind, average] = rules.by_order(rules.orders[rules.base], average, kind)
        for number, key in enumerate(draws):
            found[f"{RANDOM} {number}", SPREADS[0], average] = rules.by_order({"rule": RANDOM}, average, key=key)
    return found


def evaluate(
    setup: Setup, rules: Rules, wanted: dict[tuple[str, str, float], Bits], method: Method
) -> dict[tuple[str, str, float], tuple[Bits, Score]]:
    """Everything at one quantiser; equal bits are evaluated once."""
    quantizer = Quantizer(setup.model, Recipe(method=method), LEVELS, rules.windows)
    loss = rules.by_loss(method)
    every = dict(wanted)
    for average in {a for _, _, a in wanted if a != LEVELS[-1]}:
        every |= {(name, SPREADS[0], average): bits for name, bits in loss.bits(average).items()}
    seen: dict[bytes, Score] = {}
    with show_progress(setup.console, METHODS[method], "models", len(every)) as advance:
        for bits in every.values():
            if bits.tobytes() not in seen:
                seen[bits.tobytes()] = score(quantizer.params(bits), setup.text.batches, setup.model)
            advance(1)
    return {key: (bits, seen[bits.tobytes()]) for key, bits in every.items()}


def gather(found: dict[tuple[str, str, float], tuple[Bits, Score]], digital: Score, base: str) -> list[dict[str, Any]]:
    """One row per rule, spread and average; random draws become one row."""
    draws: dict[float, list[Score]] = {}
    for (name, _, average), (_, of) in found.items():
        if name.startswith(RANDOM):
            draws.setdefault(average, []).append(of)
    every = {key: value for key, value in found.items() if not key[0].startswith(RANDOM)}
    every |= {
        (RANDOM, SPREADS[0], a): (found[f"{RANDOM} 0", SPREADS[0], a][0], mean_score(s)) for a, s in draws.items()
    }
    rows: list[dict[str, Any]] = []
    for (name, kind, average), (bits, of) in every.items():
        row: dict[str, Any] = {"rule": name, "spread": kind, "average": average, "reached": float(np.mean(bits))}
        row |= {**of.record(), "loss_increase": of.more_loss(digital)}
        if average != LEVELS[-1] and (name, kind) != (base, SPREADS[0]):
            reference = every[base, SPREADS[0], average][1]
            row |= {f"loss_minus_{base}": of.more_loss(reference), f"accuracy_minus_{base}": of.more_correct(reference)}
        if name == RANDOM:
            row["loss_over_draws"] = mean_interval([float(s.nll.mean()) for s in draws[average]])
            row["perplexity_per_draw"] = [s.record()["perplexity"] for s in draws[average]]
        rows.append(row)
    return rows


def show(setup: Setup, method: str, rows: list[dict[str, Any]], averages: tuple[float, ...], base: str) -> None:
    """Tables of perplexity, accuracy, and loss beside the paper's rule."""
    lines = list(dict.fromkeys((r["rule"], r["spread"]) for r in rows))
    by = {(r["rule"], r["spread"], r["average"]): r for r in rows}
    shown = {
        "perplexity": lambda r: f"{r['perplexity']:.2f}",
        "next-word accuracy, %": lambda r: f"{100 * r['accuracy']:.2f}",
        f"loss minus {base}, 0.001 nats": lambda r: (
            plus_minus(r[f"loss_minus_{base}"], 1e3, 1) if f"loss_minus_{base}" in r else ""
        ),
    }
    for what, text in shown.items():
        table = make_table(f"{method}: {what}", "rule", [f"{a:g} bits" for a in averages])
        for name, kind in lines:
            cells = [text(by[name, kind, a]) if (name, kind, a) in by else "" for a in averages]
            table.add_row(name if kind == SPREADS[0] else f"{name}, {kind}", *cells)
        setup.console.print(table)


def draw(setup: Setup, results: dict[str, list[dict[str, Any]]], base: str) -> Any:
    """Rules, quantisers and spreads, a panel each."""
    first = "hqq" if "hqq" in results else next(iter(results))
    figure, (by_rule, by_quantiser, by_spread) = panels(
        3, f"{setup.model.name}: perplexity against average bits of expert weights", width=5, height=5
    )

    def line(axes: Any, rows: list[dict[str, Any]], label: str, **look: Any) -> None:
        points = sorted((r["average"], r["perplexity"]) for r in rows)
        axes.plot(*zip(*points, strict=True), label=label, **({"ms": 5, "lw": 1.4} | look))

    def rows_of(method: str, rule: str, kind: str = SPREADS[0]) -> list[dict[str, Any]]:
        return [r for r in results[method] if (r["rule"], r["spread"]) == (rule, kind)]

    for name, (colour, marker) in LOOKS.items():
        if rows_of(first, name):
            line(by_rule, rows_of(first, name), name, color=colour, marker=marker)
    for method in results:
        colour = QUANTISER_COLOURS[method]
        line(by_quantiser, rows_of(method, base), f"{method}, {base}", color=colour, marker="s")
        line(by_quantiser, rows_of(method, LOSS), f"{method}, {LOSS}", color=colour, marker="<", ls="--", mfc="white")
    for kind, colour, marker in zip(SPREADS, (COLOURS[0], COLOURS[5], COLOURS[2]), "s^D", strict=True):
        line(by_spread, rows_of(first, base, kind), f"{base}, {kind}", color=colour, marker=marker)
    titles = (f"rules ({first})", "quantisers", f"levels ({first})")
    for axes, title in zip((by_rule, by_quantiser, by_spread), titles, strict=True):
        if axes is not by_quantiser:
            line(axes, rows_of(first, UNIFORM), UNIFORM, color="#595959", marker="o", ls="none", mfc="white", ms=8)
        axes.axhline(setup.digital.perplexity[0], color="#595959", lw=1.2, label="not quantized")
        axes.set(xlabel="average bits per expert weight", ylabel="perplexity", title=title)
        axes.legend(frameon=False, fontsize="small")
    return figure


def main(
    options: Options,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens that rules and GPTQ read; not evaluated.")] = 16384,
    *,
    fast: Annotated[bool, typer.Option("--fast", help="2 and 2.5 bits, HQQ, two random draws.")] = False,
) -> None:
    """Allocate, quantize, evaluate and print."""
    setup = prepare("bits_vs_rules", options)
    files = choose_text(options.text)
    windows = calibration_windows(setup.model, files, options.seq, options.tokens, calibration_tokens)
    averages = (2.0, 2.5) if fast else AVERAGES
    methods: list[Any] = ["hqq"] if fast else list(METHODS)
    rules = Rules(setup, windows)
    wanted = allocations(rules, list(setup.keys)[: 2 if fast else None], averages)
    digital = score(setup.model.params, setup.text.batches, setup.model)
    results: dict[str, list[dict[str, Any]]] = {}
    for method in methods:
        drawn = {f"{RANDOM} {n}" for n in range(DRAWS.get(method, len(setup.keys)))}
        part = {key: bits for key, bits in wanted.items() if not key[0].startswith(RANDOM) or key[0] in drawn}
        results[method] = gather(evaluate(setup, rules, part, method), digital, rules.base)
        show(setup, method, results[method], averages, rules.base)
    variance = rules.max_variance()
    correlations = rules.correlations()
    setup.console.print(f"MaxVar: {variance}\nSpearman by layer: {correlations}")
    figure = draw(setup, results, rules.base)
    for row in (row for rows in results.values() for row in rows):
        row |= {name: as_record(value) for name, value in row.items() if hasattr(value, "standard_error")}
    record = {
        "calibration_tokens": windows[:, 1:].size, "averages": averages, "base": rules.base, "max_variance": variance,
        "spearman_per_layer": correlations,
        "not_quantized": digital.record(), "rows": results,
    }  # fmt: skip
    setup.save(record, figure, None)


if __name__ == "__main__":
    run(main)
