"""The mixture against loops in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.params import FeedForward, MoE
from hetmoe.placement.scores import max_neuron_norm
from theory.data import Tokens
from theory.model import (
    Mixture,
    ModelSpec,
    fixed_votes,
    forward,
    init_mixture,
    lookup,
    margins,
    neuron_norm_scores,
    routing_weights,
)

SPECS = [
    ModelSpec(dim=6, experts=4, neurons=3),
    ModelSpec(dim=6, experts=5, neurons=3, gated=True, classes=3, taken=3),
    ModelSpec(dim=6, experts=4, neurons=4, routing="token_choice", votes="neuron"),
]


def mixture_of(spec: ModelSpec, seed: int = 0) -> Mixture:
    found = init_mixture(jax.random.key(seed), spec, 0.7)
    rng = np.random.default_rng(seed)
    return found.replace(down=found.down * jnp.asarray(rng.uniform(0.5, 2, found.down.shape), jnp.float32))


def by_loops(mixture: Mixture, x: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """One sequence `[tokens, dim]`, expert by expert and token by token."""
    m = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), mixture)
    logits = x @ m.router
    weight = np.zeros_like(logits)
    if spec.routing == "expert_choice":
        for e in range(spec.experts):
            taken = np.argsort(-logits[:, e], kind="stable")[: spec.taken]
            powers = np.exp(logits[taken, e])
            weight[taken, e] = powers / powers.sum()
    else:
        for t in range(len(x)):
            probability = np.exp(logits[t]) / np.exp(logits[t]).sum()
            for e in np.argsort(-logits[t], kind="stable")[: spec.taken]:
                weight[t, e] = probability[e]
    out = np.zeros(spec.outputs)
    for t, token in enumerate(x):
        for e in range(spec.experts):
            up = token @ m.up[e]
            if spec.gated:
                gate = token @ m.gate[e]
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                hidden = np.maximum(up, 0)
            out += weight[t, e] * (hidden @ m.down[e])
    return out


@pytest.mark.parametrize("spec", SPECS, ids=["plain", "gated", "token choice"])
def test_outputs_are_those_of_loops(spec: ModelSpec) -> None:
    mixture = mixture_of(spec)
    x = np.random.default_rng(1).normal(size=(7, 5, 6))
    found = forward(mixture, Tokens(jnp.asarray(x, jnp.float32), None), spec)
    wanted = np.stack([by_loops(mixture, one.astype(np.float32).astype(np.float64), spec) for one in x])
    np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=2e-5)
    # Looked up in a table of different tokens they are the same.
    ids = np.random.default_rng(2).integers(0, 5, (7, 5))
    table = jnp.asarray(x[0], jnp.float32)
    whole = forward(mixture, Tokens(table[ids], None), spec)
    np.testing.assert_allclose(forward(mixture, Tokens(table, jnp.asarray(ids)), spec), whole, rtol=1e-5, atol=1e-6)


def test_weights_of_routing() -> None:
    spec = SPECS[0]
    x = Tokens(jnp.asarray(np.random.default_rng(3).normal(size=(9, 8, 6)), jnp.float32), None)
    weights = np.asarray(routing_weights(mixture_of(spec).router, x, spec))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-6)
    assert ((weights > 0).sum(axis=1) == 2).all()
    by_token = np.asarray(routing_weights(mixture_of(SPECS[2]).router, x, SPECS[2]))
    assert ((by_token > 0).sum(axis=2) == 2).all() and (by_token.sum(axis=2) < 1).all()


def test_ties_go_to_the_lower_index() -> None:
    spec = ModelSpec(dim=2, experts=1)
    x = Tokens(jnp.ones((1, 4, 2), jnp.float32), None)
    weights = routing_weights(jnp.ones((2, 1), jnp.float32), x, spec)
    np.testing.assert_allclose(weights[0, :, 0], [0.5, 0.5, 0, 0])


def test_a_lookup_and_its_gradient() -> None:
    table = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3, 2)), jnp.float32)
    ids = jnp.asarray([[0, 4, 4], [2, 0, 0]])
    np.testing.assert_array_equal(lookup(table, ids), np.asarray(table)[np.asarray(ids)])
    slope = jax.grad(lambda t: lookup(t, ids).sum())(table)
    np.testing.assert_array_equal(slope[:, 0, 0], [3, 0, 1, 0, 2])


def test_votes() -> None:
    two = fixed_votes(ModelSpec(experts=4, neurons=3))
    np.testing.assert_array_equal(two[:, :, 0], np.array([[-1.0], [1], [-1], [1]]) * np.ones((1, 3)))
    turns = fixed_votes(ModelSpec(experts=2, neurons=3, votes="neuron"))[:, :, 0]
    np.testing.assert_array_equal(turns, [[-1, 1, -1], [1, -1, 1]])
    three = fixed_votes(ModelSpec(experts=3, neurons=1, classes=3))[:, 0]
    np.testing.assert_allclose(three, [[1, -0.5, -0.5], [-0.5, 1, -0.5], [-0.5, -0.5, 1]])


def test_margins() -> None:
    np.testing.assert_array_equal(margins(jnp.asarray([[2.0], [2.0]]), jnp.asarray([1, 0])), [2, -2])
    outputs = jnp.asarray([[1.0, 4.0, 2.5], [1.0, 4.0, 2.5]])
    np.testing.assert_array_equal(margins(outputs, jnp.asarray([1, 0])), [1.5, -3.0])


def test_scores_are_those_of_placement() -> None:
    spec = ModelSpec(dim=6, experts=5, neurons=3, gated=True, classes=3)
    mixture = mixture_of(spec)
    experts = FeedForward(gate=mixture.gate[None], up=mixture.up[None], down=mixture.down[None])
    moe = MoE(router=mixture.router[None], experts=experts)
    np.testing.assert_allclose(neuron_norm_scores(mixture), max_neuron_norm(moe)[0], rtol=1e-6)
    plain = mixture.replace(gate=None)
    up = np.linalg.norm(np.asarray(mixture.up), axis=1).max(axis=1)
    down = np.linalg.norm(np.asarray(mixture.down), axis=2).max(axis=1)
    np.testing.assert_allclose(neuron_norm_scores(plain), up * down, rtol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experts": 0}, "experts=0"), ({"routing": "both"}, "routing='both'"), ({"votes": "none"}, "votes='none'"),
        ({"routing": "token_choice", "taken": 9}, "taken=9"), ({"classes": 1}, "classes=1"),
    ],
)  # fmt: skip
def test_impossible_models(wrong, said: str) -> None:
    with pytest.raises(InputError, match=said):
        ModelSpec(**wrong)
