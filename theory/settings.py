"""The analysed setting, and others that change one thing about it."""

import dataclasses
from types import MappingProxyType
from typing import Any

from theory.data import DataSpec
from theory.model import ModelSpec
from theory.train import TrainSpec

BASE = TrainSpec()


def _changed(*, data: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> TrainSpec:
    return TrainSpec(data=DataSpec(**(data or {})), model=ModelSpec(**(model or {})), **train)


SETTINGS: MappingProxyType[str, TrainSpec] = MappingProxyType(
    {
        "analysed": BASE,
        "overlapping patterns": _changed(data={"overlap": 0.5}),
        "noisy tokens": _changed(data={"token_noise": 0.3}),
        "Zipf-distributed irrelevant tokens": _changed(data={"zipf": 1.0}),
        "four classes": _changed(data={"classes": 4}, model={"classes": 4}),
        "three frequencies": _changed(data={"levels": 3}),
        "logistic loss": _changed(loss="logistic"),
        "trained second layer": _changed(model={"trained_output": True}),
        # A gate's product starts with the square of the initial weights: these are larger, and learn faster.
        "gated experts": _changed(model={"gated": True}, std=0.1, expert_rate=0.5),
        "token choice": _changed(model={"routing": "token_choice"}),
        "neurons of both votes": _changed(model={"votes": "neuron"}),
        "routers learn five times as fast": dataclasses.replace(BASE, router_rate=5 * BASE.router_rate),
        "routers learn a fifth as fast": dataclasses.replace(BASE, router_rate=BASE.router_rate / 5),
        "start ten times smaller": dataclasses.replace(BASE, std=BASE.std / 10),
        "sixteen experts": _changed(model={"experts": 16}),
    }
)
"""By name; the first is the one that the argument is about."""
