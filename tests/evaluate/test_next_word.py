"""Next-word questions: right answer first, wrong answers of matched frequency."""

import numpy as np

from hetmoe.evaluate.next_word import CHOICES, NEIGHBOURS, word_questions
from hetmoe.evaluate.text import Windows


def corpus(seed: int = 0) -> Windows:
    """Words 100..139 with falling frequency between other tokens."""
    rng = np.random.default_rng(seed)
    p = 1 / np.arange(1, 41)
    tokens = np.where(rng.random((50, 65)) < 0.5, 100 + rng.choice(40, (50, 65), p=p / p.sum()), 7).astype(np.int32)
    return Windows(tokens=tokens, byte_count=np.ones((50, 64), int), whole_word=tokens[:, 1:] >= 100)


def test_true_word_first_and_three_different_wrong_ones() -> None:
    windows = corpus()
    choices, asked = word_questions(windows, [windows], 0)
    np.testing.assert_array_equal(choices[..., 0], windows.tokens[:, 1:])
    np.testing.assert_array_equal(asked, windows.tokens[:, 1:] >= 100)
    assert all(len(set(row)) == CHOICES and min(row) >= 100 for row in choices[asked].tolist())
    assert (choices[~asked] == 7).all()


def test_wrong_answers_are_close_in_frequency_rank() -> None:
    windows = corpus()
    choices, asked = word_questions(windows, [windows], 0)
    counts = np.bincount(windows.tokens[:, 1:][asked], minlength=140)
    rank = np.empty(140, int)
    rank[np.argsort(-counts, kind="stable")] = np.arange(140)
    distance = np.abs(rank[choices[asked][:, 1:]] - rank[choices[asked][:, :1]])
    assert distance.max() <= NEIGHBOURS  # all of the nearest at the ends of the list
    middle = (rank[choices[asked][:, 0]] > NEIGHBOURS) & (rank[choices[asked][:, 0]] < 40 - NEIGHBOURS)
    assert distance[middle].max() <= NEIGHBOURS // 2
    # Uniform over the neighbours: the mean signed distance vanishes within 5 standard errors of +-NEIGHBOURS / 2.
    signed = (rank[choices[asked][:, 1:]] - rank[choices[asked][:, :1]])[middle]
    assert abs(signed.mean()) < 5 * NEIGHBOURS / np.sqrt(12 * signed.size)


def test_questions_follow_the_seed() -> None:
    windows = corpus()
    first, again, other = (word_questions(windows, [windows], seed)[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_nothing_is_asked_of_text_with_too_few_words() -> None:
    tokens = np.full((1, 9), 100, np.int32)
    windows = Windows(tokens=tokens, byte_count=np.ones((1, 8), int), whole_word=np.ones((1, 8), bool))
    choices, asked = word_questions(windows, [windows], 0)
    assert not asked.any()
    np.testing.assert_array_equal(choices, np.full((1, 8, 4), 100))
