"""Extra energy of keeping a module digital: what `hetmoe place --budget energy` spends."""

from typing import Any

import numpy as np

from hetmoe.errors import InputError
from hetmoe.hardware.description import Description
from hetmoe.hardware.module_energy import analog_energy, digital_energy
from hetmoe.hardware.shapes import module_shapes
from hetmoe.models.config import ModelConfig
from hetmoe.placement.module_scores import ModuleScores
from hetmoe.placement.plan import plan_shapes


def energy_costs(
    config: ModelConfig,
    frequency: np.ndarray,
    *,
    digital: Description,
    analog: Description,
    batch: int = 32,
    bytes_per_weight: float = 2.0,
) -> ModuleScores:
    """Joules per token that each module costs more when digital than when analog, at least 0.

    Args:
        config: the model's.
        frequency: share of tokens that choose each expert, `[moe_layers, experts]` (`activation_frequency`).
        digital: the digital unit.
        analog: the chips.
        batch: tokens decoded together.
        bytes_per_weight: of the digital weights.

    Raises:
        InputError: for shares outside [0, 1], a batch below 1, or weights without a size.
    """
    share = np.asarray(frequency, np.float64)
    if share.shape != (len(config.moe_layers), config.num_experts) or not ((share >= 0) & (share <= 1)).all():
        raise InputError(f"frequency {list(share.shape)} must be shares in [0, 1], [layers with experts, experts]")
    if batch < 1 or not 0 < bytes_per_weight < float("inf"):
        raise InputError(f"batch={batch} must be at least 1 and bytes_per_weight={bytes_per_weight!r} positive")
    values: dict[str, Any] = {}
    for name, shape in module_shapes(config).items():
        used = share if name == "experts" else np.ones(plan_shapes(config)[name])
        costs = digital_energy(shape.weights, shape.weights * bytes_per_weight, used, batch, digital)
        values[name] = np.maximum(costs - analog_energy(shape, used, analog), 0.0)
    return ModuleScores(**values)
