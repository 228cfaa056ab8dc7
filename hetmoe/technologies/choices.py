"""What every expert may run on, what each choice is expected to cost in loss, and what it takes of the hardware.

Losses of all choices are in one currency: with the Fisher matrix F of the model's own predictions, a change d of an
expert's weights is expected to raise the loss by `d' F d / 2`. For a quantized expert d is known; for an analog one it
is random, and the mean over the device's programming noise is `(b' F b + sum_i F_ii s_i^2) / 2` with its mean b and
variances s^2. The gradient of the text's own loss is left out for both (it may be negative, and made plans worse:
BUILD_NOTES.md), and so is what converters do.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float64, Int

from hetmoe.analog.spec import AnalogSpec
from hetmoe.errors import InputError
from hetmoe.hardware.description import Description
from hetmoe.hardware.module_energy import analog_energy, digital_energy, module_tile_count
from hetmoe.hardware.routing import check_frequency
from hetmoe.hardware.shapes import module_shapes
from hetmoe.models.config import ModelConfig
from hetmoe.models.model import Model
from hetmoe.placement.noise_sensitivity import noise_sensitivity
from hetmoe.quantize.budget import EXPERT_MATRICES, expert_bytes
from hetmoe.quantize.expected_loss import expected_increase
from hetmoe.quantize.grid import BITS
from hetmoe.quantize.hqq import half_quadratic
from hetmoe.quantize.mixed import refuse_quantized
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest

ANALOG, PLAIN = "analog", "not quantized"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choices:
    """Options of every expert; the first is analog, the last digital and not quantized, bits rise between.

    Attributes:
        levels: bits of the options between.
        losses: expected increase of the mean loss, nats per token.
        stored: bytes of the digital weights.
        energy: joules per token of its matmuls (`hetmoe.hardware.module_energy`).
        tiles: of crossbars.
    """

    levels: tuple[int, ...]
    losses: Float64[np.ndarray, "layers experts options"]
    stored: Float64[np.ndarray, "layers experts options"]
    energy: Float64[np.ndarray, "layers experts options"]
    tiles: Float64[np.ndarray, "layers experts options"]

    @property
    def names(self) -> list[str]:
        """Of the options."""
        return [ANALOG, *(f"{level} bit{'' if level == 1 else 's'}" for level in self.levels), PLAIN]


def expected_losses(
    model: Model, windows: Int[Any, "sequences context"], spec: AnalogSpec, recipe: Recipe, levels: Sequence[int],
    *, key: jax.Array,
) -> Float64[np.ndarray, "layers experts options"]:  # fmt: skip
    """Expected increase of the loss of every option of `Choices`, the same text and labels for all.

    Args:
        model: not quantized.
        windows: text; each row predicts its tokens from the second on.
        spec: the analog hardware, at its noise scale and time.
        recipe: grids and quantiser; for `gptq`, whose changes depend on other experts, those of `hqq` stand in.
        levels: bits, ascending.
        key: of sampled labels, and of chips where the noise at a time is estimated.

    Raises:
        InputError: for a quantized model, bits that do not exist, and what `noise_sensitivity` and `expected_increase`
            refuse.
    """
    refuse_quantized(model.params, "technologies are not chosen for")
    levels = check_levels(levels)
    tokens = jnp.asarray(windows)
    noise = noise_sensitivity(model, tokens, spec, key=key, dense=False)
    losses = [np.asarray(noise.variance.experts, np.float64) + np.asarray(noise.bias.experts, np.float64)]
    quantize = round_to_nearest if recipe.method == "rtn" else half_quadratic
    experts = model.params.layers.moe.experts
    quantized = {
        name: [quantize(getattr(experts, name), recipe.grid(level), name=f"experts' {name}") for level in levels]
        for name in EXPERT_MATRICES
    }
    found = expected_increase(model, tokens, quantized, key=key).expert_curvature
    losses.extend(np.moveaxis(found, -1, 0))
    losses.append(np.zeros_like(losses[0]))
    return np.stack(losses, axis=-1)


def check_levels(levels: Sequence[int]) -> tuple[int, ...]:
    """Raises InputError unless bits exist, ascend and do not repeat."""
    if not levels or list(levels) != sorted(set(levels)) or any(level not in BITS for level in levels):
        said = ",".join(map(str, levels)) or "none"
        raise InputError(f"levels={said}: give some of {', '.join(map(str, BITS))}, in ascending order")
    return tuple(levels)


def make_choices(
    config: ModelConfig,
    losses: Float64[np.ndarray, "layers experts options"],
    levels: Sequence[int],
    recipe: Recipe,
    frequency: Float64[np.ndarray, "layers experts"],
    *,
    batch: int,
    digital: Description,
    analog: Description,
    weight_bytes: float = 2.0,
) -> Choices:
    """Options with what they take of the hardware.

    Args:
        config: the model's.
        losses: of the options (`expected_losses`).
        levels: bits, ascending.
        recipe: grids.
        frequency: share of tokens that choose each expert.
        batch: tokens of a step, which share the reading of an expert's weights.
        digital: the digital unit.
        analog: the chips.
        weight_bytes: of a weight that is not quantized.

    Raises:
        InputError: for losses that are not finite, or sizes that do not fit each other or the model.
    """
    levels, share = check_levels(levels), check_frequency(frequency, config)
    shape = (*share.shape, len(levels) + 2)
    if losses.shape != shape or not np.isfinite(losses).all():
        raise InputError(f"losses {list(losses.shape)} must be finite and {list(shape)} for these levels")
    of_expert = module_shapes(config)["experts"]
    packed = expert_bytes(config, [recipe.grid(level) for level in levels]).sum(axis=0)
    stored = np.array([0.0, *packed, of_expert.weights * weight_bytes])
    energy = [analog_energy(of_expert, share, analog)]
    energy += [digital_energy(of_expert.weights, size, share, batch, digital) for size in stored[1:]]
    tiles = np.zeros(len(stored))
    tiles[0] = module_tile_count(of_expert, analog)
    return Choices(
        levels=levels, losses=np.asarray(losses, np.float64), stored=np.broadcast_to(stored, shape).copy(),
        energy=np.stack(energy, axis=-1), tiles=np.broadcast_to(tiles, shape).copy(),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assignment:
    """What every expert runs on.

    Attributes:
        option: of `Choices`.
        analog: whether it is analog.
        bits: of each of `EXPERT_MATRICES`, 0 for experts that are not quantized (`quantize_experts`).
        expected: increase of the loss, nats per token, added up over experts.
        gap: how far the smallest possible one may be below.
        stored: bytes of digital weights.
        energy: joules per token.
        tiles: of crossbars.
    """

    option: Int[np.ndarray, "layers experts"]
    analog: Bool[np.ndarray, "layers experts"]
    bits: Int[np.ndarray, "layers experts matrices"]
    expected: float
    gap: float
    stored: float
    energy: float
    tiles: float
