"""What the commands do: measure, print, and keep records and figures."""

import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hetmoe.analog.devices import DEVICES
from hetmoe.checkpoint.load import load_model
from hetmoe.commands.common import make_console, write_json
from hetmoe.evaluate.provenance import provenance
from hetmoe.files import check_new_directory, make_directory, write_bytes
from hetmoe.report.render import to_files, with_settings
from theory.bounds import search
from theory.claims import Claim
from theory.experiment import Hardware, Plan, measure
from theory.figures import (
    draw_bounds,
    draw_curves,
    draw_device_claims,
    draw_reference,
    draw_settings,
    draw_training_claims,
)  # fmt: skip
from theory.measurements import all_claims
from theory.reference import reference_layers, rows
from theory.report import (
    bound_rows,
    claim_record,
    print_bounds,
    print_claim,
    print_legend,
    print_reference,
    print_settings,
    print_tolerances,
    tolerance_record,
)
from theory.settings import BASE, SETTINGS
from theory.train import TrainSpec

QUICK_GAMMAS = (0.4, 0.2, 0.1)
QUICK_SETTINGS = ("token choice",)
GAMMAS = (0.4, 0.2, 0.1, 0.05, 0.025)
FEW_HARDWARE = Hardware("proportional", False), Hardware("pcm", True)

Result = tuple[dict[str, Any], dict[str, Callable[[], Any]]]
"""Record, and figures by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What a user chooses.

    Attributes:
        quick: few seeds, frequencies and devices.
        seeds: mixtures of each frequency; None = the part's default.
        seed: of everything that is drawn.
        digital: experts that are digital in the placements beside all analog; None = half of them.
    """

    quick: bool = False
    seeds: int | None = None
    seed: int = 0
    digital: int | None = None


Part = Callable[[Console, Options], Result]


def run(parts: Sequence[Part], options: Options, output: Path | None) -> None:
    """Runs parts in turn; writes results.json and figures behind each, if there is an output.

    Raises:
        InputError: for an output that exists, or values out of range.
    """
    if output is not None:
        check_new_directory(output)
        make_directory(output)
    made_by = provenance() | {"command": ["python", "-m", "theory", *sys.argv[1:]]}
    console = make_console()
    record = dict[str, Any](format="hetmoe-theory-2", provenance=made_by, options=dataclasses.asdict(options))
    for part in parts:
        started = time.perf_counter()
        found, figures = part(console, options)
        console.print(f"{time.perf_counter() - started:.0f} s\n", highlight=False)
        record |= found
        if output is not None:
            for name, draw in figures.items():
                png, _ = with_settings(lambda draw=draw: to_files(draw()))
                write_bytes(output / f"{name}.png", png)
            write_json(output / "results.json", record)
    if output is not None:
        console.print(f"figures and results: {output}")


def shortened(spec: TrainSpec) -> TrainSpec:
    """For a quick run: as many steps as frequencies down to 0.1 need."""
    return dataclasses.replace(spec, chunks=40)


def claims_part(console: Console, options: Options) -> Result:
    """The analysed setting on all devices."""
    devices = ("proportional", *(name for name in DEVICES if name != "proportional"))
    both = tuple(Hardware(device, converters) for device in devices for converters in (False, True))
    plan = Plan(
        train=shortened(BASE) if options.quick else BASE, seeds=options.seeds or (4 if options.quick else 16),
        seed=options.seed, chips=4 if options.quick else 16, gammas=QUICK_GAMMAS if options.quick else GAMMAS,
        hardware=FEW_HARDWARE if options.quick else both, digital=options.digital or BASE.model.experts // 2,
    )  # fmt: skip
    measured = measure(plan)
    found = all_claims(measured)
    for claim in found:
        print_claim(console, claim)
    print_legend(console)
    print_tolerances(console, measured)
    record = {
        "claims": [claim_record(claim) for claim in found], "tolerances": tolerance_record(measured),
        "plan": dataclasses.asdict(plan), "gammas": plan.gammas,
    }  # fmt: skip
    figures = {
        "curves": lambda: draw_curves(measured), "training": lambda: draw_training_claims(found),
        "devices": lambda: draw_device_claims(found),
    }  # fmt: skip
    return record, figures


def settings_part(console: Console, options: Options) -> Result:
    """Every claim where one thing is changed."""
    names = QUICK_SETTINGS if options.quick else tuple(SETTINGS)

    found = dict[str, list[Claim]]()
    for name in names:
        started = time.perf_counter()
        spec = shortened(SETTINGS[name]) if options.quick else SETTINGS[name]
        plan = Plan(
            train=spec, gammas=QUICK_GAMMAS if options.quick else (0.4, 0.1, 0.025),
            seeds=options.seeds or (4 if options.quick else 8), seed=options.seed, chips=4 if options.quick else 8,
            hardware=FEW_HARDWARE[:1] if options.quick else FEW_HARDWARE,
            digital=options.digital or spec.model.experts // 2,
        )  # fmt: skip
        found[name] = all_claims(measure(plan))
        console.print(f"{name}: {time.perf_counter() - started:.0f} s", highlight=False)
    print_settings(console, found)
    record = {name: [claim_record(claim) for claim in claims] for name, claims in found.items()}
    return {"settings": record}, {"settings": lambda: draw_settings(found)}


def bounds_part(console: Console, options: Options) -> Result:
    """Bounds on random experts."""
    devices = ("proportional", "pcm") if options.quick else tuple(DEVICES)
    cases = search(
        1 if options.quick else 2, 200 if options.quick else 2000, devices, digital=1 if options.quick else 10,
        seed=options.seed,
    )  # fmt: skip
    table = bound_rows(cases)
    print_bounds(console, table)
    return {"bounds": table}, {"bounds": lambda: draw_bounds(cases)}


def reference_part(console: Console, options: Options) -> Result:
    """Bounds on the embedded model."""
    model = load_model("reference", "float32")
    layers = reference_layers(
        model,
        device="pcm",
        noise_scale=2.0,
        tokens=16 if options.quick else 192,
        chips=4 if options.quick else 16,
        bits=4,
        seed=options.seed,
    )
    table = rows(layers)
    print_reference(console, table, [layer.rounded for layer in layers])
    routing = [{k: v for k, v in layer.rounded.items() if k.startswith("whole_model")} for layer in layers]
    record = {"reference": {"errors": table, "routing": routing}}
    return record, {
        "reference": lambda: draw_reference("reference model, pcm at c = 2, proportional at c = 0.1", layers)
    }


PARTS: dict[str, Part] = {
    "claims": claims_part, "settings": settings_part, "bounds": bounds_part, "reference": reference_part,
}  # fmt: skip
