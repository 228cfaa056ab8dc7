"""One decoding step on hardware named or described in files: the short way to an estimate."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, Float64

from hetmoe.errors import InputError
from hetmoe.hardware.demand import model_demand
from hetmoe.hardware.deployment import deployment
from hetmoe.hardware.description import open_description
from hetmoe.hardware.estimate import Estimate, estimate
from hetmoe.hardware.fit import check_fit
from hetmoe.hardware.machine import system_of
from hetmoe.hardware.parts import SCHEDULES, Schedule
from hetmoe.hardware.routing import uniform_frequency
from hetmoe.hardware.step import decode_step
from hetmoe.models.config import ModelConfig
from hetmoe.placement.plan import Plan


def predict_decode(
    config: ModelConfig,
    plan: Plan,
    *,
    batch: int,
    context: int,
    processor: str | Path = "a100-80gb",
    chip: str | Path = "ibm-3d-cim",
    link: str | Path = "pcie4-x16",
    schedule: Schedule = "serial",
    frequency: Float64[np.ndarray, "layers experts"] | None = None,
    expert_bytes: Float[np.ndarray, "layers experts"] | None = None,
) -> Estimate:
    """Time, energy, traffic, tiles and area of a step that gives each of `batch` sequences one token.

    For many points at once, put together what this function does with `hetmoe.hardware.estimate.estimate_grid`.

    Args:
        config: the model's.
        plan: what is analog.
        batch: sequences that decode together.
        context: positions of each, the new one among them.
        processor: the digital unit: a name of `hetmoe hardware --list`, or a TOML file.
        chip: the analog chips, likewise.
        link: between both, likewise.
        schedule: "serial" or "overlap" (`hetmoe.hardware.estimate`).
        frequency: share of tokens that choose each expert (`hetmoe.hardware.routing_file.observe_routing`); None = all
            experts equally often.
        expert_bytes: as in `hetmoe.hardware.deployment.deployment`.

    Raises:
        InputError: for sizes out of range, a plan of another model, hardware that is unknown or described wrongly, or
            that does not hold the model.
    """
    if schedule not in SCHEDULES:
        raise InputError(f"schedule={schedule!r} must be one of {', '.join(SCHEDULES)}")
    digital, analog = open_description(str(processor), "digital"), open_description(str(chip), "analog")
    chosen = uniform_frequency(config) if frequency is None else frequency
    demand = model_demand(
        config, deployment(plan, config, expert_bytes=expert_bytes), decode_step(config, chosen, batch, context)
    )
    found = estimate(config, demand, system_of(digital, analog, open_description(str(link), "link")), schedule)
    check_fit(config, found, digital, analog)
    return found
