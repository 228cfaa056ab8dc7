"""Expected loss increase of quantized experts against gradients of every label, and what a budget makes of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.models.model import Model
from hetmoe.models.transformer import forward
from hetmoe.quantize.budget import EXPERT_MATRICES, bits_within, expert_bytes
from hetmoe.quantize.expected_loss import _per_sequence, expected_increase
from hetmoe.quantize.grid import Grid, Quantized, dequantize
from tests.models.tiny import random_params, random_tokens, tiny_config

KEY = jax.random.key(3)
CONFIG = tiny_config(
    vocab_size=12, num_experts=4, hidden_size=32, expert_intermediate_size=32,
    num_layers=3, dense_layers=(0,), dense_intermediate_size=19,
)  # fmt: skip
LEVELS = (1, 2, 3, 4, 8)
WINDOW = random_tokens(CONFIG, 4, (1, 6))
WINDOWS = jnp.tile(WINDOW, (300, 1))  # each time other labels are sampled


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


@functools.cache
def enumerated():
    """(probabilities of all labels, derivatives of their logarithms by gate, up and down of every expert)."""
    model = made(CONFIG)
    experts = model.params.layers.moe.experts

    def log_probs(gate, up, down):
        return jax.nn.log_softmax(forward(replaced(model.params, gate=gate, up=up, down=down), WINDOW[:, :-1], CONFIG))

    arguments = (experts.gate, experts.up, experts.down)
    probabilities = np.exp(np.asarray(log_probs(*arguments), np.float64))
    return probabilities, jax.jit(jax.jacrev(log_probs, argnums=(0, 1, 2)))(*arguments)


@functools.cache
def estimated():
    model = made(CONFIG)
    return expected_increase(model, WINDOWS, quantized(model, LEVELS), key=KEY)


def test_parts_are_those_of_enumerated_labels() -> None:
    """The gradient g . d of the text's labels, and sampled labels against all labels by their probability."""
    model = made(CONFIG)
    found_at, found = quantized(model, LEVELS), estimated()
    probabilities, jacobians = enumerated()
    own = np.asarray(jax.nn.one_hot(WINDOW[:, 1:], CONFIG.vocab_size))
    d = changes(model, found_at)
    for matrix, level in np.ndindex(3, len(LEVELS)):
        j = np.asarray(jacobians[matrix])  # [1, positions, vocabulary, layers, experts, K, N]
        projected = np.einsum("...kn,...kn->...", j, d[matrix][level])
        gradient = -(own[..., None, None] * projected).sum(axis=(0, 1, 2)) / own[..., 0].size
        # Sums of 1,024 float32 products of either sign, times 5 tokens: 1e-5 of the largest.
        atol = 1e-5 * np.abs(gradient).max()
        np.testing.assert_allclose(found.gradient[..., matrix, level], gradient, rtol=1e-4, atol=atol)
        curvature = (probabilities[..., None, None] * projected**2).sum(axis=(0, 1, 2)) / (2 * own[..., 0].size)
        error = 4.5 * found.standard_error[..., matrix, level] + 1e-4 * curvature.max()
        assert np.all(np.abs(found.curvature[..., matrix, level] - curvature) <= error)
        assert np.all(error < 0.5 * curvature.max())  # else the comparison says nothing


def test_whole_experts_are_not_the_sum_of_their_matrices() -> None:
    """Changes of an expert's matrices act together: against all labels by their probability."""
    model = made(CONFIG)
    found_at, found = quantized(model, LEVELS), estimated()
    probabilities, jacobians = enumerated()
    d = changes(model, found_at)
    for level in range(len(LEVELS)):
        projected = sum(np.einsum("...kn,...kn->...", np.asarray(j), d[m][level]) for m, j in enumerate(jacobians))
        curvature = (probabilities[..., None, None] * projected**2).sum(axis=(0, 1, 2)) / (2 * 5)
        used = curvature > 0  # by a token of the text
        assert used.sum() >= 4 and not found.expert_curvature[~used, level].any()
        # Means of 300 squares: a standard error is 8 % for Gaussian projections, 20 % for a label that is drawn rarely.
        np.testing.assert_allclose(found.expert_curvature[used, level], curvature[used], rtol=0.6)
        assert np.abs(found.expert_curvature[used, level] / curvature[used] - 1).mean() < 0.2
        added = found.curvature[..., level].sum(axis=2)[used]
        assert np.abs(added / found.expert_curvature[used, level] - 1).max() > 0.05  # matrices do interact


def test_sequences_are_averaged() -> None:
    model, other = made(CONFIG), random_tokens(CONFIG, 5, (1, 6))
    found_at = quantized(model, LEVELS)
    of_one, of_other, of_both = (
        expected_increase(model, windows, found_at, key=KEY)
        for windows in (WINDOWS, jnp.tile(other, (300, 1)), jnp.tile(jnp.concatenate([WINDOW, other]), (150, 1)))
    )
    mean = (of_one.gradient + of_other.gradient) / 2
    np.testing.assert_allclose(of_both.gradient, mean, rtol=1e-4, atol=1e-6 * np.abs(mean).max())
    keys, levels = jax.random.split(KEY, 300), {name: tuple(found_at[name]) for name in EXPERT_MATRICES}
    sampled, own = _per_sequence(model.params, WINDOWS, keys, levels, CONFIG)
    per_token = np.asarray(own["up"], np.float64) / 5 + np.asarray(sampled["up"], np.float64) ** 2 / 10
    np.testing.assert_allclose(of_one.standard_error[..., 1, :], per_token.std(0, ddof=1) / np.sqrt(300), atol=1e-12)
    np.testing.assert_allclose(of_one.total[..., 1, :], per_token.mean(0), atol=1e-12)
    np.testing.assert_allclose(of_both.total, of_both.gradient + of_both.curvature)


def test_a_finer_grid_costs_less_and_the_budget_is_kept() -> None:
    found = estimated()
    assert np.all(found.curvature >= 0)
    assert np.all(np.diff(found.curvature.sum(axis=(0, 1, 2))) < 0)
    sizes = expert_bytes(CONFIG, [Grid(bits=b, group=32, symmetric=True) for b in LEVELS])
    plan = bits_within(found.curvature, sizes, LEVELS, int(8 * sizes[:, 2].sum()))
    assert plan.stored <= 8 * sizes[:, 2].sum() and plan.gap == 0
    assert plan.increase < found.curvature[..., 2].sum()  # better than 3 bits everywhere


def test_bad_input_is_refused() -> None:
    model, windows = made(CONFIG), WINDOWS
    fine = quantized(model, LEVELS)
    other = jax.tree.map(lambda leaf: leaf[:, :2], fine["up"])
    for text, given, message in (
        (windows[:1], fine, "at least 2"),
        (windows[:, :1], fine, "at least 2"),
        (windows + 12, fine, "vocabulary"),
        (windows, {"gate": fine["gate"]}, "quantized holds gate: give gate, up, down"),
        (windows, fine | {"up": fine["up"] * 2}, "same levels"),
        (windows, {name: [] for name in EXPERT_MATRICES}, "at least one"),
        (windows, fine | {"up": other}, r"quantized up has the shape \[2, 2, 32, 32\], not \[2, 4, 32, 32\]"),
    ):
        with pytest.raises(InputError, match=message):
            expected_increase(model, text, given, key=KEY)
    broken = replaced(model.params, gate=model.params.layers.moe.experts.gate.at[0, 0, 0, 0].set(jnp.nan))
    with pytest.raises(InputError, match="not finite"):
        expected_increase(dataclasses.replace(model, params=broken), windows, fine, key=KEY)
