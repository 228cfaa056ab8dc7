"""Deployments of a sweep's store: the quality that was measured there, and the plans that its scores make."""

import dataclasses
from typing import Any

import jax
import numpy as np

from hetmoe.errors import InputError
from hetmoe.evaluate.prepare import placement_keys
from hetmoe.hardware.deployment import deployment
from hetmoe.models.config import LatentAttention, ModelConfig, Rope, Yarn
from hetmoe.placement.plan import PLACEMENTS, Plan, place
from hetmoe.placement.scores import RANDOM, random_scores
from hetmoe.sweep.points import ALL_DIGITAL, SweepPoint, score_name
from hetmoe.sweep.store import SweepRecord, SweepResult
from hetmoe.technologies.tried import Tried

PLAIN = "not quantized"


@dataclasses.dataclass(frozen=True)
class Condition:
    """Analog hardware of some points."""

    device: str
    noise_scale: float
    time_s: float | None
    bits: int

    @property
    def name(self) -> str:
        """For titles."""
        time = "" if self.time_s is None else f", {self.time_s:g} s after programming"
        converters = f"{self.bits}-bit converters" if self.bits else "ideal converters"
        return f"{self.device}, c = {self.noise_scale:g}{time}, {converters}"

    @property
    def slug(self) -> str:
        """For file names."""
        time = "" if self.time_s is None else f"-{self.time_s:g}s"
        return f"{self.device}-c{self.noise_scale:g}{time}-{self.bits}bits".replace("+", "")


def config_of(record: SweepRecord) -> ModelConfig:
    """The config of a store's model.

    Raises:
        InputError: if the store does not hold one.
    """
    try:
        content: dict[str, Any] = dict(record.model["config"])
        rope: dict[str, Any] = dict(content["rope"])
        if rope.get("yarn") is not None:
            rope["yarn"] = Yarn(**rope["yarn"])
        latent = content.get("latent")
        content |= {"rope": Rope(**rope), "latent": None if latent is None else LatentAttention(**latent)}
        content["dense_layers"] = tuple(content["dense_layers"])
        return ModelConfig(**content)
    except (KeyError, TypeError) as error:
        raise InputError(f"the store's model cannot be read ({type(error).__name__}: {error})") from None


def tried_in(record: SweepRecord, config: ModelConfig) -> dict[Condition, list[Tried]]:
    """Deployments by the analog hardware that they were measured on; the digital model stands beside all of them."""
    results: dict[tuple[Condition, str, float | None], list[SweepResult]] = {}
    digital: list[SweepResult] = []
    for result in record.results:
        point = result.point
        if point.placement == ALL_DIGITAL:
            digital.append(result)
            continue
        condition = Condition(point.device, point.noise_scale, point.time_s, point.bits)
        results.setdefault((condition, point.placement, point.fraction), []).append(result)
    found: dict[Condition, list[Tried]] = {}
    for (condition, placement, fraction), measured in results.items():
        name = placement.replace("_", " ") if fraction is None else f"{placement}, {fraction:.1%} digital"
        plan = plan_of(record, config, measured[0].point)
        found.setdefault(condition, []).append(_tried(name, placement, measured, plan, config))
    for tried in found.values():
        if digital:
            plan = PLACEMENTS[ALL_DIGITAL](config)
            tried.append(_tried("all digital", ALL_DIGITAL, digital, plan, config))
    return found


def _tried(name: str, rule: str, measured: list[SweepResult], plan: Plan, config: ModelConfig) -> Tried:
    accuracies = [r.accuracy for r in measured if r.accuracy is not None]
    return Tried(
        name=name, rule=rule, bits=PLAIN, perplexity=np.array([r.perplexity for r in measured]),
        accuracy=np.array(accuracies) if accuracies else None, where=deployment(plan, config),
    )  # fmt: skip


def plan_of(record: SweepRecord, config: ModelConfig, point: SweepPoint) -> Plan:
    """The plan of a point. Of a random placement, which is another one for every seed, that of this seed.

    Raises:
        InputError: if the store lacks the rule's scores.
    """
    if point.fraction is None:
        return PLACEMENTS[point.placement](config)
    if point.placement == RANDOM:
        grid = record.config["grid"]
        key = placement_keys(grid["seed"], grid["seeds"])[point.seed_index]
        return place(np.asarray(random_scores(jax.device_put(key), config)), point.fraction)
    name = score_name(point.placement, point.device)
    if name not in record.scores:
        raise InputError(f"the store has no scores of {name!r}, so its plans are not known")
    return place(np.asarray(record.scores[name]), point.fraction)
