"""Attention in float64 beside the model's, and how far its output can move."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from hetmoe.models.attention import attention_block
from hetmoe.models.config import LatentAttention, Rope, Yarn
from hetmoe.models.hardware import Probe
from hetmoe.quantize.bounds.attention import attention, project
from hetmoe.quantize.bounds.attention_change import attention_change
from hetmoe.quantize.bounds.attention_norms import attention_norms
from hetmoe.quantize.bounds.weights import wide
from tests.models.tiny import full_config, random_params, tiny_config

SEQ = 5
YARN = Yarn(factor=4.0, original_positions=16, beta_fast=2.0, beta_slow=0.5)
CONFIGS = {
    "norm over the width": tiny_config(),
    "norms of heads": tiny_config(qk_norm="head", rope=Rope(theta=100.0, interleaved=True, yarn=YARN)),
    "biases": tiny_config(qk_norm=None, qkv_bias=True, output_bias=True),
    "clipped, window": tiny_config(qk_norm=None, clip_qkv=1.0, sliding_window=3),
    "clipped behind norms": tiny_config(clip_qkv=0.7),
    "clipped before norms": tiny_config(qk_norm="head", clip_qkv=0.7),
    "latent": full_config(),
    "latent, plain queries": full_config(
        latent=LatentAttention(query_rank=None, kv_rank=13, content_dim=5, rope_dim=6, value_dim=7)
    ),
}


def layer_of(kind, seed=0, scale=1.0):
    """(config, weights of attention, gain of the norm before, normed states without that gain)."""
    config = CONFIGS[kind]
    layer = jax.tree.map(lambda leaf: leaf[0], random_params(config, seed).layers)
    weights = jax.tree.map(lambda leaf: leaf * scale, layer.attention)
    states = np.random.default_rng(seed).standard_normal((2, SEQ, config.hidden_size))
    states *= config.hidden_size**0.5 / np.linalg.norm(states, axis=-1, keepdims=True)
    return config, weights, layer.input_norm, states


@pytest.mark.parametrize("kind", CONFIGS)
def test_attention_is_that_of_the_model(kind):
    config, weights, gain, states = layer_of(kind)
    x = np.float32(states * np.asarray(gain))
    wanted = jax.jit(lambda x, weights: attention_block(x, weights, config, None, Probe(None)))(x, weights)
    exact = wide(weights)
    found = attention(project(x.astype(float), exact, config), exact, config)
    # Sums of 24 products in float32, a few after one another.
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6 * np.abs(found).max())


class Case:
    """One layer in float64, and the bound of what its output may change by."""

    def __init__(self, kind, seed, scale):
        self.config, weights, gain, self.states = layer_of(kind, seed, scale)
        self.weights, self.gain = wide((weights, gain))
        self.norms = attention_norms(self.gain, self.weights, self.config)

    def out(self, states):
        return attention(project(self.gain * states, self.weights, self.config), self.weights, self.config)

    def bound(self, radius):
        heads = project(self.gain * self.states, self.weights, self.config)
        return attention_change(heads, self.norms, self.weights, [radius], self.config)[0]

    def measured(self, radius, directions):
        """Largest change of each token's output when all inputs move by `radius` in these directions."""
        lengths = np.linalg.norm(directions, axis=-1, keepdims=True)
        moved = self.states + radius[..., None] * directions / np.where(lengths > 0, lengths, 1)
        return np.linalg.norm(self.out(moved) - self.out(self.states), axis=-1)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**16),
    kind=st.sampled_from(list(CONFIGS)),
    scale=st.sampled_from([1e-3, 1.0, 4.0]),
    radius=st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 1.0, 9.0]),
    only=st.sampled_from([None, 0, SEQ - 1]),
)
def test_no_output_moves_by_more(seed, kind, scale, radius, only):
    case, rng = Case(kind, seed, scale), np.random.default_rng(seed)
    radii = radius * rng.choice([0.1, 1.0], case.states.shape[:2])
    if only is not None:
        radii[:, np.arange(SEQ) != only] = 0
    bound = case.bound(radii)
    for directions in (*rng.standard_normal((4, *case.states.shape)), case.states, -case.states):
        assert (case.measured(radii, directions) <= bound).all()


def worst_directions(case, token):
    """Singular directions of the derivative of one token's output by all inputs of its sequence."""
    step, width = 1e-6, case.states.shape[-1]
    columns = []
    for position in range(SEQ):
        for element in range(width):
            moved = case.states.copy()
            moved[:, position, element] += step
            columns.append((case.out(moved) - case.out(case.states))[:, token] / step)
    jacobian = np.stack(columns, axis=-1)
    return np.linalg.svd(jacobian)[2][:, :3].swapaxes(0, 1).reshape(3, -1, SEQ, width)


@pytest.mark.parametrize(
    ("kind", "tightness"),
    [("norm over the width", 0.12), ("norms of heads", 0.12), ("biases", 0.12), ("latent", 0.08)],
)
@pytest.mark.parametrize("radius", [1e-4, 0.3])
def test_worst_directions_stay_within_the_bound_and_come_near(kind, tightness, radius):
    case = Case(kind, 1, 1.0)
    radii = np.full(case.states.shape[:2], radius)
    bound, token = case.bound(radii), SEQ - 1
    directions = worst_directions(case, token)
    measured = np.max([case.measured(radii, sign * d) for d in directions for sign in (1, -1)], axis=0)
    assert (measured <= bound).all()
    if radius < 0.01:
        assert (measured[:, token] >= tightness * bound[:, token]).all()


def test_a_first_token_reaches_its_bound():
    """It attends to itself alone: its output moves with its value only, by the spectral norm of value and output."""
    case = Case("norm over the width", 2, 1.0)
    one = dataclasses.replace(case.config, num_heads=2, num_kv_heads=2, head_dim=12)
    # Two heads, of which the second one's outputs are taken away.
    weights = dataclasses.replace(
        case.weights, k=np.tile(case.weights.k, 2), k_norm=np.tile(case.weights.k_norm, 2),
        v=np.tile(case.weights.v, 2), o=case.weights.o * (np.arange(24) < 12)[:, None],
    )  # fmt: skip
    norms, radii = attention_norms(case.gain, weights, one), np.full(case.states.shape[:2], 0.5)
    heads = project(case.gain * case.states, weights, one)
    bound = attention_change(heads, norms, weights, [radii], one)[0][:, 0]
    linear = case.gain[:, None] * weights.v[:, :12] @ weights.o[:12]
    direction = np.linalg.svd(linear)[0][:, 0]
    moved = np.linalg.norm(0.5 * direction @ linear)
    np.testing.assert_allclose(bound, moved, rtol=1e-6)
