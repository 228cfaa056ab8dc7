"""Samplers: what a sequence consists of, and how often."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from hetmoe.errors import InputError
from theory.data import DataSpec, draw_sequences, embed, irrelevant_probabilities, level_probabilities, make_dictionary

KEY = jax.random.key(4)
MANY = 40_000


def agrees(counts: np.ndarray, probabilities: np.ndarray) -> bool:
    """Chi-squared; 1e-6 of right samplers would fail, at fixed keys none does."""
    wanted = np.asarray(probabilities, np.float64)
    return stats.chisquare(counts, wanted / wanted.sum() * counts.sum()).pvalue > 1e-6


@pytest.mark.parametrize("spec", [DataSpec(), DataSpec(classes=3, levels=3, patterns=20, zipf=1.2, sequence=5)])
def test_a_sequence_has_one_relevant_token_of_its_class_and_level(spec: DataSpec) -> None:
    probabilities = np.asarray(level_probabilities(0.2, spec.levels))
    drawn = jax.tree.map(np.asarray, draw_sequences(KEY, spec, jnp.asarray(probabilities), MANY))
    relevant = drawn.ids < spec.relevant
    assert drawn.ids.shape == (MANY, spec.sequence) and (relevant.sum(axis=1) == 1).all()
    np.testing.assert_array_equal(drawn.ids[relevant], drawn.label * spec.levels + drawn.level)
    assert agrees(np.bincount(drawn.label), np.ones(spec.classes))
    assert agrees(np.bincount(drawn.level), probabilities)
    assert agrees(np.bincount(relevant.argmax(axis=1)), np.ones(spec.sequence))
    others = np.bincount(drawn.ids[~relevant] - spec.relevant, minlength=spec.patterns - spec.relevant)
    assert agrees(others, irrelevant_probabilities(spec))
    assert drawn.ids.max() == spec.patterns - 1
    # Label, level, position and other tokens do not depend on each other: correlations of MANY pairs.
    parts = [drawn.label, drawn.level, relevant.argmax(axis=1), drawn.ids.max(axis=1)]
    off = np.corrcoef(np.stack(parts))[np.triu_indices(4, 1)]
    assert (np.abs(off) < 5 / np.sqrt(MANY)).all()


def test_zipf() -> None:
    found = irrelevant_probabilities(DataSpec(patterns=7, zipf=1.0))
    np.testing.assert_allclose(found, np.array([1, 1 / 2, 1 / 3]) / (1 + 1 / 2 + 1 / 3))
    np.testing.assert_allclose(irrelevant_probabilities(DataSpec()), np.full(28, 1 / 28))


def test_levels() -> None:
    np.testing.assert_allclose(level_probabilities(0.1, 2), [0.9, 0.1], rtol=1e-6)
    np.testing.assert_allclose(level_probabilities(0.25, 3), [0.75, 0.1875, 0.0625], rtol=1e-6)
    np.testing.assert_allclose(level_probabilities(0.3, 1), [1.0])


def test_the_dictionary() -> None:
    plain = np.asarray(make_dictionary(KEY, DataSpec()), np.float64)
    np.testing.assert_allclose(plain @ plain.T, np.eye(32), atol=1e-5)
    overlap, patterns = 0.5, 128
    mixed = np.asarray(make_dictionary(KEY, DataSpec(patterns=patterns, overlap=overlap)), np.float64)
    products = mixed @ mixed.T
    np.testing.assert_allclose(np.diag(products), 1, rtol=1e-5)
    found = products[np.triu_indices(patterns, 1)].std()
    wanted = np.sqrt((2 * overlap**2 + overlap**4) / patterns) / (1 + overlap**2)
    assert abs(found / wanted - 1) < 0.05  # 8,128 products: a standard error of 0.8 %, and lengths vary by a few %


def test_noise_of_tokens() -> None:
    spec = DataSpec(token_noise=0.3)
    dictionary = make_dictionary(KEY, spec)
    ids = jnp.arange(32).reshape(4, 8)
    noisy, plain = embed(KEY, dictionary, ids, spec), embed(KEY, dictionary, ids, DataSpec())
    assert noisy.ids is None and noisy.inputs.shape == (4, 8, 32)
    np.testing.assert_array_equal(plain.inputs[plain.ids], dictionary[ids])
    off = np.asarray(noisy.inputs - dictionary[ids])
    size = np.square(off).sum(axis=-1)
    assert abs(size.mean() - 0.09) < 5 * size.std() / np.sqrt(size.size)
    assert np.abs(np.corrcoef(off.reshape(32, 32))[np.triu_indices(32, 1)]).max() < 0.8  # no two tokens share theirs


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"classes": 1}, "classes=1"), ({"levels": 0}, "levels=0"), ({"levels": 4}, "levels=4"),
        ({"sequence": 1}, "sequence=1"), ({"patterns": 4}, "patterns=4"), ({"zipf": -1.0}, "zipf=-1.0"),
        ({"token_noise": float("nan")}, "token_noise=nan"), ({"overlap": float("inf")}, "overlap=inf"),
    ],
)  # fmt: skip
def test_impossible_data(wrong, said: str) -> None:
    with pytest.raises(InputError, match=said):
        DataSpec(**wrong)
