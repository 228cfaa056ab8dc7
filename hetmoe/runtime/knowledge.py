"""What a policy knows beforehand of a model on a device: losses, growth of noise, and energies."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hetmoe.analog.devices import Device, Draw, GroupRange, NoiseMoments, Programmed
from hetmoe.analog.noise_moments import programming_moments
from hetmoe.analog.spec import AnalogSpec, analog_spec
from hetmoe.errors import InputError
from hetmoe.hardware.description import Description
from hetmoe.hardware.module_energy import analog_energy, digital_energy, module_tile_count
from hetmoe.hardware.shapes import module_shapes
from hetmoe.models.matrices import crossbar_matrices
from hetmoe.models.model import Model
from hetmoe.models.params import Params
from hetmoe.placement.noise_sensitivity import noise_sensitivity
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.runtime.deploy import check_drifting, deployed_weights, fresh_chips
from hetmoe.runtime.policy import Knowledge

AGES = (0.0, 60.0, 600.0, 3600.0, 4 * 3600.0, 86400.0, 3 * 86400.0, 7 * 86400.0, 30 * 86400.0)  # s


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shrunk(Device):
    """All weights too small by the same share: `W' = (1 - c) W`. No memory device, but what an error of scale is."""

    name: str = "shrunk"
    scale_group: Any = "none"

    def program(self, w: Array, *, scale: GroupRange, draw: Draw, noise_scale: Any, time_s: Any) -> Programmed:
        """See `Device.program`; nothing is drawn."""
        del scale, draw
        self.check_time(time_s)
        return Programmed(w * (1 - noise_scale), w * (1 - noise_scale))

    def programming_moments(self, w: Array, *, scale: GroupRange, noise_scale: Any) -> NoiseMoments:
        """See `Device.programming_moments`."""
        del scale
        return NoiseMoments(mean=-noise_scale * w, variance=jnp.zeros_like(w))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Energies and thresholds of a policy, as in `Knowledge`; None = derived (`make_knowledge`)."""

    batch: int = 32
    weight_bytes: float = 2.0
    probes: int = 8
    horizon_tokens: float = 1e7
    joules_per_nat: float | None = None
    action_share: float = 0.5
    margin: float = 0.2
    stale: float = 0.05
    dwell_s: float = 3600.0
    memory: float = 0.5

    def __post_init__(self) -> None:
        for name in ("batch", "weight_bytes", "probes", "horizon_tokens"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)!r} must be positive and finite")
        if self.probes < 2:
            raise InputError(f"probes={self.probes!r} must be at least 2: one has no spread to judge its error by")
        for name in ("margin", "stale", "dwell_s", "action_share"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)!r} must be at least 0 and finite")
        if not 0 < self.memory <= 1 or (self.joules_per_nat is not None and not 0 < self.joules_per_nat < float("inf")):
            raise InputError(
                f"memory={self.memory!r} must be within (0, 1] and joules_per_nat={self.joules_per_nat!r} positive"
            )


class FreshNoise(NamedTuple):
    """Deviations `W' = a W + R` expected right after programming, of all matrices of an expert together."""

    rest: Float[np.ndarray, "layers experts"]  # |R|^2 / |W|^2
    off: Float[np.ndarray, "layers experts"]  # a - 1
    size: Float[np.ndarray, "layers experts"]  # |W|^2


def fresh_noise(params: Params, spec: AnalogSpec) -> FreshNoise:
    """From the device's moments.

    With the mean b and variances v of the deviations, `a - 1 = <b, W> / |W|^2` and `E |R|^2 = sum v + |b|^2 -
    (a - 1)^2 |W|^2`.
    """
    plain = dataclasses.replace(spec, time_s=None)

    @jax.jit
    def sums(w: Array) -> Array:
        moments = programming_moments(w, plain)
        target = w.astype(jnp.float32)
        parts = (jnp.square(target), moments.variance + jnp.square(moments.mean), moments.mean * target)
        return jnp.stack([jnp.sum(part, axis=(-2, -1)) for part in parts])

    targets = crossbar_matrices(params.layers, dense=False)
    size, square, along = np.sum([np.asarray(sums(targets[name]), np.float64) for name in EXPERT_MATRICES], axis=0)
    off = along / size
    return FreshNoise(rest=square / size - np.square(off), off=off, size=size)


def noise_growth(
    key: jax.Array, params: Params, spec: AnalogSpec, fresh: FreshNoise, ages: Sequence[float] = AGES
) -> Float[np.ndarray, "ages"]:
    """`|R / a|^2` of all experts together at each age, over `|R|^2` expected right after programming.

    Measured on one chip, whose read noise is in it at every age. Over a, since compensation multiplies by its inverse.
    """
    targets = crossbar_matrices(params.layers, dense=False)
    chips = fresh_chips(*targets["gate"].shape[:2])

    @jax.jit
    def rest(w: Array, held: Array) -> Array:
        target, found = w.astype(jnp.float32), held.astype(jnp.float32)
        size = jnp.sum(jnp.square(target), axis=(-2, -1))
        scale = (jnp.sum(target * found, axis=(-2, -1)) / size)[..., None, None]
        return jnp.sum(jnp.square(found / scale - target))

    found: list[float] = []
    for age in ages:
        programmed = deployed_weights(
            key, params, spec, dataclasses.replace(chips, age=jnp.full_like(chips.age, age))
        ).layers
        found.append(sum(float(rest(targets[name], programmed[name].w)) for name in EXPERT_MATRICES))
    return np.array(found) / float(np.sum(fresh.rest * fresh.size))


def make_knowledge(
    model: Model,
    windows: Int[Any, "sequences context"],
    spec: AnalogSpec,
    frequency: Float[np.ndarray, "layers experts"],
    *,
    digital: Description,
    analog: Description,
    link: Description,
    costs: Costs,
    key: jax.Array,
) -> Knowledge:
    """Estimates losses on a text, the growth of noise on one chip, and energies from descriptions.

    Losses are those of `noise_sensitivity` without its gradient term: variances and the bias beyond scale as
    `noise_loss`, and the curvature along the weights themselves as `scale_loss`. Moving an expert reads its weights
    over the link; programming and probing are tiles' energies. `joules_per_nat` is, unless it is given, what all
    experts cost more when digital over what they lose when analog.

    Args:
        model: not quantized.
        windows: text; each row predicts its tokens from the second on.
        spec: a drifting device with some time, without drift compensation.
        frequency: share of tokens that choose each expert.
        digital: the digital unit.
        analog: the chips, with `programming_energy`.
        link: over which weights are moved.
        costs: thresholds.
        key: of sampled labels and of the chip.

    Raises:
        InputError: for a device that does not drift, or chips whose programming energy is not stated.
    """
    check_drifting(spec)
    if analog.value("tile.programming_energy") is None:
        raise analog.error("tile.programming_energy", "lacks 'programming_energy', which a policy needs")
    label_key, chip_key = jax.random.split(key)
    tokens = jnp.asarray(windows)
    noise = noise_sensitivity(model, tokens, dataclasses.replace(spec, time_s=None), key=label_key, dense=False)
    share = 0.05
    along = noise_sensitivity(model, tokens, analog_spec(Shrunk(), noise_scale=share), key=label_key, dense=False)
    scale_loss = np.asarray(along.bias.experts, np.float64) / share**2
    fresh = fresh_noise(model.params, spec)
    bias = np.maximum(np.asarray(noise.bias.experts, np.float64) - scale_loss * np.square(fresh.off), 0.0)
    noise_loss = np.asarray(noise.variance.experts, np.float64) + bias
    shape = module_shapes(model.config)["experts"]
    stored = shape.weights * costs.weight_bytes
    of_digital = digital_energy(shape.weights, stored, frequency, costs.batch, digital)
    of_analog = analog_energy(shape, frequency, analog)
    tiles = module_tile_count(shape, analog)
    price = costs.joules_per_nat
    if price is None:
        price = float(np.sum(np.maximum(of_digital - of_analog, 0)) / np.sum(noise_loss))

    def number(value: float | np.ndarray) -> Array:
        return jnp.asarray(value, jnp.float32)

    return Knowledge(
        noise_loss=number(noise_loss), scale_loss=number(scale_loss), fresh_rest=number(fresh.rest),
        ages=number(np.array(AGES)),
        growth=number(noise_growth(chip_key, model.params, spec, fresh)),
        digital_energy=number(of_digital), analog_energy=number(of_analog),
        move_energy=number(stored * link.entries["link.energy"].value),
        program_energy=number(tiles * analog.entries["tile.programming_energy"].value),
        probe_energy=number(costs.probes * tiles * analog.entries["tile.operation_energy"].value),
        joules_per_nat=number(price), horizon_tokens=number(costs.horizon_tokens),
        action_share=number(costs.action_share), margin=number(costs.margin), stale=number(costs.stale),
        dwell_s=number(costs.dwell_s), memory=number(costs.memory),
    )  # fmt: skip
