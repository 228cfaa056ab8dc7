"""Placements under one budget for the whole model, and what modules cost."""

import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.hardware.description import open_description, parse_description, shipped_descriptions
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.placement.budget import digital_cost, place_within
from hetmoe.placement.energy_costs import energy_costs
from hetmoe.placement.module_scores import ModuleScores, empty_scores, module_parameters
from hetmoe.placement.plan import check_plan, experts_analog, plan_shapes
from tests.models.tiny import full_config, tiny_config

OLMOE = ModelConfig(
    family="olmoe", vocab_size=50304, hidden_size=2048, expert_intermediate_size=1024, num_layers=16, num_heads=16,
    num_kv_heads=16, head_dim=128, qk_norm="width", num_experts=64, experts_per_token=8, norm_topk_prob=False,
    clip_qkv=None, rms_norm_eps=1e-5, rope=Rope(theta=1e4), max_position_embeddings=4096, tie_embeddings=False,
)  # fmt: skip

HARDWARE = {"digital": open_description("a100-80gb", "digital"), "analog": open_description("ibm-3d-cim", "analog")}


def drawn(config: ModelConfig, seed: int) -> ModuleScores:
    rng = np.random.default_rng(seed)
    return ModuleScores(**{n: np.asarray(rng.normal(size=shape)) for n, shape in plan_shapes(config).items()})


def flat(scores: ModuleScores, config: ModelConfig) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(getattr(scores, name), float)) for name in plan_shapes(config)])


def test_no_plan_within_the_budget_is_worth_more() -> None:
    config = full_config(num_experts=4, experts_per_token=2, expert_groups=2, groups_per_token=1)  # 14 modules
    costs = module_parameters(config)
    for seed in range(3):
        scores = drawn(config, seed)
        budget = 0.4 * flat(costs, config).sum()
        plan = place_within(scores, costs, budget, config)
        check_plan(plan, config)
        digital = np.concatenate([~np.ravel(np.asarray(getattr(plan, name))) for name in plan_shapes(config)])
        values, prices = flat(scores, config), flat(costs, config)
        assert prices[digital].sum() == digital_cost(plan, costs) <= budget
        subsets = np.array(list(itertools.product([False, True], repeat=len(values))))
        allowed = subsets @ prices <= budget
        np.testing.assert_allclose(values[digital].sum(), (subsets @ values)[allowed].max(), rtol=1e-12)


def test_modules_without_a_score_are_digital_outside_the_budget() -> None:
    config = full_config()
    experts = np.arange(16.0).reshape(2, 8) + 1
    cost = float(module_parameters(config).experts[0, 0])
    plan = place_within(ModuleScores(experts=experts), module_parameters(config), 3 * cost, config)
    assert plan.attention is None and plan.lm_head is None and plan.shared_experts is None and plan.dense_ffn is None
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(plan.experts)), [13, 14, 15])  # over both layers
    assert digital_cost(plan, module_parameters(config)) == 3 * cost
    assert digital_cost(experts_analog(config), module_parameters(config)) == 0


def test_parameters_are_those_of_the_matrices() -> None:
    config = full_config()
    found = module_parameters(config)
    assert float(found.experts[1, 3]) == 3 * 23 * 21
    assert float(found.shared_experts[0]) == 3 * 23 * 15 and float(found.dense_ffn[0]) == 3 * 23 * 19
    assert float(found.lm_head) == 23 * 40
    # q_a, q_b, kv_a, kv_b, o of latent attention with 4 heads.
    assert float(found.attention[2]) == 23 * 17 + 17 * 4 * 11 + 23 * (13 + 6) + 13 * 4 * (5 + 7) + 4 * 7 * 23
    assert empty_scores(tiny_config(), dense=False).lm_head is None


def test_energy_of_olmoe_is_that_of_the_papers_arithmetic() -> None:
    """All analog: 16 layers of 64 attention tiles and 8 experts of 24, 10 nJ each, are 41 uJ per token (reported 41.8).

    All digital: 13.8 GB, less the embedding, read once for 32 tokens at 400 W and 0.85 of 2.039 TB/s.
    """
    share = np.full((16, 64), 8 / 64)
    every = energy_costs(OLMOE, share, batch=1, **HARDWARE)
    bytes_of = 2 * 400 / (0.85 * 2.039e12)
    expert = 3 * 2048 * 1024
    np.testing.assert_allclose(every.experts, share * (expert * bytes_of - 24 * 10e-9), rtol=1e-12)
    np.testing.assert_allclose(every.attention, 4 * 2048**2 * bytes_of - 64 * 10e-9, rtol=1e-12)
    np.testing.assert_allclose(every.lm_head, 2048 * 50304 * bytes_of - 4 * 99 * 10e-9, rtol=1e-12)
    analog_layers = sum(
        float(np.sum(part))
        for part in (share * expert * bytes_of - every.experts, 4 * 2048**2 * bytes_of - np.asarray(every.attention))
    )
    np.testing.assert_allclose(analog_layers, 4096 * 10e-9, rtol=1e-9)
    # At batch 32 nearly every expert is read in every step, for 32 tokens together.
    batched = energy_costs(OLMOE, share, batch=32, **HARDWARE)
    read = 1 - (1 - 1 / 8) ** 32
    np.testing.assert_allclose(batched.experts, expert * bytes_of * read / 32 - 24 * 10e-9 / 8, rtol=1e-12)


def test_an_idle_expert_costs_nothing_and_costs_are_never_negative() -> None:
    share = np.zeros((16, 64))
    share[0, 0] = 1.0
    assert not energy_costs(OLMOE, share, **HARDWARE).experts[0, 1:].any()
    text = shipped_descriptions()["ibm-3d-cim"].read_text()
    dear = parse_description(text.replace('value = 10, unit = "nJ"', 'value = 10, unit = "mJ"'))
    assert not flat(energy_costs(OLMOE, share, **(HARDWARE | {"analog": dear})), OLMOE).any()


def test_where_arithmetic_takes_longer_than_memory_it_is_what_counts() -> None:
    share = np.full((16, 64), 8 / 64)
    found = energy_costs(OLMOE, share, bytes_per_weight=1e-6, **HARDWARE).experts
    flops = 2 * 3 * 2048 * 1024
    np.testing.assert_allclose(found, share * (400 * flops / (0.85 * 312e12) - 24 * 10e-9), rtol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frequency": np.full((16, 64), 1.5)}, "shares in"),
        ({"frequency": np.full((16, 63), 0.5)}, r"frequency \[16, 63\]"),
        ({"frequency": np.full((16, 64), np.nan)}, "shares in"),
        ({"batch": 0}, "batch=0"),
        ({"bytes_per_weight": 0.0}, "bytes_per_weight=0.0"),
        ({"bytes_per_weight": float("inf")}, "bytes_per_weight=inf"),
    ],
)
def test_bad_costs_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        energy_costs(OLMOE, **(HARDWARE | {"frequency": np.full((16, 64), 0.1)} | changes))


def test_bad_scores_are_refused() -> None:
    config = tiny_config()
    scores = ModuleScores(experts=jnp.asarray(np.full((1, 8), np.nan)))
    with pytest.raises(InputError, match="finite"):
        place_within(scores, module_parameters(config), 1e3, config)
