"""What an export holds, as plain values for its record."""

import math
from typing import Any

import numpy as np

from hetmoe.analog.calibration import Calibration
from hetmoe.analog.programming import ProgrammedWeights, SeededWeights
from hetmoe.analog.spec import AnalogSpec, describe
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.models.params import Params
from hetmoe.placement.plan import Plan
from hetmoe.quantize.mixed import is_mixed
from hetmoe.quantize.packed import Packed


def about_export(
    model: Model,
    *,
    plan: Plan | None,
    spec: AnalogSpec | None,
    programmed: ProgrammedWeights | SeededWeights | None,
    calibration: Calibration | None,
    implementation: str | None,
    placement: str | None,
) -> dict[str, Any]:
    """The model, the precisions of its experts, and what is analog; `placement` is the name of the plan."""
    analog = None
    if plan is not None and spec is not None:
        analog = {
            "placement": placement,
            "plan": plan_counts(plan),
            **describe(spec),
            "programmed": programmed.when if isinstance(programmed, SeededWeights) else "stored",
            "ranges": "dynamic" if calibration is None else "calibrated",
        }
    return {
        "model": {
            "name": model.name,
            "fingerprint": model_fingerprint(model),
            "vocab_size": model.config.vocab_size,
            "dtype": str(model.params.embed.dtype),
        },
        "experts": expert_precisions(model.params),
        "analog": analog,
        "implementation": implementation or "xla",
    }


def plan_counts(plan: Plan) -> dict[str, list[int] | None]:
    """For every field of a plan how many of its switches are analog, and of how many; None for digital by structure."""
    fields = ("experts", "attention", "shared_experts", "dense_ffn", "lm_head")
    flags = {name: getattr(plan, name) for name in fields}
    return {name: None if f is None else [int(np.sum(np.asarray(f))), int(f.size)] for name, f in flags.items()}


def expert_precisions(params: Params) -> dict[str, dict[str, int]]:
    """How many experts' matrices are stored at which precision (`3 bits`, `bfloat16`), by matrix."""
    found: dict[str, dict[str, int]] = {}
    for name in ("gate", "up", "down"):
        matrix = getattr(params.layers.moe.experts, name)
        counts = found.setdefault(name, {})
        for pool in matrix.pools if is_mixed(matrix) else (matrix,):
            kind = f"{pool.grid.bits} bits" if isinstance(pool, Packed) else str(pool.dtype)
            counts[kind] = counts.get(kind, 0) + math.prod(pool.shape[:-2])
    return found
