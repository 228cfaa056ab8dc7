"""Placement rules against float64 numpy on the definition, expert by expert."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.abstract import init_params
from hetmoe.models.config import ModelConfig, Rope
from hetmoe.models.model import Model
from hetmoe.models.transformer import hidden_states
from hetmoe.placement.scores import RULES, score_experts
from tests.models.tiny import random_params, tiny_config


@pytest.fixture(scope="module")
def model() -> Model:
    config = ModelConfig(
        family="olmoe", vocab_size=50, hidden_size=16, expert_intermediate_size=12, num_layers=2, num_heads=2,
        num_kv_heads=2, head_dim=8, qk_norm="width", num_experts=6, experts_per_token=2, norm_topk_prob=False,
        clip_qkv=None, rms_norm_eps=1e-5, rope=Rope(theta=1e4), max_position_embeddings=64, tie_embeddings=True,
    )  # fmt: skip
    return Model(
        params=init_params(jax.random.key(3), config), config=config, tokenizer=None, eos_token_id=None, name="m"
    )


@pytest.mark.parametrize("down_axis", ["hidden", "output"])
def test_max_neuron_norm_is_the_product_of_largest_neurons(model: Model, down_axis: str) -> None:
    scores = score_experts(model, "max_neuron_norm", down_axis=down_axis)  # pyright: ignore[reportArgumentType]
    layers = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), model.params.layers)
    for layer in range(2):
        for expert in range(6):
            # As torch stores them: rows of up/gate feed a hidden unit; columns of down leave it.
            up, gate, down = (getattr(layers.moe.experts, n)[layer, expert].T for n in ("up", "gate", "down"))
            assert up.shape == (12, 16) and down.shape == (16, 12)
            expected = np.sqrt((up**2).sum(1)).max() * np.sqrt((gate**2).sum(1)).max()
            expected *= np.sqrt((down**2).sum(0 if down_axis == "hidden" else 1)).max()
            # Three float32 norms of 16 terms: a few units in the last place.
            assert float(scores[layer, expert]) == pytest.approx(expected, rel=1e-6)


def test_router_norm(model: Model) -> None:
    router = np.asarray(model.params.layers.moe.router, np.float64)
    np.testing.assert_allclose(
        score_experts(model, "router_norm"), [[np.linalg.norm(r[:, e]) for e in range(6)] for r in router], rtol=1e-6
    )


@pytest.mark.parametrize("sequences", [3, 18])  # one batch, and one and a bit
def test_activation_rules_count_every_token(model: Model, sequences: int) -> None:
    tokens = jax.random.randint(jax.random.key(1), (sequences, 10), 0, 50)
    _, routing, _ = hidden_states(model.params, tokens, model.config)
    chosen, weights = np.asarray(routing.chosen), np.asarray(routing.weights, np.float64)
    frequency, weight = np.zeros((2, 6)), np.zeros((2, 6))
    for layer in range(2):
        for token in range(sequences * 10):
            for copy in range(2):
                frequency[layer, chosen[layer, token, copy]] += 1 / (sequences * 10)
                weight[layer, chosen[layer, token, copy]] += weights[layer, token, copy] / (sequences * 10)
    np.testing.assert_allclose(score_experts(model, "activation_frequency", tokens=tokens), frequency, rtol=1e-5)
    np.testing.assert_allclose(score_experts(model, "activation_weight", tokens=tokens), weight, rtol=1e-5)
    np.testing.assert_allclose(frequency.sum(1), 2)


def test_random_needs_and_follows_its_key(model: Model) -> None:
    first, again, other = (score_experts(model, "random", key=jax.random.key(k)) for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not jnp.any(first == other)
    with pytest.raises(InputError, match="needs a key"):
        score_experts(model, "random")


def test_missing_or_unknown_arguments_are_errors(model: Model) -> None:
    for rule in ("activation_frequency", "activation_weight"):
        with pytest.raises(InputError, match="needs tokens"):
            score_experts(model, rule)
    with pytest.raises(InputError, match=f"use one of {', '.join(RULES)}"):
        score_experts(model, "largest")
    with pytest.raises(InputError, match="must be 'hidden' or 'output'"):
        score_experts(model, "max_neuron_norm", down_axis="rows")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["gate", "up", "down"])
@pytest.mark.parametrize("where", [(0, 0), (63, 100), (40, 7)])
def test_a_weight_that_is_nan_makes_its_score_nan(name: str, where: tuple[int, int]) -> None:
    """In matrices so large that XLA on CPU loses NaN in their maxima."""
    config = tiny_config(hidden_size=64, expert_intermediate_size=128, num_experts=4)
    params = random_params(config, 0)
    experts = params.layers.moe.experts
    at = where if name != "down" else where[::-1]
    experts = experts.replace(**{name: getattr(experts, name).at[0, 2, at[0], at[1]].set(jnp.nan)})
    params = params.replace(layers=params.layers.replace(moe=params.layers.moe.replace(experts=experts)))
    broken = Model(params=params, config=config, tokenizer=None, eos_token_id=None, name="broken")
    scores = np.asarray(score_experts(broken, "max_neuron_norm"))
    np.testing.assert_array_equal(np.isnan(scores), [[False, False, True, False]])
