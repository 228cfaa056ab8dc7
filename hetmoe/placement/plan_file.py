"""Plans on disk: JSON that says which experts are digital, and for which model."""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from hetmoe.errors import InputError
from hetmoe.files import write_text
from hetmoe.models.hf import Model, fingerprint
from hetmoe.placement.plan import Plan, check_plan

FORMAT = "hetmoe-plan-1"


def save_plan(path: Path, plan: Plan, model: Model, *, made_by: dict[str, Any]) -> None:
    """Writes a plan; `made_by` records how it came about (rule, fraction, seed)."""
    record = {
        "format": FORMAT,
        "model": {"name": model.name, "fingerprint": fingerprint(model)},
        "made_by": made_by,
        "layers": int(plan.experts.shape[0]),
        "experts": int(plan.experts.shape[1]),
        "digital_experts": [np.flatnonzero(~row).tolist() for row in np.asarray(plan.experts)],
        "analog_attention_layers": None if plan.attention is None else np.flatnonzero(plan.attention).tolist(),
        "analog_lm_head": None if plan.lm_head is None else bool(plan.lm_head),
    }
    write_text(path, json.dumps(record, indent=2) + "\n")


def load_plan(path: Path, model: Model) -> Plan:
    """Reads a plan made for this model.

    Raises:
        InputError: if the file is absent or malformed, or the plan was made for another model.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"plan {path}: not readable as JSON ({error})") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"plan {path}: not a plan file of format {FORMAT!r}; make one with 'hetmoe place'")
    try:
        made_for, layers, experts = record["model"], record["layers"], record["experts"]
        if made_for["fingerprint"] != fingerprint(model):
            raise InputError(
                f"plan {path}: made for model {made_for['name']!r} ({made_for['fingerprint']}), not for {model.name!r} "
                f"({fingerprint(model)}); make one with 'hetmoe place'"
            )
        analog = np.ones((layers, experts), bool)
        if len(record["digital_experts"]) != layers:
            raise InputError(f"plan {path}: digital_experts has {len(record['digital_experts'])} rows, not {layers}")
        for row, digital in zip(analog, record["digital_experts"], strict=True):
            row[_indices(digital, experts)] = False
        attention = None
        if record["analog_attention_layers"] is not None:
            flags = np.zeros(layers, bool)
            flags[_indices(record["analog_attention_layers"], layers)] = True
            attention = jnp.asarray(flags)
        head = record["analog_lm_head"]
        if head is not None and not isinstance(head, bool):
            raise InputError(f"plan {path}: analog_lm_head={head!r} must be true, false or null")
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"plan {path}: malformed ({type(error).__name__}: {error})") from None
    plan = Plan(experts=jnp.asarray(analog), attention=attention, lm_head=None if head is None else jnp.asarray(head))
    check_plan(plan, model.config)
    return plan


def _indices(values: list[Any], limit: int) -> list[int]:
    if any(type(v) is not int or not 0 <= v < limit for v in values) or len(set(values)) != len(values):
        raise ValueError(f"indices {values} must be distinct whole numbers below {limit}")
    return values
