"""Plans on disk."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf import Model
from hetmoe.models.params import init_params
from hetmoe.placement.plan import Plan, all_analog, place
from hetmoe.placement.plan_file import load_plan, save_plan


def make_model(seed: int) -> Model:
    config = ModelConfig(
        vocab_size=50, hidden_size=16, expert_intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=2,
        head_dim=8, num_experts=6, experts_per_token=2, norm_topk_prob=False, clip_qkv=None, rms_norm_eps=1e-5,
        rope_theta=1e4, max_position_embeddings=64, tie_embeddings=True,
    )  # fmt: skip
    params = init_params(jax.random.key(seed), config)
    return Model(params=params, config=config, tokenizer=None, eos_token_id=None, name=f"m{seed}")


@pytest.mark.parametrize("dense", [False, True])
def test_round_trip(tmp_path: Path, dense: bool) -> None:
    model, path = make_model(0), tmp_path / "deep" / "plan.json"
    plan = place(jnp.asarray(np.random.default_rng(0).random((2, 6))), 0.5)
    if dense:
        full = all_analog(model.config)
        plan = Plan(experts=plan.experts, attention=full.attention.at[0].set(False), lm_head=full.lm_head)  # pyright: ignore[reportOptionalMemberAccess]
    save_plan(path, plan, model, made_by={"rule": "test"})
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
    save_plan(path, all_analog(make_model(0).config), make_model(0), made_by={})
    with pytest.raises(InputError, match=r"made for model 'm0'.*not for 'm1'"):
        load_plan(path, make_model(1))  # same shape, other weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "not a plan file"),
        ({"digital_experts": [[0], [6]]}, "below 6"),
        ({"digital_experts": [[0, 0], [1]]}, "distinct"),
        ({"digital_experts": [[True], [1]]}, "whole numbers"),
        ({"digital_experts": [[0]]}, "has 1 rows, not 2"),
        ({"digital_experts": None}, "malformed"),
        ({"layers": 3, "digital_experts": [[], [], []]}, "this model needs"),
        ({"model": "m0"}, "malformed"),
        ({"analog_lm_head": "yes"}, "must be true, false or null"),
        ({"analog_attention_layers": [5]}, "below 2"),
    ],
)
def test_malformed_plans_are_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path, model = tmp_path / "plan.json", make_model(0)
    save_plan(path, place(jnp.ones((2, 6)), 0.5), model, made_by={})
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        load_plan(path, model)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"null"])
def test_files_that_are_no_plans_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match="plan"):
        load_plan(path, make_model(0))
    with pytest.raises(InputError, match="not readable"):
        load_plan(tmp_path / "absent.json", make_model(0))
