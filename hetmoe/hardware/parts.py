"""What one kind of module takes in one layer, by what the time is spent on.

Digital work is a roofline: the larger of its bytes over the reached bandwidth and its FLOP over the reached rate.
Analog work is counted in operations: one vector times one tile, of fixed time and energy. Tiles work side by side;
vectors queue at a tile, and where more tiles hold a module's weights than can work at once (planes that share
converters, fewer chips than the weights need) operations share what there is. A stage therefore takes at least
`max(longest queue, operations / tiles that can work at once)` operation times, and is taken to reach that.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array

from hetmoe.hardware.demand import Demand, ModelDemand
from hetmoe.hardware.machine import AnalogChips, System
from hetmoe.hardware.shapes import ModuleShape

Schedule = Literal["serial", "overlap"]
SCHEDULES: tuple[Schedule, ...] = ("serial", "overlap")


class Parts(NamedTuple):
    """Parts of a time, s."""

    weights: Array
    kv_cache: Array
    activations: Array
    compute: Array
    queue: Array
    shared_tiles: Array
    programming: Array
    link_bandwidth: Array
    link_latency: Array

    @property
    def digital(self) -> Array:
        """Of the digital unit."""
        return self.weights + self.kv_cache + self.activations + self.compute

    @property
    def away(self) -> Array:
        """Of chips and link."""
        return self.queue + self.shared_tiles + self.programming + self.link_bandwidth + self.link_latency

    def plus(self, other: "Parts") -> "Parts":
        """Part by part."""
        return Parts(*(a + b for a, b in zip(self, other, strict=True)))

    def longer_branch(self) -> "Parts":
        """Only the parts of the digital unit, or only those of chips and link, whichever take longer."""
        longer = self.digital >= self.away
        kept = {name: longer if name in DIGITAL_PARTS else ~longer for name in self._fields}
        return Parts(**{name: jnp.where(kept[name], value, 0.0) for name, value in self._asdict().items()})


DIGITAL_PARTS = ("weights", "kv_cache", "activations", "compute")
PART_NAMES = {
    "weights": "reading digital weights",
    "kv_cache": "reading and writing the key-value cache",
    "activations": "reading and writing activations",
    "compute": "digital arithmetic",
    "queue": "vectors waiting for each other at the busiest tile",
    "shared_tiles": "tiles that take turns",
    "programming": "programming tiles anew in every step",
    "link_bandwidth": "bandwidth of the link",
    "link_latency": "latency of the link",
}


@struct.dataclass
class PlacedChips:
    """What the analog weights of a model make of the chips."""

    count: Array
    at_once: Array  # tiles that can work at the same time, at least 1
    away: Array  # share of the weights that is not on them
    tiles: Array  # planes of tiles that hold the weights


def module_tiles(shape: ModuleShape, chips: AnalogChips) -> Array:
    """Tiles that hold all matrices of a module."""
    return sum((_stage_tiles(stage, chips) for stage in shape.stages), start=jnp.float32(0))


def _stage_tiles(stage: tuple[tuple[int, int], ...], chips: AnalogChips) -> Array:
    tiles = (jnp.ceil(rows / chips.rows) * jnp.ceil(columns / chips.columns) for rows, columns in stage)
    return sum(tiles, start=jnp.float32(0))


def place_on_chips(shapes: dict[str, ModuleShape], demand: ModelDemand, chips: AnalogChips) -> PlacedChips:
    """As many chips as are stated, or as many as the weights need."""
    of_kinds = (of.analog.sum() * module_tiles(shapes[name], chips) for name, of in demand.kinds.items())
    tiles = sum(of_kinds, start=jnp.float32(0))
    as_needed = jnp.ceil(tiles / (chips.tiles * chips.planes))
    count = jnp.where(chips.chips > 0, jnp.where(tiles > 0, chips.chips, 0.0), as_needed)
    held = count * chips.tiles * chips.planes
    away = jnp.where(tiles > 0, jnp.maximum(1 - held / jnp.maximum(tiles, 1.0), 0.0), 0.0)
    return PlacedChips(count=count, at_once=jnp.maximum(count * chips.tiles, 1.0), away=away, tiles=tiles)


def pipelines(schedule: Schedule, kind: str) -> bool:
    """Whether vectors pass the matrices of a kind of module without waiting for the whole batch."""
    return schedule == "overlap" and kind != "attention"  # between its projections attention needs all of them


def layer_parts(shape: ModuleShape, of: Demand, system: System, chips: PlacedChips, *, pipelined: bool) -> Parts:
    """Of a kind of module in one layer, or in all layers at once.

    Args:
        shape: of one module.
        of: what it is asked for.
        system: the hardware.
        chips: of the whole model.
        pipelined: vectors pass the matrices of a module one behind the other; else all of them pass one stage, then
            the next.
    """
    digital, analog, link = system.digital, system.analog, system.link
    memory = [moved / digital.bandwidth for moved in (of.weight_bytes, of.cache_bytes, of.activation_bytes)]
    compute = of.flops / digital.rate
    from_memory = memory[0] + memory[1] + memory[2] >= compute
    queue, shared = _rounds(shape, of, analog, chips, pipelined=pipelined)
    programmed = chips.away * of.analog_used * module_tiles(shape, analog)
    return Parts(
        *(jnp.where(from_memory, part, 0.0) for part in memory),
        compute=jnp.where(from_memory, 0.0, compute),
        queue=queue * analog.operation_time,
        shared_tiles=shared * analog.operation_time,
        # The tiles of a chip are programmed one after the other.
        programming=jnp.where(
            programmed > 0, programmed * analog.programming_time / jnp.maximum(chips.count, 1.0), 0.0
        ),
        link_bandwidth=of.exchanged_bytes / link.bandwidth,
        link_latency=of.transfers * link.latency,
    )


def _rounds(
    shape: ModuleShape, of: Demand, analog: AnalogChips, chips: PlacedChips, *, pipelined: bool
) -> tuple[Array, Array]:
    """Operation times in a row, by what decides them: the busiest tile's queue, or tiles that take turns."""
    nothing = jnp.zeros_like(of.queue)
    turns = [of.vectors * _stage_tiles(stage, analog) / chips.at_once for stage in shape.stages]
    wait = of.queue
    if pipelined:  # the last vector leaves the first stage when the queue is through, and has the others before it
        wait = jnp.where(of.queue > 0, of.queue + len(turns) - 1, 0.0)
        turns = [sum(turns, start=nothing)]
    queue = sum((jnp.where(wait >= turn, wait, 0.0) for turn in turns), start=nothing)
    shared = sum((jnp.where(wait >= turn, 0.0, turn) for turn in turns), start=nothing)
    return queue, shared
