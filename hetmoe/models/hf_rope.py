"""Rotary options of `config.json`: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""

from collections.abc import Mapping
from typing import Any

from hetmoe.errors import InputError
from hetmoe.models.config import Rope, Yarn
from hetmoe.models.hf_fields import Fields


def rope_from_hf(f: Fields, *, yarn: bool, interleaved: bool = False) -> Rope:
    """Reads the rotary options; `yarn` says whether the family's published code knows YaRN.

    Raises:
        InputError: for a kind or option that is not supported, or spellings that contradict.
    """
    scaling, parameters = f.get(dict, "rope_scaling", default=None), f.get(dict, "rope_parameters", default=None)
    theta = f.get(float, "rope_theta", default=None)
    given = [dict(p) for p in (scaling, parameters) if p]
    if len(given) == 2 and _without_theta(given[0]) != _without_theta(given[1]):
        raise InputError(f"{f.source}: rope_scaling={given[0]} and rope_parameters={given[1]} contradict")
    options = Fields(given[-1] if given else {}, f"{f.source}: rope options")
    inner = options.get(float, "rope_theta", default=theta)
    if inner is None:
        raise InputError(f"{f.source}: neither rope_theta nor rope_parameters.rope_theta is given")
    if theta is not None and theta != inner:
        raise InputError(f"{f.source}: rope_theta={theta} and rope_parameters.rope_theta={inner} contradict")
    if not 0 < inner < 1e300:
        raise InputError(f"{f.source}: rope_theta={inner!r} must be positive and finite")
    kind = options.get(str, "rope_type", "type", default="default")
    supported = ("default", "linear", "yarn") if yarn else ("default", "linear")
    if kind not in supported:
        raise InputError(f"{f.source}: rope_type={kind!r} is not supported (supported: {', '.join(supported)})")
    options.only("partial_rotary_factor", 1.0, 1)
    linear, stretch = None, None
    if kind == "linear":
        linear = options.get(float, "factor")
    elif kind == "yarn":
        stretch = _yarn(options, f)
    options.refuse_unread()
    return Rope(theta=inner, linear=linear, yarn=stretch, interleaved=interleaved)


def _yarn(options: Fields, f: Fields) -> Yarn:
    def optional(name: str) -> float | None:
        return options.get(float, name, default=None) or None  # 0 is how some files spell "absent"

    return Yarn(
        factor=options.get(float, "factor"),
        original_positions=options.get(
            int, "original_max_position_embeddings", default=f.get(int, "max_position_embeddings")
        ),
        beta_fast=optional("beta_fast") or 32.0,
        beta_slow=optional("beta_slow") or 1.0,
        mscale=optional("mscale"),
        mscale_all_dim=optional("mscale_all_dim"),
        attention_factor=options.get(float, "attention_factor", default=None),
        truncate=options.get(bool, "truncate", default=True),
    )


def _without_theta(options: Mapping[str, Any]) -> dict[str, Any]:
    return {("rope_type" if k == "type" else k): v for k, v in options.items() if k != "rope_theta"}


def rope_to_hf(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which both generations of transformers read."""
    scaling: dict[str, Any] | None = None
    if rope.linear is not None:
        scaling = {"type": "linear", "rope_type": "linear", "factor": rope.linear}
    elif rope.yarn is not None:
        yarn = rope.yarn
        named = {
            "factor": yarn.factor,
            "original_max_position_embeddings": yarn.original_positions,
            "beta_fast": yarn.beta_fast,
            "beta_slow": yarn.beta_slow,
            "mscale": yarn.mscale,
            "mscale_all_dim": yarn.mscale_all_dim,
            "attention_factor": yarn.attention_factor,
            "truncate": yarn.truncate,
        }
        scaling = {"type": "yarn", "rope_type": "yarn"} | {k: v for k, v in named.items() if v is not None}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
