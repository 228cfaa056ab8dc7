"""Plans on disk: JSON that says which experts are digital, and for which model."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hetmoe.errors import InputError
from hetmoe.files import write_text
from hetmoe.models.analog_arguments import check_quantized
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_fields import read_json
from hetmoe.models.model import Model, model_fingerprint
from hetmoe.placement.plan import Plan, check_plan
from hetmoe.quantize.layout import QuantizedLayout, layout_of

FORMAT = "hetmoe-plan-2"
BESIDE_MODEL = "plan.json"  # in the directory of a model with quantized experts
_LAYERWISE = ("attention", "shared_experts", "dense_ffn")


def save_plan(path: str | Path, plan: Plan, model: Model, *, made_by: dict[str, Any] | None = None) -> None:
    """Writes a plan for `model`; `made_by` records how it came about (rule, fraction, seed).

    For a model with quantized experts the plan says too where each expert runs: "analog", "digital", or "digital at b
    bits" (of gate, up and down, where these differ).

    Raises:
        InputError: if the plan does not fit the model, or the file cannot be written.
    """
    check_plan(plan, model.config)
    check_quantized(model.params, plan)
    where = experts_run_on(plan, layout_of(model.params.layers.moe.experts))
    identity = model_fingerprint(model)
    write_plan(Path(path), plan, name=model.name, fingerprint=identity, made_by=made_by or {}, where=where)


def experts_run_on(plan: Plan, layout: QuantizedLayout | None) -> list[list[str]] | None:
    """Where each expert of each layer runs, in words; None for a model without quantized experts."""
    if layout is None:
        return None
    bits, analog = layout.bits(), np.asarray(plan.experts)
    return [
        [_where(bool(is_analog), of.tolist()) for is_analog, of in zip(row, bits_row, strict=True)]
        for row, bits_row in zip(analog, bits, strict=True)
    ]


def _where(is_analog: bool, bits: list[int]) -> str:
    if is_analog:
        return "analog"
    if not any(bits):
        return "digital"
    same = len(set(bits)) == 1
    return f"digital at {bits[0] if same else ', '.join(map(str, bits))} bit{'' if same and bits[0] == 1 else 's'}"


def write_plan(
    path: Path,
    plan: Plan,
    *,
    name: str,
    fingerprint: str,
    made_by: dict[str, Any],
    where: list[list[str]] | None = None,
) -> None:
    """Writes a plan for a model of which name, fingerprint and `experts_run_on` are known."""
    record: dict[str, Any] = {
        "format": FORMAT,
        "model": {"name": name, "fingerprint": fingerprint},
        "made_by": made_by,
        "moe_layers": int(plan.experts.shape[0]),
        "experts": int(plan.experts.shape[1]),
        "digital_experts": [np.flatnonzero(~row).tolist() for row in np.asarray(plan.experts)],
    }
    for field in _LAYERWISE:
        flags = getattr(plan, field)
        record[field] = None if flags is None else np.asarray(flags).tolist()
    record["lm_head"] = None if plan.lm_head is None else bool(plan.lm_head)
    if where is not None:
        record["experts_run_on"] = where
    write_text(path, json.dumps(record, indent=2) + "\n")


def load_plan(path: str | Path, model: Model) -> Plan:
    """Reads a plan made for this model.

    Raises:
        InputError: if the file is absent or malformed, or the plan was made for another model.
    """
    identity, layout = model_fingerprint(model), layout_of(model.params.layers.moe.experts)
    plan = read_plan(Path(path), model.config, name=model.name, identity=identity, layout=layout)
    check_quantized(model.params, plan)
    return plan


def read_plan(
    path: Path, config: ModelConfig, *, name: str, identity: str | None, layout: QuantizedLayout | None
) -> Plan:
    """Reads a plan for a model of which no more than this is known; without its `identity` any model's will do.

    Raises:
        InputError: as `load_plan`.
    """
    try:
        record = read_json(path)
    except InputError as error:
        raise InputError(f"plan {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"plan {path}: not a plan file of format {FORMAT!r}; make one with 'hetmoe place'")
    try:
        made_for, layers, experts = record["model"], record["moe_layers"], record["experts"]
        if identity is not None and made_for["fingerprint"] != identity:
            raise InputError(
                f"plan {path}: made for model {made_for['name']!r} ({made_for['fingerprint']}), not for {name!r} "
                f"({identity}); make one with 'hetmoe place'"
            )
        rows = record["digital_experts"]
        if not isinstance(rows, list) or len(rows) != layers:
            raise InputError(f"plan {path}: digital_experts must have {layers} rows, one per layer with experts")
        analog = np.ones((layers, experts), bool)
        for row, digital in zip(analog, rows, strict=True):
            row[_indices(digital, experts)] = False
        plan = Plan(
            experts=jnp.asarray(analog),
            **{field: _flags(path, field, record[field]) for field in _LAYERWISE},
            lm_head=_flags(path, "lm_head", record["lm_head"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"plan {path}: malformed ({type(error).__name__}: {error})") from None
    check_plan(plan, config)
    _check_where(path, record.get("experts_run_on"), experts_run_on(plan, layout), name)
    return plan


def _check_where(path: Path, said: Any, found: list[list[str]] | None, name: str) -> None:
    """A plan that names bits is of one quantization of the model."""
    if said is None or said == found:
        return
    if found is None:
        raise InputError(
            f"plan {path}: is for {name!r} with quantized experts, and these are not: load the directory that it "
            "was written beside"
        )
    if isinstance(said, list) and [len(row) for row in said] != [len(row) for row in found]:
        raise InputError(f"plan {path}: experts_run_on must name every expert of every layer with experts once")
    for layer, row in enumerate(found):
        theirs = said[layer] if isinstance(said, list) and layer < len(said) and isinstance(said[layer], list) else []
        for expert, where in enumerate(row):
            there = theirs[expert] if expert < len(theirs) else None
            if there != where:
                raise InputError(
                    f"plan {path}: expert {expert} of layer {layer} (of those with experts) is {there!r} there and "
                    f"{where!r} in {name!r}: the plan is of another quantization"
                )


def _indices(values: list[Any], limit: int) -> list[int]:
    if any(type(v) is not int or not 0 <= v < limit for v in values) or len(set(values)) != len(values):
        raise ValueError(f"indices {values} must be distinct whole numbers below {limit}")
    return values


def _flags(path: Path, field: str, value: Any) -> Any:
    """True, False, a list of them, or null for digital by structure."""
    if value is None:
        return None
    wanted = isinstance(value, bool) if field == "lm_head" else isinstance(value, list)
    if not wanted or (isinstance(value, list) and not all(isinstance(v, bool) for v in value)):
        shape = "true or false" if field == "lm_head" else "a list of true and false"
        raise InputError(f"plan {path}: {field}={str(value)[:100]} must be {shape}, or null")
    return jnp.asarray(value, bool)
