"""Time, energy, memory, tiles and area of a step, and what bounds it.

Times of each kind of module in each layer are those of `hetmoe.hardware.parts`. Two schedules put them together:

- "serial": every stage waits for the one before: digital work, transfers and analog work add up.
- "overlap": in a layer with experts, digital experts (routed and shared) work beside the analog ones with their
  transfers, and the longer branch counts; on chips, vectors follow each other through the matrices of a network without
  waiting for the whole batch. Attention comes before both, and layers after one another.

Energy: the digital unit's power while it works and while it waits, the energy of every tile operation (and of tiles
that are programmed), chips' static power all the time, and the link's energy per byte.

Expected values are put into maxima (the queue is the expected longest one), which is exact only where one side of the
maximum is always the larger.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from hetmoe.hardware.demand import Demand, ModelDemand, demand_grid
from hetmoe.hardware.deployment import Deployment
from hetmoe.hardware.machine import System
from hetmoe.hardware.parts import Parts, PlacedChips, Schedule, layer_parts, module_tiles, pipelines, place_on_chips
from hetmoe.hardware.shapes import ModuleShape, module_shapes
from hetmoe.hardware.step import Step
from hetmoe.models.config import ModelConfig


@struct.dataclass
class Estimate:
    """Of one step; float32. Leading axes are other points."""

    step_time: Float[Array, "*points"]  # s
    tokens_per_s: Float[Array, "*points"]  # new tokens; in a prefill those of the prompts
    joules_per_token: Float[Array, "*points"]
    parts: Parts  # of the step's time; they add up to it
    digital_time: Float[Array, "*points"]  # s that the digital unit works: beyond its parts where branches overlap
    digital_energy: Float[Array, "*points"]  # J of a step
    analog_energy: Float[Array, "*points"]  # J: operations and programming
    static_energy: Float[Array, "*points"]  # J of chips beside their operations
    link_energy: Float[Array, "*points"]  # J
    memory_traffic: Float[Array, "*points"]  # B that the digital memory moves
    memory_used: Float[Array, "*points"]  # B: digital weights and key-value cache
    exchanged_bytes: Float[Array, "*points"]  # over the link, both directions together
    operations: Float[Array, "*points"]  # of tiles
    tiles: Float[Array, "*points"]  # planes of tiles that hold weights
    chips: Float[Array, "*points"]
    area: Float[Array, "*points"]  # m^2 of all tiles of these chips; NaN = not stated
    fits_memory: Bool[Array, "*points"]  # weights and cache fit the digital memory
    fits_chips: Bool[Array, "*points"]  # analog weights fit the chips, or may take turns on them

    @property
    def step_energy(self) -> Float[Array, "*points"]:
        """J of a step."""
        return self.digital_energy + self.analog_energy + self.static_energy + self.link_energy

    @property
    def bound(self) -> jax.Array:
        """Number in `Parts` of what takes most of the time."""
        return jnp.argmax(jnp.stack(self.parts), axis=0)


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def estimate(config: ModelConfig, demand: ModelDemand, system: System, schedule: Schedule = "serial") -> Estimate:
    """One step on one system. Map over both with `jax.vmap`; `estimate_grid` is for products.

    Args:
        config: the model's; static.
        demand: of the step (`model_demand`).
        system: the hardware.
        schedule: static.
    """
    shapes, digital, analog = module_shapes(config), system.digital, system.analog
    chips = place_on_chips(shapes, demand, analog)
    parts, digital_time = _step_parts(shapes, demand, system, chips, schedule)
    step_time = parts.digital + parts.away
    tiles = {name: module_tiles(shapes[name], analog) for name in demand.kinds}

    def total(field: str, weights: dict[str, Array] | None = None) -> Array:
        sums = {name: getattr(of, field).sum() for name, of in demand.kinds.items()}
        terms = (s * (1.0 if weights is None else weights[n]) for n, s in sums.items())
        return sum(terms, start=jnp.zeros(()))

    operations, exchanged = total("vectors", tiles), total("exchanged_bytes")
    programmed = chips.away * total("analog_used", tiles)
    waiting = jnp.maximum(step_time - digital_time, 0.0)
    energy = {
        "digital_energy": digital.busy_power * digital_time + digital.idle_power * waiting,
        "analog_energy": operations * analog.operation_energy + programmed * analog.programming_energy,
        "static_energy": chips.count * analog.static_power * step_time,
        "link_energy": exchanged * system.link.energy,
    }
    return Estimate(
        step_time=step_time,
        tokens_per_s=demand.tokens / step_time,
        joules_per_token=sum(energy.values(), start=jnp.float32(0)) / demand.tokens,
        parts=parts,
        digital_time=digital_time,
        **energy,
        memory_traffic=total("weight_bytes") + total("cache_bytes") + total("activation_bytes"),
        memory_used=demand.memory,
        exchanged_bytes=exchanged,
        operations=operations,
        tiles=chips.tiles,
        chips=chips.count,
        area=chips.count * analog.tiles * analog.tile_area,
        fits_memory=demand.memory <= digital.capacity,
        fits_chips=(chips.away == 0) | jnp.isfinite(analog.programming_time),
    )


@functools.partial(jax.jit, static_argnames=("config", "schedule"))
def estimate_grid(
    config: ModelConfig, where: Deployment, steps: Step, systems: System, schedule: Schedule = "serial"
) -> Estimate:
    """Every deployment with every step on every system: leaves `[deployments, steps, systems]`.

    All three have a leading axis (`stack_deployments`, `stack_steps`, `stack_systems`).
    """
    of_systems = jax.vmap(lambda demand, system: estimate(config, demand, system, schedule), (None, 0))
    return jax.vmap(jax.vmap(of_systems, (0, None)), (0, None))(demand_grid(config, where, steps), systems)


def _step_parts(
    shapes: dict[str, ModuleShape], demand: ModelDemand, system: System, chips: PlacedChips, schedule: Schedule
) -> tuple[Parts, Array]:
    """(parts of the step's time, time that the digital unit works).

    Layers are added up one by one: mapped over many points, every operation then runs over all points at once, which
    takes a fifth of the time of arrays with an axis of layers on CPU.
    """
    beside = [name for name in ("experts", "shared_experts") if name in demand.kinds]
    groups = [beside] if schedule == "overlap" else [[name] for name in beside]
    groups += [[name] for name in demand.kinds if name not in beside]
    zero = jnp.float32(0)
    total = (Parts(*(zero,) * len(Parts._fields)), zero)

    def add(total: tuple[Parts, Array], layer: dict[str, Demand]) -> tuple[tuple[Parts, Array], None]:
        of_kinds = [
            layer_parts(shapes[name], of, system, chips, pipelined=pipelines(schedule, name))
            for name, of in layer.items()
        ]
        parts = functools.reduce(Parts.plus, of_kinds)
        working = parts.digital
        if schedule == "overlap" and "experts" in layer:
            parts = parts.longer_branch()
        return (total[0].plus(parts), total[1] + working), None

    for group in groups:
        total, _ = jax.lax.scan(add, total, {name: demand.kinds[name] for name in group})
    return total
