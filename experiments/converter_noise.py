"""Loss by converters alone, for experts, dense modules and both (the paper's table of DAC-ADC noise).

    python experiments/converter_noise.py                      # docs/experiments/converter_noise.json, .png
    python experiments/converter_noise.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16

No programming noise (c = 0): weights are exact and results do not depend on a seed. Compared are the digital model, all
experts analog, all dense modules analog (attention, LM head, shared experts, dense layers), and both, at 8, 7 and 6
bits of DAC and ADC with calibrated input ranges. Cost: one to two minutes on two CPU cores, most of it compilation.

Paper (reported): at 8 bits analog experts cost OLMoE 0.7 and DeepSeekMoE 0.3 points of accuracy, dense modules on top
of them another 0.9 and 6.0 points.
The reference model agrees: at 8 bits analog experts (89 % of the crossbar parameters) cost 0.004 nats and no accuracy,
dense modules 0.012 nats and 0.2 points, both 0.019 nats and 0.4 points; at 6 bits 0.023, 0.26 and 0.29 nats.
"""

from typing import Annotated, Any

import typer

from common import Options, Setup, add_legend, analog_only, looks, make_table, panels, prepare, run
from hetmoe.evaluate.noise_sweep import Placement, Point
from hetmoe.placement.plan import experts_analog, plan_shapes

BITS = (8, 7, 6)


def placements(setup: Setup) -> list[Placement]:
    """What is analog."""
    dense = [name for name in plan_shapes(setup.config) if name != "experts"]
    return [
        Placement(name="experts_analog", plans=[experts_analog(setup.config)]),
        Placement(name="dense_analog", plans=[analog_only(setup.config, dense)]),
        Placement(name="all_analog", plans=[analog_only(setup.config, ["experts", *dense])]),
    ]


def draw(setup: Setup, points: dict[tuple[str, int], Point], bits: list[int]) -> Any:
    """Loss increase and accuracy against bits."""
    figure, (left, right) = panels(2, f"{setup.model.name}: converters alone, no programming noise")
    styles = looks(["experts_analog", "dense_analog", "all_analog"])
    for name, look in styles.items():
        left.plot(bits, [setup.increase(points[name, b]).mean for b in bits], label=name, **look)
        if setup.digital.accuracy is not None:
            right.plot(bits, [100 * points[name, b].mean("accuracy") for b in bits], label=name, **look)
    if setup.digital.accuracy is not None:
        right.axhline(100 * setup.digital.accuracy[0], color="#595959", lw=1.2, label="all_digital")
    left.set(ylabel="loss increase (nats per token)")
    left.set_yscale("log")
    right.set_ylabel("next-word accuracy, 1 of 4 (%)")
    for axes in (left, right):
        axes.set_xlabel("DAC and ADC bits")
        axes.set_xticks(bits)
        axes.invert_xaxis()
    add_legend(figure, right if setup.digital.accuracy is not None else left)
    return figure


def main(
    options: Options,
    bits: Annotated[list[int] | None, typer.Option(help="DAC and ADC bits; repeatable; default 8, 7, 6.")] = None,
) -> None:
    """Evaluate and print."""
    setup = prepare("converter_noise", options)
    chosen = bits or list(BITS)
    points: dict[tuple[str, int], Point] = {}
    lines = placements(setup)
    for count in chosen:
        spec = setup.spec(0.0, dac_bits=count, adc_bits=count)
        found = setup.sweep(spec, lines, [0.0], f"{count} bits")
        points |= {(name, count): point for (name, _), point in found.items()}
    columns = ["bits", "perplexity", "loss increase (nats)", "bits per byte", "next-word accuracy (%)"]
    table = make_table("Converters alone (c = 0)", "placement", columns)
    rows: list[dict[str, Any]] = []
    for name, count, point in [("all_digital", None, setup.digital), *((n, b, p) for (n, b), p in points.items())]:
        accuracy = None if point.accuracy is None else point.accuracy[0]
        row = {
            "placement": name, "bits": count, "perplexity": point.perplexity[0],
            "loss_increase": setup.increase(point).mean, "bits_per_byte": point.bits_per_byte[0], "accuracy": accuracy,
        }  # fmt: skip
        rows.append(row)
        table.add_row(
            name, "-" if count is None else str(count), f"{row['perplexity']:.3f}", f"{row['loss_increase']:.4f}",
            f"{row['bits_per_byte']:.4f}", "-" if accuracy is None else f"{100 * accuracy:.2f}",
        )  # fmt: skip
    setup.console.print(table)
    setup.save({"rows": rows}, draw(setup, points, chosen), setup.spec(0.0))


if __name__ == "__main__":
    run(main)
