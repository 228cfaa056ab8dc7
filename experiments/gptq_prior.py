"""How many tokens the layer's mean Hessian should count for in GPTQ (`GptqOptions.prior`).

    python experiments/gptq_prior.py --tokens 32768            # docs/experiments/gptq_prior.json, .png
    python experiments/gptq_prior.py --fast                    # 2 bits, priors 0 and 1

All experts get 2 or 3 bits in groups of 128 rows. GPTQ reads 4096 or 32,768 tokens that are not evaluated, so that an
expert sees 256 or 2048 on average, for 128 inputs. Differences are paired by parts of 1024 tokens, with 95 % intervals
over the text; they do not cover the choice of the calibration text. Cost: three minutes on two CPU cores.

Without a prior, GPTQ on little text is worse than at the default of 1: at 2 bits perplexity 34.20 against 33.13 (by
0.032 +- 0.007 nats), at 3 bits 31.25 against 31.06. None of 0.25, 2 and 8 is clearly better than the default: with 4096
tokens they are worse by 0.009 +- 0.007 nats at 2 bits and by 0 to 0.004 at 3 bits, with 32,768 by 0.005 to 0.007 and by
-0.001 to 0.001. There 0 does as well as they: the prior is for experts that few tokens reach. So the default
stays. HQQ, which reads no text, is at 34.90 and 31.33, round-to-nearest at 35.00 and 31.35.
"""

from typing import Annotated, Any

import numpy as np
import typer

from common import Options, Setup, add_legend, as_record, draw_line, make_table, panels, plus_minus, prepare, run
from hetmoe.commands.common import choose_text
from hetmoe.commands.progress import show_progress
from hetmoe.models.params import with_experts
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.gptq import GptqOptions
from hetmoe.quantize.recipe import Method, Recipe
from hetmoe.report.style import COLOURS
from quantized import Score, calibration_windows, plain, score

PRIORS = (0.0, 0.25, 1.0, 2.0, 8.0)
BITS = (2, 3)
SIZES = (4096, 32768)  # tokens of calibration text
DEFAULT = GptqOptions().prior


def evaluate(setup: Setup, bits: int, recipe: Recipe, windows: Any) -> tuple[Score, int]:
    """All experts at the same bits; beside the score, columns that fell back to round-to-nearest."""
    shape = (len(setup.config.moe_layers), setup.config.num_experts, 3)
    model, facts = quantize_experts(setup.model, np.full(shape, bits), recipe, windows=windows)
    parts = [part for layer in facts for matrix in layer["matrices"].values() for part in matrix]
    params = with_experts(model.params, plain(model))
    return score(params, setup.text.batches, setup.model), sum(part.get("fell_back", 0) for part in parts)


def draw(setup: Setup, found: dict[tuple[int, int, float], Score], others: Any, digital: Score) -> Any:
    """Loss increase against the prior, a panel for each number of bits."""
    every_bits = list(dict.fromkeys(bits for bits, _, _ in found))
    figure, row = panels(len(every_bits), f"{setup.model.name}: GPTQ by weight of the layer's mean Hessian")
    priors = list(dict.fromkeys(prior for _, _, prior in found))
    for axes, bits in zip(row, every_bits, strict=True):
        for size, colour, marker in zip(SIZES, (COLOURS[5], COLOURS[0]), "^s", strict=True):
            intervals = [found[bits, size, prior].more_loss(digital) for prior in priors]
            look = {"color": colour, "marker": marker, "ms": 5, "lw": 1.5}
            draw_line(axes, range(len(priors)), intervals, f"GPTQ, {size:,} calibration tokens", look)
        axes.axhline(others[bits, "hqq"].more_loss(digital).mean, color="#595959", lw=1.2, label="HQQ")
        axes.set_xticks(range(len(priors)), [f"{prior:g}" for prior in priors])
        axes.set(xlabel="prior (tokens per input)", ylabel="loss increase (nats per token)", title=f"{bits} bits")
    add_legend(figure, row[0])
    return figure


def main(
    options: Options,
    *,
    fast: Annotated[bool, typer.Option("--fast", help="2 bits, priors 0 and 1.")] = False,
) -> None:
    """Quantize, evaluate and print."""
    setup = prepare("gptq_prior", options)
    files = choose_text(options.text)
    every_bits, priors = ((2,), (0.0, DEFAULT)) if fast else (BITS, PRIORS)
    texts = {n: calibration_windows(setup.model, files, options.seq, options.tokens, n) for n in SIZES}
    digital = score(setup.model.params, setup.text.batches, setup.model)
    simple: tuple[Method, ...] = ("rtn", "hqq")
    others: dict[tuple[int, str], Score] = {}
    found: dict[tuple[int, int, float], Score] = {}
    rows: list[dict[str, Any]] = []
    total = len(every_bits) * (len(simple) + len(SIZES) * len(priors))
    with show_progress(setup.console, "gptq_prior", "models", total) as advance:
        for bits in every_bits:
            for method in simple:
                others[bits, method], _ = evaluate(setup, bits, Recipe(method=method), None)
                rows.append({"bits": bits, "quantiser": method, **others[bits, method].record()})
                advance(1)
            for size in SIZES:
                for prior in (DEFAULT, *(p for p in priors if p != DEFAULT)):
                    recipe = Recipe(method="gptq", gptq=GptqOptions(prior=prior))
                    of, fell_back = evaluate(setup, bits, recipe, texts[size][:, :-1])
                    found[bits, size, prior] = of
                    rows.append({
                        "bits": bits, "quantiser": "gptq", "calibration_tokens": size, "prior": prior, **of.record(),
                        "loss_increase": as_record(of.more_loss(digital)), "columns_fell_back": fell_back,
                        "loss_minus_default": as_record(of.more_loss(found[bits, size, DEFAULT])),
                    })  # fmt: skip
                    advance(1)
    found = {(b, n, p): found[b, n, p] for b in every_bits for n in SIZES for p in priors}
    for bits in every_bits:
        rest = ", ".join(f"{method} {others[bits, method].perplexity:.2f}" for method in simple)
        for title, text in (
            (f"{bits} bits: perplexity ({rest}; not quantized {digital.perplexity:.2f})", _perplexity),
            (f"{bits} bits: loss minus that at prior {DEFAULT:g}, 0.001 nats", _difference),
        ):
            table = make_table(title, "calibration tokens", [f"prior {prior:g}" for prior in priors])
            for size in SIZES:
                table.add_row(f"{size:,}", *(text(found[bits, size, p], found[bits, size, DEFAULT]) for p in priors))
            setup.console.print(table)
    results = {"default": DEFAULT, "not_quantized": digital.record(), "rows": rows}
    setup.save(results, draw(setup, found, others, digital), None)


def _perplexity(of: Score, _: Score) -> str:
    return f"{of.perplexity:.2f}"


def _difference(of: Score, default: Score) -> str:
    return "" if of is default else plus_minus(of.more_loss(default), 1e3, 1)


if __name__ == "__main__":
    run(main)
