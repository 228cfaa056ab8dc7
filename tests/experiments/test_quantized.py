"""What the experiments on quantized experts share, against the library's own quantized models and numbers by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import quantized
from hetmoe.errors import InputError
from hetmoe.evaluate.run import evaluate_digital, loss_batches, make_batches
from hetmoe.models.model import Model
from hetmoe.models.transformer import forward
from hetmoe.quantize.allocation import BitRule, allocate
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.order import by_router_norm
from hetmoe.quantize.recipe import Recipe
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_experts=4, hidden_size=32, expert_intermediate_size=64, num_layers=2)
MODEL = Model(params=random_params(CONFIG, 0), config=CONFIG, tokenizer=None, eos_token_id=0, name="tiny")
RTN = Recipe(method="rtn", group=32)
LEVELS = (1, 2, 3)
BITS = np.random.default_rng(0).choice(LEVELS, (2, 4, 3))


@pytest.mark.slow
def test_a_plain_model_is_the_quantized_one() -> None:
    params = quantized.Quantizer(MODEL, RTN, LEVELS, None).params(BITS)
    model, _ = quantize_experts(MODEL, BITS, RTN)
    for name, w in vars(quantized.plain(model)).items():
        np.testing.assert_array_equal(getattr(params.layers.moe.experts, name), w)
    tokens = random_tokens(CONFIG, 1, (2, 8))
    # The same float32 weights; only sums may be in another order: 64 terms of logits of about 1.
    np.testing.assert_allclose(
        forward(params, tokens, CONFIG), forward(model.params, tokens, CONFIG), rtol=1e-5, atol=1e-5
    )


def test_parts_make_the_whole_text() -> None:
    tokens = np.asarray(random_tokens(CONFIG, 2, (8, 9)))
    rng = np.random.default_rng(1)
    choices = np.stack([tokens[:, 1:], *(rng.integers(0, CONFIG.vocab_size, (3, 8, 8)))], axis=-1).astype(np.int32)
    asked = rng.random((8, 8)) < 0.5
    batches = make_batches(_Windows(tokens), choices, asked, 8)
    found, whole = quantized.score(MODEL.params, batches, MODEL), evaluate_digital(MODEL.params, batches, CONFIG)
    assert found.nll.shape == (2,)
    assert found.perplexity == pytest.approx(np.exp(float(whole.nll) / 64), rel=1e-5)
    assert found.accuracy == pytest.approx(float(whole.correct) / asked.sum())
    with pytest.raises(InputError, match="parts of 4 windows"):
        quantized.score(MODEL.params, loss_batches(tokens[:6], 4), MODEL)


class _Windows:
    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens


def test_differences_are_paired_by_part() -> None:
    a = quantized.Score(nll=np.array([1.0, 2.0]), correct=np.array([3.0, 5.0]), questions=10)
    b = quantized.Score(nll=np.array([0.5, 1.5]), correct=np.array([2.0, 3.0]), questions=10)
    assert a.more_loss(b).mean == pytest.approx(0.5)
    assert a.more_loss(b).standard_error == 0
    assert a.more_correct(b).mean == pytest.approx(0.3) == pytest.approx(a.accuracy - b.accuracy)
    both = quantized.mean_score([a, b])
    assert both.perplexity == pytest.approx(np.sqrt(a.perplexity * b.perplexity))
    assert both.accuracy == pytest.approx(0.65)


@pytest.mark.slow
def test_allocations_are_those_of_the_library() -> None:
    key, windows = jax.random.key(1), random_tokens(CONFIG, 3, (6, 9))
    rule = {"average": 2.0, "levels": LEVELS, "zeta": None}
    wanted = allocate(MODEL, BitRule(rule="expected_loss", **rule), RTN, key=key, windows=windows).bits
    curvature = quantized.increases(MODEL, RTN, windows, (1, 2, 3, 4), key).curvature
    found = quantized.least_loss(MODEL, curvature, (1, 2, 3, 4), LEVELS, 2.0)
    np.testing.assert_array_equal(found, wanted)
    assert np.ptp(found) == 2  # no trivial answer
    wanted = allocate(MODEL, BitRule(rule="router_norm", **rule), RTN, key=key).bits
    order = by_router_norm(MODEL.params.layers.moe.router)
    np.testing.assert_array_equal(quantized.in_order(order, 2.0, LEVELS, "paper"), wanted)


def test_the_reference_model_has_its_initial_routers() -> None:
    router = quantized.initial_router("reference")
    assert router.shape == (4, 128, 32)
    assert router.dtype == jnp.float32
    # Columns of normal numbers: norms are alike, and no column is all zero.
    norms = np.linalg.norm(np.asarray(router), axis=1)
    assert norms.min() > 0.7 * norms.mean()
