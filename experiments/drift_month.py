"""Perplexity over a month of drift, with and without drift compensation.

    python experiments/drift_month.py                          # docs/experiments/drift_month.json, .png
    python experiments/drift_month.py --model allenai/OLMoE-1B-7B-0924 --dtype bfloat16

Chips are programmed once per seed and read after 25 s, 1 hour, 1 day, 1 week and 30 days, on devices whose conductances
drift (`--devices`; `--device` is not used). Compared are all experts analog and 25 % of each layer's experts digital by
max_neuron_norm; compensation scales every tile so that its mean |weight| is that at programming. Intervals are 95 %
over seeds; the share of the loss increase that the placement takes back is paired by seed. Cost: about six minutes on
two CPU cores, most of it compilation (once per device, time and compensation).

The paper does not model drift.
In the reference model uncompensated drift is far worse than programming noise: with analog experts perplexity (digital
31.4) goes from 31.8 to 68.7 in 30 days on pcm and from 32.0 to 65.9 on hermes. Compensation leaves 32.2 and 32.5, and
25 % digital takes back 43 to 48 % of what remains, at any time.
"""

from typing import Annotated, Any

import numpy as np
import typer

from common import (
    Options,
    Setup,
    add_legend,
    as_record,
    digits,
    draw_line,
    looks,
    make_table,
    panels,
    plus_minus,
    prepare,
    recovered_share,
    run,
)
from hetmoe.evaluate.noise_sweep import Placement
from hetmoe.evaluate.statistics import Interval, mean_interval
from hetmoe.placement.plan import experts_analog, place

TIMES = {"25 s": 25.0, "1 hour": 3600.0, "1 day": 86400.0, "1 week": 604800.0, "30 days": 2592000.0}
DEVICES = ("pcm", "hermes")
EXPERTS, PLACED = "experts_analog", "max_neuron_norm"
FRACTION = 0.25
Losses = dict[tuple[str, bool, str], dict[str, np.ndarray]]  # (device, compensated, time) -> placement -> per seed


def draw(setup: Setup, losses: Losses, devices: list[str]) -> Any:
    """Perplexity against time, one panel per device."""
    figure, row = panels(len(devices), f"{setup.model.name}: drift, {setup.options.seeds} seeds")
    styles = looks([EXPERTS, PLACED])
    labels = {EXPERTS: "experts analog", PLACED: f"{FRACTION:.0%} digital by {PLACED}"}
    for axes, device in zip(row, devices, strict=True):
        axes.axhline(setup.digital.perplexity[0], color="#595959", lw=1.2, label="all digital")
        for name, look in styles.items():
            for compensated in (False, True):
                intervals: list[Interval] = [mean_interval(np.exp(losses[device, compensated, t][name])) for t in TIMES]
                dashed = look if compensated else look | {"ls": "--", "mfc": "white"}
                label = labels[name] + (", compensated" if compensated else "")
                draw_line(axes, list(TIMES.values()), intervals, label, dashed)
        axes.set(
            xscale="log", yscale="log", title=device, xlabel="time since programming", ylabel="perplexity per token"
        )
        axes.set_xticks(list(TIMES.values()), list(TIMES), rotation=20)
        axes.set_xticks([], minor=True)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    add_legend(figure, row[0], 3)
    return figure


def main(
    options: Options,
    noise_scale: Annotated[float, typer.Option(help="Noise scale c of the programming noise.")] = 1.0,
    devices: Annotated[list[str] | None, typer.Option(help="Devices that drift; repeatable.")] = None,
) -> None:
    """Evaluate and print."""
    setup = prepare("drift_month", options)
    chosen = devices or list(DEVICES)
    scores = setup.scorer().scores("max_neuron_norm", setup.spec(noise_scale))
    lines = [
        Placement(name=EXPERTS, plans=[experts_analog(setup.config)]),
        Placement(name=PLACED, plans=[place(scores, FRACTION)]),
    ]
    losses: Losses = {}
    for device in chosen:
        for compensated in (False, True):
            for time, seconds in TIMES.items():
                spec = setup.spec(noise_scale, device, time_s=seconds, drift_compensation=compensated)
                found = setup.sweep(spec, lines, [noise_scale], f"{device}, {time}")
                losses[device, compensated, time] = {p.name: setup.losses(found[p.name, noise_scale]) for p in lines}

    rows: list[dict[str, Any]] = []
    for device in chosen:
        table = make_table(f"{device}, c = {noise_scale:g}: perplexity (digital {setup.digital.perplexity[0]:.2f})",
                           "placement", list(TIMES))  # fmt: skip
        for compensated in (False, True):
            suffix = ", compensated" if compensated else ""
            shares: list[str] = []
            cells: dict[str, list[str]] = {EXPERTS: [], PLACED: []}
            for time, seconds in TIMES.items():
                at = losses[device, compensated, time]
                share = recovered_share(at[EXPERTS], at[PLACED], setup.digital_loss)
                shares.append(plus_minus(share, 100, 0))
                for name, values in at.items():
                    perplexity = mean_interval(np.exp(values))
                    cells[name].append(plus_minus(perplexity, places=2))
                    rows.append({
                        "device": device, "time_s": seconds, "compensated": compensated, "placement": name,
                        "perplexity": as_record(perplexity), "loss_per_seed": digits(values, 8),
                        "recovered_share": as_record(share) if name == PLACED else None,
                    })  # fmt: skip
            table.add_row(f"experts analog{suffix}", *cells[EXPERTS])
            table.add_row(f"{FRACTION:.0%} {PLACED}{suffix}", *cells[PLACED])
            table.add_row(f"  share of the increase recovered{suffix}, %", *shares)
        setup.console.print(table)
    results = {"noise_scale": noise_scale, "digital_fraction": FRACTION, "rows": rows}
    setup.save(results, draw(setup, losses, chosen), setup.spec(noise_scale, chosen[0], time_s=25.0))


if __name__ == "__main__":
    run(main)
