"""Expected loss increase of quantized experts against full gradients, an enumerated Fisher matrix and a real change."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.transformer import forward
from hetmoe.quantize.budget import EXPERT_MATRICES, bits_within, expert_bytes
from hetmoe.quantize.expected_loss import expected_increase
from hetmoe.quantize.grid import Grid, Quantized, dequantize
from tests.models.tiny import random_params, random_tokens, tiny_config

KEY = jax.random.key(3)
SMALL = {"vocab_size": 12, "num_experts": 4, "hidden_size": 32, "expert_intermediate_size": 32}


def made(config, seed=0):
    params = random_params(config, seed)
    return Model(params=params, config=config, tokenizer=None, eos_token_id=0, name="tiny")


def rounded(w, bits):
    """Round to nearest on a symmetric grid of 32 rows, in numpy."""
    *lead, rows, columns = w.shape
    grouped = np.asarray(w, np.float64).reshape(*lead, rows // 32, 32, columns)
    largest = 2**bits - 1
    scale = (2 * np.abs(grouped).max(axis=-2) / largest).astype(np.float16)
    codes = np.rint(grouped / scale[..., None, :].astype(np.float64) + largest / 2).clip(0, largest)
    return Quantized(
        codes=jnp.asarray(codes.reshape(w.shape), jnp.uint8),
        scale=jnp.asarray(scale),
        zero=None,
        grid=Grid(bits=bits, group=32, symmetric=True),
    )


def quantized(model, levels):
    experts = model.params.layers.moe.experts
    return {name: [rounded(getattr(experts, name), bits) for bits in levels] for name in EXPERT_MATRICES}


def changes(model, found):
    """`[matrix][level]` changes of weights, float64."""
    experts = model.params.layers.moe.experts
    return [
        [np.asarray(dequantize(q), np.float64) - np.asarray(getattr(experts, n), np.float64) for q in found[n]]
        for n in EXPERT_MATRICES
    ]


def replaced(params, **matrices):
    moe = params.layers.moe
    moe = dataclasses.replace(moe, experts=dataclasses.replace(moe.experts, **matrices))
    return dataclasses.replace(params, layers=dataclasses.replace(params.layers, moe=moe))


def test_gradient_part_is_the_gradient_times_the_change() -> None:
    config = tiny_config(**SMALL, num_layers=3, dense_layers=(0,), dense_intermediate_size=19)
    model, windows, levels = made(config), random_tokens(config, 1, (3, 12)), (1, 4)
    found_at = quantized(model, levels)

    def loss(gate, up, down):
        params = replaced(model.params, gate=gate, up=up, down=down)
        log_probs = jax.nn.log_softmax(forward(params, windows[:, :-1], config))
        return -jnp.mean(jnp.take_along_axis(log_probs, windows[:, 1:, None], axis=-1))

    experts = model.params.layers.moe.experts
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(experts.gate, experts.up, experts.down)
    d = changes(model, found_at)
    expected = [
        [(np.asarray(g, np.float64) * d[m][i]).sum(axis=(-2, -1)) for i in range(2)] for m, g in enumerate(gradients)
    ]
    found = expected_increase(model, windows, found_at, key=KEY)
    # Sums of 1,024 float32 products of either sign, of three sequences: 1e-5 of the largest.
    expected = np.moveaxis(np.array(expected), (0, 1), (2, 3))
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    assert found.gradient.shape == (2, 4, 3, 2) and np.all(np.abs(expected).max(axis=(0, 1)) > 0)


def test_curvature_is_that_of_the_fisher_matrix() -> None:
    """The same window many times over: the mean of the sampled labels against all labels enumerated."""
    config = tiny_config(**SMALL)
    model, window = made(config), random_tokens(config, 2, (1, 6))
    found_at = quantized(model, (2, 3))
    found = expected_increase(model, jnp.repeat(window, 300, axis=0), found_at, key=KEY)
    experts = model.params.layers.moe.experts

    def log_probs(gate, up, down):
        return jax.nn.log_softmax(forward(replaced(model.params, gate=gate, up=up, down=down), window[:, :-1], config))

    arguments = (experts.gate, experts.up, experts.down)
    probabilities = np.exp(np.asarray(log_probs(*arguments)[0], np.float64))
    jacobians = jax.jit(jax.jacrev(log_probs, argnums=(0, 1, 2)))(*arguments)
    d = changes(model, found_at)
    for matrix, level in np.ndindex(3, 2):
        j = np.asarray(jacobians[matrix][0], np.float64)  # [positions, vocabulary, layers, experts, K, N]
        projected = (j * d[matrix][level]).sum(axis=(-2, -1))
        expected = (probabilities[..., None, None] * projected**2).sum(axis=(0, 1)) / (2 * 5)
        error = 4.5 * found.standard_error[..., matrix, level] + 1e-4 * expected.max()
        assert np.all(np.abs(found.curvature[..., matrix, level] - expected) <= error)
        assert np.all(error < 0.5 * expected.max())  # else the comparison says nothing


def test_a_finer_grid_costs_less_and_the_budget_is_kept() -> None:
    config = tiny_config(**SMALL)
    model, windows, levels = made(config), random_tokens(config, 4, (8, 9)), (1, 2, 3, 4, 8)
    found = expected_increase(model, windows, quantized(model, levels), key=KEY)
    assert found.curvature.shape == (1, 4, 3, 5) and np.all(found.curvature >= 0)
    assert np.all(np.diff(found.curvature.sum(axis=(0, 1, 2))) < 0)
    sizes = expert_bytes(config, levels, group=32, symmetric=True)
    plan = bits_within(found.curvature, sizes, levels, int(4 * sizes[:, 2].sum()))
    assert plan.stored <= 4 * sizes[:, 2].sum() and plan.gap == 0
    assert plan.increase < found.curvature[..., 2].sum()  # better than 3 bits everywhere


def test_bad_input_is_refused() -> None:
    config = tiny_config(**SMALL)
    model, windows = made(config), random_tokens(config, 4, (8, 9))  # as above: compiled once
    fine = quantized(model, (1, 2, 3, 4, 8))
    other = jax.tree.map(lambda leaf: leaf[:, :2], fine["up"])
    for text, given, message in (
        (windows[:1], fine, "at least 2"),
        (windows[:, :1], fine, "at least 2"),
        (windows + 12, fine, "vocabulary"),
        (windows, {"gate": fine["gate"]}, "quantized holds gate: give gate, up, down"),
        (windows, fine | {"up": fine["up"] * 2}, "same levels"),
        (windows, {name: [] for name in EXPERT_MATRICES}, "at least one"),
        (windows, fine | {"up": other}, r"quantized up has the shape \[1, 2, 32, 32\], not \[1, 4, 32, 32\]"),
    ):
        with pytest.raises(InputError, match=message):
            expected_increase(model, text, given, key=KEY)
    broken = replaced(model.params, gate=model.params.layers.moe.experts.gate.at[0, 0, 0, 0].set(jnp.nan))
    with pytest.raises(InputError, match="not finite"):
        expected_increase(dataclasses.replace(model, params=broken), windows, fine, key=KEY)
