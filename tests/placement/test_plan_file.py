"""Plans on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.abstract import init_params
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, all_analog, place
from hetmoe.placement.plan_file import load_plan, save_plan
from tests.models.tiny import full_config, random_params


def make_model(seed: int) -> Model:
    config = ModelConfig(
        family="olmoe", vocab_size=50, hidden_size=16, expert_intermediate_size=12, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=8, qk_norm="width", num_experts=6, experts_per_token=2, norm_topk_prob=False,
        clip_qkv=None, rms_norm_eps=1e-5, rope=Rope(theta=1e4), max_position_embeddings=64, tie_embeddings=True,
    )  # fmt: skip
    params = init_params(jax.random.key(seed), config)
    return Model(params=params, config=config, tokenizer=None, eos_token_id=None, name=f"m{seed}")


def save(path: Path, plan: Plan, model: Model, made_by: dict[str, Any]) -> None:
    save_plan(path, plan, model, made_by=made_by)


@pytest.mark.parametrize("dense", [False, True])
def test_round_trip(tmp_path: Path, dense: bool) -> None:
    model, path = make_model(0), tmp_path / "deep" / "plan.json"
    plan = place(jnp.asarray(np.random.default_rng(0).random((2, 6))), 0.5)
    if dense:
        full = all_analog(model.config)
        plan = Plan(experts=plan.experts, attention=full.attention.at[0].set(False), lm_head=full.lm_head)  # pyright: ignore[reportOptionalMemberAccess]
    save(path, plan, model, made_by={"rule": "test"})
    loaded = load_plan(path, model)
    np.testing.assert_array_equal(loaded.experts, plan.experts)
    for name in ("attention", "lm_head"):
        saved, read = getattr(plan, name), getattr(loaded, name)
        assert (saved is None) == (read is None)
        if saved is not None:
            np.testing.assert_array_equal(read, saved)
    assert json.loads(path.read_text())["made_by"] == {"rule": "test"}


def test_a_plan_for_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save(path, all_analog(make_model(0).config), make_model(0), made_by={})
    with pytest.raises(InputError, match=r"made for model 'm0'.*not for 'm1'"):
        load_plan(path, make_model(1))  # same shape, other weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a plan file"),
        ({"digital_experts": [[0], [6]]}, "below 6"),
        ({"digital_experts": [[0, 0], [1]]}, "distinct"),
        ({"digital_experts": [[True], [1]]}, "whole numbers"),
        ({"digital_experts": [[0]]}, "digital_experts must have 2 rows, one per layer with experts"),
        ({"digital_experts": None}, "malformed"),
        ({"moe_layers": 3, "digital_experts": [[], [], []]}, "this model needs"),
        ({"model": "m0"}, "malformed"),
        ({"lm_head": "yes"}, "lm_head=yes must be true or false, or null"),
        ({"lm_head": [True]}, "must be true or false, or null"),
        ({"attention": True}, "attention=True must be a list of true and false, or null"),
        ({"attention": [1, 0]}, "must be a list of true and false, or null"),
        ({"attention": [True]}, "attention has shape"),
        ({"attention": [True, False, True]}, "attention has shape"),
        ({"attention": [[True, False]]}, "must be a list of true and false, or null"),
        ({"shared_experts": [True, True]}, "shared_experts is set, but this model has none"),
        ({"dense_ffn": []}, "dense_ffn"),
    ],
)
def test_malformed_plans_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path, model = tmp_path / "plan.json", make_model(0)
    save(path, place(jnp.ones((2, 6)), 0.5), model, made_by={})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_plan(path, model)


def test_every_kind_of_module_survives_a_round_trip(tmp_path: Path) -> None:
    """In layers of two kinds, with flags that differ; what is digital by structure stays so."""
    config = full_config(num_layers=5, dense_layers=(0, 1), shared_gate=False, shared_intermediate_size=2 * 21)
    model = Model(params=random_params(config, 0), config=config, tokenizer=None, eos_token_id=None, name="full")
    flags = {"attention": [True, False, False, True, False], "shared_experts": [False, True, True],
             "dense_ffn": [False, True], "lm_head": False}  # fmt: skip
    plan = place(jnp.asarray(np.random.default_rng(0).random((3, 8))), 0.5)
    for chosen in (flags, {}, *({name: value} for name, value in flags.items())):
        full = dataclasses.replace(plan, **{name: jnp.asarray(value) for name, value in chosen.items()})
        save(tmp_path / "plan.json", full, model, made_by={})
        loaded = load_plan(tmp_path / "plan.json", model)
        np.testing.assert_array_equal(loaded.experts, plan.experts)
        assert {name: None if (got := getattr(loaded, name)) is None else got.tolist() for name in flags} == (
            dict.fromkeys(flags) | chosen
        )


def test_plans_of_missing_fields_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "plan.json", make_model(0)
    save(path, place(jnp.ones((2, 6)), 0.5), model, made_by={})
    whole = json.loads(path.read_text())
    needed = whole.keys() - {"made_by"}
    assert needed >= {"digital_experts", "attention", "shared_experts", "dense_ffn", "lm_head"}
    for name in needed:
        path.write_text(json.dumps({key: value for key, value in whole.items() if key != name}))
        with pytest.raises(InputError, match="plan"):
            load_plan(path, model)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_files_that_are_no_plans_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="plan"):
        load_plan(path, make_model(0))
    with pytest.raises(InputError, match=r"absent\.json: no such file") as caught:
        load_plan(tmp_path / "absent.json", make_model(0))
    assert "safetensors" not in str(caught.value)  # a plan is not a model
