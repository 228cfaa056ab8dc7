"""Loads of experts against binomial sums, Monte Carlo and counting by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hetmoe.errors import InputError
from hetmoe.hardware.routing import (
    check_frequency,
    counted_experts,
    distinct_experts,
    largest_load,
    stack_routings,
    step_routing,
    uniform_frequency,
)
from hetmoe.hardware.routing_file import load_routing, observe_routing, save_routing
from hetmoe.models.model import Model, model_fingerprint
from tests.models.tiny import random_params, random_tokens, tiny_config


def shares(seed: int, layers: int = 2, experts: int = 8, top: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.minimum(rng.dirichlet(np.ones(experts) * 2, size=layers) * top, 0.95)


def test_few_tokens_are_exact() -> None:
    f, tokens = shares(0), 7
    step = step_routing(f, tokens)
    np.testing.assert_allclose(step.copies, tokens * f, rtol=1e-6)
    np.testing.assert_allclose(step.touched, 1 - (1 - f) ** tokens, rtol=1e-6)
    np.testing.assert_allclose(distinct_experts(f, tokens), np.sum(1 - (1 - f) ** tokens, axis=1), rtol=1e-12)
    among = np.array([[1, 1, 0, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0, 0, 0]])
    expected = [
        sum(1 - np.prod([stats.binom.cdf(m, tokens, p) for p in row[flags == 1]]) for m in range(tokens))
        for row, flags in zip(f, among, strict=True)
    ]
    np.testing.assert_allclose(largest_load(step, jnp.asarray(among, jnp.float32)), expected, rtol=1e-5)
    assert float(expected[1]) == pytest.approx(tokens * f[1, 3])  # of one expert it is the mean


@pytest.mark.parametrize("tokens", [300, 3000])
def test_many_tokens_are_interpolated_well(tokens: int) -> None:
    """Against 40,000 draws: the standard error of the mean is below 0.3 % of one standard deviation of a load."""
    f = shares(1)
    rng = np.random.default_rng(2)
    largest = rng.binomial(tokens, f, size=(40_000, *f.shape)).max(axis=2)
    found = np.asarray(largest_load(step_routing(f, tokens), jnp.ones(f.shape)))
    error = largest.std(axis=0) / np.sqrt(len(largest))
    # Levels lie up to 12 copies apart, where a load's standard deviation is 26: 1e-3 of the mean covers it.
    np.testing.assert_array_less(np.abs(found - largest.mean(axis=0)), 5 * error + 1e-3 * largest.mean(axis=0))


def test_an_expert_that_every_token_chooses_gets_all_of_them() -> None:
    f = np.zeros((1, 4))
    f[0, 2] = 1.0
    step = step_routing(f, 9)
    np.testing.assert_allclose(step.touched, [[0, 0, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(largest_load(step, jnp.ones((1, 4))), [9.0], rtol=1e-6)
    np.testing.assert_allclose(largest_load(step, jnp.asarray([[1.0, 1.0, 0.0, 1.0]])), [0.0], atol=1e-6)


def test_stacked_steps_are_the_steps() -> None:
    f = shares(3)
    steps = [step_routing(f, tokens) for tokens in (1, 4, 500)]
    stacked = stack_routings(steps)
    among = jnp.ones(f.shape)
    for index, step in enumerate(steps):
        one = type(step)(
            **{n: getattr(stacked, n)[index] for n in ("tokens", "copies", "touched", "log_below", "weights")}
        )
        np.testing.assert_allclose(largest_load(one, among), largest_load(step, among), rtol=1e-6)


def test_counting_by_hand() -> None:
    # 1 layer, 4 windows, 2 positions, 1 copy.
    chosen = np.array([[[[0], [3]], [[0], [1]], [[2], [1]], [[2], [1]]]])
    for batch, distinct, busiest in (
        (1, 1.0, 1.0),
        (2, (1 + 2 + 1 + 1) / 4, (2 + 1 + 2 + 2) / 4),
        (4, 2.0, (2 + 3) / 2),
    ):
        found = counted_experts(chosen, batch)
        assert (found[0].tolist(), found[1].tolist()) == ([distinct], [busiest])
    with pytest.raises(InputError, match="batch=5"):
        counted_experts(chosen, 5)


def test_statistics_of_a_text_are_those_of_its_routing_and_are_kept(tmp_path) -> None:
    config = tiny_config(num_layers=2)
    model = Model(params=random_params(config, 0), config=config, tokenizer=None, eos_token_id=None, name="tiny")
    tokens = np.asarray(random_tokens(config, 1, (20, 6)))  # more than run at once
    found = observe_routing(model, tokens)
    from hetmoe.models.transformer import hidden_states

    routing = hidden_states(model.params, jnp.asarray(tokens), config)[1].chosen.reshape(2, -1)
    counts = [np.bincount(np.asarray(row), minlength=8) for row in routing]
    np.testing.assert_allclose(found.frequency, np.array(counts) / tokens.size, rtol=1e-12)
    assert [c.batch for c in found.counted] == [1, 2, 4, 8, 16] and found.tokens == 120
    assert found.counted[0].distinct == (2.0, 2.0)
    save_routing(tmp_path / "r.json", found, name="tiny", identity=model_fingerprint(model), text="t")
    back = load_routing(tmp_path / "r.json", config, model_fingerprint(model))
    np.testing.assert_allclose(back.frequency, found.frequency, rtol=1e-6)
    assert back.counted == found.counted
    with pytest.raises(InputError, match=r"routing of 'tiny' .* not of this model"):
        load_routing(tmp_path / "r.json", config, "another")
    with pytest.raises(InputError, match=r"\[2, 8\] must be shares in \[0, 1\], \[1, 8\]|number for each layer"):
        load_routing(tmp_path / "r.json", tiny_config(), None)
    (tmp_path / "r.json").write_text('{"format": "hetmoe-routing-1"}')
    with pytest.raises(InputError, match="malformed"):
        load_routing(tmp_path / "r.json", config, None)
    (tmp_path / "r.json").write_text("{}")
    with pytest.raises(InputError, match="not a file of routing statistics"):
        load_routing(tmp_path / "r.json", config, None)


def test_bad_shares_are_refused() -> None:
    config = tiny_config()
    assert uniform_frequency(config).sum() == 2
    for frequency, message in (
        (np.full((1, 7), 0.25), r"\[1, 7\] must be shares"), (np.full((1, 8), 1.25), "must be shares"),
        (np.full((1, 8), np.nan), "must be shares"), (np.full((1, 8), 0.5), "sums to 4; a token chooses 2"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            check_frequency(frequency, config)
    for tokens in (0, 1.5):
        with pytest.raises(InputError, match="tokens="):
            step_routing(uniform_frequency(config), tokens)
