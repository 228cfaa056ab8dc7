"""Extra energy of keeping a module digital: a first model, from two published numbers."""

import dataclasses
from typing import Any

import numpy as np

from hetmoe.errors import InputError
from hetmoe.models.abstract import abstract_params
from hetmoe.models.config import ModelConfig
from hetmoe.models.matrices import MATRICES, crossbar_matrices
from hetmoe.placement.module_scores import ModuleScores, module_parameters

JOULE_PER_BYTE = 400.0 / 2.039e12  # board power over memory bandwidth of an A100-80GB (NVIDIA data sheet)
JOULE_PER_TILE = 10e-9  # one operation of a 512 x 512 tile (IBM's 3D-CiM simulator)
TILE = 512


def energy_costs(
    config: ModelConfig, frequency: np.ndarray, *, batch: int = 32, bytes_per_weight: float = 2.0
) -> ModuleScores:
    """Joules per token that each module costs more when digital than when analog, at least 0.

    Digital: the weights are read once per step of `batch` tokens, those of an expert only if a token of the step goes
    there (tokens choose independently with probability `frequency`). Analog: every 512 x 512 tile that a token passes
    is operated once.

    Args:
        config: the model's.
        frequency: share of tokens that choose each expert, `[moe_layers, experts]` (`activation_frequency`).
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
    parameters, tiles = module_parameters(config), _tiles(config)
    values: dict[str, Any] = {}
    for field in dataclasses.fields(parameters):
        count, operations = getattr(parameters, field.name), getattr(tiles, field.name)
        if count is None:
            continue
        used = share if field.name == "experts" else 1.0
        read = 1 - (1 - used) ** batch  # probability that a step needs the weights
        digital = count * bytes_per_weight * JOULE_PER_BYTE * read / batch
        values[field.name] = np.maximum(digital - operations * JOULE_PER_TILE * used, 0.0)
    return ModuleScores(**values)


def _tiles(config: ModelConfig) -> ModuleScores:
    """512 x 512 tiles that a token passes in each module."""
    leaves = abstract_params(config)
    counts: dict[str, float] = {}
    for layer in (leaves.layers, leaves.dense_layers):
        for name, leaf in ({} if layer is None else crossbar_matrices(layer)).items():
            rows, columns = leaf.shape[-2:]
            module = MATRICES[name].module
            if layer is leaves.layers or module != "attention":  # attention is alike in both kinds of layers
                counts[module] = counts.get(module, 0) + -(-rows // TILE) * -(-columns // TILE)
    counts["lm_head"] = -(-config.hidden_size // TILE) * -(-config.vocab_size // TILE)
    return ModuleScores(**{"experts": 0, **counts})  # pyright: ignore[reportArgumentType]
