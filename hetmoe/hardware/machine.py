"""Hardware as numbers in SI units, which may be traced, stacked and mapped over."""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from hetmoe.hardware.description import Description

Number = Float[Array, "*points"]


@struct.dataclass
class DigitalUnit:
    """A digital processor with its memory (`FIELDS["digital"]`)."""

    capacity: Number  # B
    bandwidth: Number  # B/s, reached: peak times utilisation
    rate: Number  # FLOP/s, likewise
    busy_power: Number  # W
    idle_power: Number  # W
    area: Number  # m^2; NaN = not stated


@struct.dataclass
class AnalogChips:
    """Chips of crossbar tiles (`FIELDS["analog"]`)."""

    rows: Number  # of a tile
    columns: Number
    operation_time: Number  # s: array time + conversion time times columns per ADC
    operation_energy: Number  # J
    planes: Number
    tiles: Number  # of a chip
    chips: Number  # 0 = as many as the weights need
    static_power: Number  # W, of a chip
    tile_area: Number  # m^2; NaN = not stated
    programming_time: Number  # s, of a plane of a tile; infinite = it cannot be done while the chip works
    programming_energy: Number  # J


@struct.dataclass
class Link:
    """What digital unit and chips exchange vectors over (`FIELDS["link"]`)."""

    bandwidth: Number  # B/s, in each direction
    latency: Number  # s, of a transfer
    energy: Number  # J/B


@struct.dataclass
class System:
    """Everything that a model runs on."""

    digital: DigitalUnit
    analog: AnalogChips
    link: Link


def _number(value: float) -> Array:
    return jnp.asarray(value, jnp.float32)


def digital_unit(description: Description) -> DigitalUnit:
    """From a description of kind "digital"."""
    stated = {field: entry.value for field, entry in description.entries.items()}
    return DigitalUnit(
        capacity=_number(stated["memory.capacity"]),
        bandwidth=_number(stated["memory.bandwidth"] * stated["memory.utilisation"]),
        rate=_number(stated["compute.rate"] * stated["compute.utilisation"]),
        busy_power=_number(stated["power.busy"]),
        idle_power=_number(stated["power.idle"]),
        area=_number(stated.get("die.area", math.nan)),
    )


def analog_chips(description: Description) -> AnalogChips:
    """From a description of kind "analog"."""
    stated = {field: entry.value for field, entry in description.entries.items()}
    conversion = stated["tile.conversion_time"] * stated["tile.columns_per_adc"]
    again = description.multiplexing  # the time and energy of programming are stated then
    return AnalogChips(
        rows=_number(stated["tile.rows"]),
        columns=_number(stated["tile.columns"]),
        operation_time=_number(stated["tile.array_time"] + conversion),
        operation_energy=_number(stated["tile.operation_energy"]),
        planes=_number(stated["tile.planes"]),
        tiles=_number(stated["chip.tiles"]),
        chips=_number(stated.get("chip.chips", 0.0)),
        static_power=_number(stated["chip.static_power"]),
        tile_area=_number(stated.get("tile.area", math.nan)),
        programming_time=_number(stated["tile.programming_time"] if again else math.inf),
        programming_energy=_number(stated["tile.programming_energy"] if again else 0.0),
    )


def link_of(description: Description) -> Link:
    """From a description of kind "link"."""
    stated = {field: entry.value for field, entry in description.entries.items()}
    return Link(
        bandwidth=_number(stated["link.bandwidth"]),
        latency=_number(stated["link.latency"]),
        energy=_number(stated["link.energy"]),
    )


def system_of(digital: Description, analog: Description, link: Description) -> System:
    """From three descriptions."""
    return System(digital=digital_unit(digital), analog=analog_chips(analog), link=link_of(link))


def stack_systems(systems: list[System]) -> System:
    """Systems along a new leading axis, to map over."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *systems)
