"""The three published rows of OLMoE-1B-7B at batch 32, from constants that are stated elsewhere; nothing is fitted.

    python experiments/published_rows.py     # docs/experiments/published_rows.json

The rows are those of the trade-off table of arXiv 2603.02633 (throughput, and tokens per joule). The digital unit is an
A100-80GB as its data sheet and BabelStream have it (utilisation 0.85), tiles are those of the 3D-CiM simulator (100 ns,
10 nJ), and the link is PCI Express 4.0: `hetmoe hardware --show NAME` prints each with its sources. The paper states
neither the context nor the link nor what surrounds the tiles, so the first is 1 (no cache counts), and contexts and
links beside it are printed too. Routing is uniform.

What comes out, and what stays unexplained, is in `docs/experiments/published_rows.json` and BUILD_NOTES. Cost: seconds.
"""

import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from common import RESULTS, make_table
from hetmoe.commands.common import make_console, write_json
from hetmoe.commands.hardware_tables import Case, amount, print_explanation
from hetmoe.evaluate.provenance import provenance
from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.deployment import deployment
from hetmoe.hardware.description import open_description
from hetmoe.hardware.estimate import estimate
from hetmoe.hardware.explain import explain
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.parts import PART_NAMES, SCHEDULES, Schedule
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.step import decode_step
from hetmoe.placement.plan import PLACEMENTS
from memory_olmoe import OLMOE_7B

BATCH, CONTEXT = 32, 1
CONTEXTS = (1, 512, 2048)
LINKS = ("pcie4-x16", "pcie5-x16", "ucie-advanced")
OPERATION_S = 100e-9


class Reported(NamedTuple):
    """A row of the paper's table."""

    placement: str
    tokens_per_s: float
    tokens_per_joule: float

    @property
    def step_s(self) -> float:
        """Of a batch."""
        return BATCH / self.tokens_per_s


ROWS = {
    "100 % digital": Reported("all_digital", 4220.0, 10.55),
    "5.37 % digital": Reported("experts_analog", 49781.0, 123.92),
    "all analog": Reported("all_analog", 768.0, 23949.0),
}


def predict(placement: str, *, context: int = CONTEXT, link: str = LINKS[0], schedule: Schedule = "serial") -> Case:
    """One row with its terms; weights and activations of 16 bits."""
    system = system_of(
        open_description("a100-80gb", "digital"), open_description("ibm-3d-cim", "analog"),
        open_description(link, "link"),
    )  # fmt: skip
    where = deployment(PLACEMENTS[placement](OLMOE_7B), OLMOE_7B)
    demand = model_demand(OLMOE_7B, where, decode_step(OLMOE_7B, uniform_frequency(OLMOE_7B), BATCH, context))
    return Case(
        title=f"{placement}, batch {BATCH}, context {context}, {link}", schedule=schedule,
        estimate=estimate(OLMOE_7B, demand, system, schedule), terms=explain(OLMOE_7B, demand, system, schedule),
    )  # fmt: skip


def tile_joules(case: Case, *, head: bool) -> float:
    """Energy of tile operations per token, with or without those of the head."""
    operations = sum(of.operations for name, of in case.terms.items() if head or name != "lm_head")
    return operations / BATCH * open_description("ibm-3d-cim", "analog").entries["tile.operation_energy"].value


def compared(name: str, case: Case) -> dict[str, Any]:
    """A row beside its estimate; `rest` is the reported step less the estimated one."""
    row, of = ROWS[name], case.estimate
    return {
        "row": name, "step": case.title, "schedule": case.schedule,
        "reported_tokens_per_s": row.tokens_per_s, "tokens_per_s": float(of.tokens_per_s),
        "throughput_ratio": float(of.tokens_per_s) / row.tokens_per_s,
        "reported_tokens_per_joule": row.tokens_per_joule, "tokens_per_joule": 1 / float(of.joules_per_token),
        "efficiency_ratio": 1 / float(of.joules_per_token) / row.tokens_per_joule,
        "reported_step_s": row.step_s, "step_s": float(of.step_time), "rest_s": row.step_s - float(of.step_time),
        "reported_power_w": row.tokens_per_s / row.tokens_per_joule,
        "power_w": float(of.step_energy / of.step_time),
        "parts_s": {part: float(value) for part, value in of.parts._asdict().items()},
    }  # fmt: skip


def all_analog(case: Case) -> dict[str, Any]:
    """What the last row's numbers say about themselves."""
    row = ROWS["all analog"]
    operations = sum(of.operations for of in case.terms.values())
    return {
        "reported_joules_per_token": 1 / row.tokens_per_joule,
        "tile_joules_per_token": tile_joules(case, head=False),
        "tile_joules_per_token_with_head": tile_joules(case, head=True),
        "reported_power_w": row.tokens_per_s / row.tokens_per_joule,
        "operations_per_token": operations / BATCH,
        # Every operation of every token after every other: no estimate, but the slowest that 100 ns allow.
        "one_after_another_tokens_per_s": 1 / (operations / BATCH * OPERATION_S),
        "reported_operation_times_per_token": 1 / row.tokens_per_s / OPERATION_S,
    }


def main(
    output: Annotated[Path, typer.Option("--json", help="Where results go.")] = RESULTS / "published_rows.json",
) -> None:
    """Estimate and print."""
    console = make_console()
    cases = {name: [predict(row.placement, schedule=way) for way in SCHEDULES] for name, row in ROWS.items()}
    columns = [
        "tokens/s", "reported", "ratio", "tokens/J", "reported", "ratio", "power W", "reported", "step us", "reported",
        "rest us",
    ]  # fmt: skip
    table = make_table("OLMoE-1B-7B, batch 32, 16 bits: estimated, and reported", "row, schedule", columns)
    rows = [compared(name, case) for name, both in cases.items() for case in both]
    for row in rows:
        table.add_row(
            f"{row['row']}, {row['schedule']}", f"{row['tokens_per_s']:,.0f}", f"{row['reported_tokens_per_s']:,.0f}",
            f"{row['throughput_ratio']:.3f}", f"{row['tokens_per_joule']:,.2f}",
            f"{row['reported_tokens_per_joule']:,.2f}", f"{row['efficiency_ratio']:.3f}", f"{row['power_w']:.3g}",
            f"{row['reported_power_w']:.3g}", f"{row['step_s'] * 1e6:,.0f}", f"{row['reported_step_s'] * 1e6:,.0f}",
            f"{row['rest_s'] * 1e6:+,.0f}",
        )  # fmt: skip
    console.print(table)

    other = make_table("what the paper does not state", "row, schedule", ["context", "link", "tokens/s", "tokens/J"])
    sensitivity: list[dict[str, Any]] = []
    for name in ("100 % digital", "5.37 % digital"):
        for context in CONTEXTS:
            for link in LINKS if name != "100 % digital" else LINKS[:1]:
                for way in SCHEDULES if name != "100 % digital" else SCHEDULES[:1]:
                    case = predict(ROWS[name].placement, context=context, link=link, schedule=way)
                    row = compared(name, case) | {"context": context, "link": link}
                    sensitivity.append(row)
                    cells = (f"{row['tokens_per_s']:,.0f}", f"{row['tokens_per_joule']:.2f}")
                    other.add_row(f"{name}, {way}", str(context), link, *cells)
    console.print(other)

    terms = make_table("5.37 % digital: where a step's time goes", "part", ["serial", "overlap"])
    both = cases["5.37 % digital"]
    for part, label in PART_NAMES.items():
        terms.add_row(label, *(amount(float(getattr(case.estimate.parts, part)), "s") for case in both))
    terms.add_row("estimated", *(amount(float(case.estimate.step_time), "s") for case in both))
    terms.add_row("reported", *[amount(ROWS["5.37 % digital"].step_s, "s")] * 2)
    rests = [ROWS["5.37 % digital"].step_s - float(case.estimate.step_time) for case in both]
    terms.add_row("unexplained", *(f"{rest * 1e6:+.0f} us" for rest in rests))
    console.print(terms)
    print_explanation(console, both)

    half = next(row for row in rows if row["row"] == "5.37 % digital")
    console.print(
        f"5.37 % digital, energy: reported are {half['reported_power_w']:.0f} W, the digital unit's full power all the "
        f"time; at that power this step gives {half['tokens_per_s'] / half['reported_power_w']:.1f} tokens per joule. "
        "Here the unit takes its idle power while it waits for chips and link.",
        highlight=False,
    )
    last = all_analog(cases["all analog"][0])
    console.print(
        f"all analog, energy: tile operations take {last['tile_joules_per_token'] * 1e6:.1f} uJ per token without the "
        f"head and {last['tile_joules_per_token_with_head'] * 1e6:.1f} uJ with it; reported are "
        f"{last['reported_joules_per_token'] * 1e6:.1f} uJ, at {last['reported_power_w'] * 1e3:.0f} mW: no digital "
        "unit is counted, though attention needs one.\n"
        "all analog, throughput: 768 tokens per second are not explained. They leave "
        f"{last['reported_operation_times_per_token']:,.0f} times 100 ns for a token, which takes "
        f"{last['operations_per_token']:,.0f} operations: tiles that never worked side by side would give "
        f"{last['one_after_another_tokens_per_s']:,.0f} tokens per second.",
        highlight=False,
    )
    record = {
        "format": "hetmoe-experiment-1", "experiment": "published_rows",
        "provenance": provenance() | {"command": ["python", "experiments/published_rows.py", *sys.argv[1:]]},
        "rows": rows, "not_stated": sensitivity, "all_analog": last,
        "terms": [case.record() for case in both],
    }  # fmt: skip
    write_json(output, record)
    console.print(f"{output}")


if __name__ == "__main__":
    typer.run(main)
