"""Whether a model fits the hardware: an error names what is too small, in its description's own line."""

import jax.numpy as jnp

from hetmoe.hardware.description import Description
from hetmoe.hardware.estimate import Estimate
from hetmoe.hardware.machine import analog_chips
from hetmoe.hardware.parts import module_tiles
from hetmoe.hardware.shapes import module_shapes
from hetmoe.models.config import ModelConfig


def check_fit(config: ModelConfig, found: Estimate, digital: Description, analog: Description) -> None:
    """Raises InputError if an estimate (a single one) is of a model that does not fit.

    Args:
        config: the model's.
        found: its estimate.
        digital: the digital unit.
        analog: the chips.
    """
    if not bool(found.fits_memory):
        capacity = digital.entries["memory.capacity"].stated
        raise digital.error(
            "memory.capacity",
            f"capacity = {capacity} does not hold the {float(found.memory_used) / 1e9:,.2f} GB of digital weights and "
            "key-value cache: put more on chips, quantize experts, or lower batch and context",
        )
    if bool(found.fits_chips):
        return
    chips, machine = analog.entries["chip.chips"].stated, analog_chips(analog)
    held = machine.tiles * machine.planes * machine.chips
    largest = max(module_tiles(shape, machine) for shape in module_shapes(config).values())
    needed = f"the weights on chips need {float(found.tiles):,.0f} tiles"
    if bool(jnp.any(largest > held)):
        needed = f"a single module needs up to {float(largest):,.0f} tiles, and {needed}"
    raise analog.error(
        "chip.chips",
        f"chips = {chips} of {analog.entries['chip.tiles'].stated} tiles are too few: {needed}; state more chips, "
        "leave 'chips' out for as many as are needed, or allow time_multiplexing",
    )
