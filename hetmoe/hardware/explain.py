"""Every term between a step and its estimate."""

import dataclasses

import jax
import numpy as np

from hetmoe.hardware.demand import Demand, ModelDemand
from hetmoe.hardware.machine import System
from hetmoe.hardware.parts import Parts, Schedule, layer_parts, module_tiles, pipelines, place_on_chips
from hetmoe.hardware.shapes import module_shapes
from hetmoe.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class KindTerms:
    """Of one kind of module; arrays have an entry for each layer that has it.

    Attributes:
        demand: bytes, FLOP, vectors.
        tiles: of one module.
        parts: times of this kind alone, s: branches of the schedule "overlap" that run side by side both have theirs.
    """

    demand: Demand
    tiles: float
    parts: Parts

    def demanded(self, field: str) -> float:
        """A field of the demand, over all layers."""
        return float(np.sum(getattr(self.demand, field), dtype=np.float64))

    def time(self, part: str) -> float:
        """A part of the time, s, over all layers."""
        return float(np.sum(getattr(self.parts, part), dtype=np.float64))

    @property
    def operations(self) -> float:
        """Of tiles, over all layers."""
        return self.demanded("vectors") * self.tiles


def explain(config: ModelConfig, demand: ModelDemand, system: System, schedule: Schedule) -> dict[str, KindTerms]:
    """Terms by kind of module, of one step on one system."""
    shapes = module_shapes(config)
    chips = place_on_chips(shapes, demand, system.analog)
    found: dict[str, KindTerms] = {}
    for name, of in demand.kinds.items():
        parts = layer_parts(shapes[name], of, system, chips, pipelined=pipelines(schedule, name))
        found[name] = KindTerms(
            demand=jax.tree.map(np.asarray, of),
            tiles=float(module_tiles(shapes[name], system.analog)),
            parts=jax.tree.map(np.asarray, parts),
        )
    return found
