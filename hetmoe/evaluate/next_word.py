"""Next-word questions: the true word against three others that are about as frequent."""

from collections.abc import Sequence

import numpy as np

from hetmoe.evaluate.text import Windows

CHOICES = 4
NEIGHBOURS = 12  # wrong answers are drawn from this many words closest in frequency rank


def word_questions(windows: Windows, sources: Sequence[Windows], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Multiple-choice questions at every position whose next token is a whole word.

    Only words that are one token are asked for, so that all four answers are scored by their log-likelihood in the one
    pass that also gives the perplexity. Wrong answers are drawn (numpy PCG64, `seed`) from the `NEIGHBOURS` words
    nearest in frequency rank, frequencies being counted over `sources`.

    Args:
        windows: where questions are asked.
        sources: all text at hand.
        seed: of the choice of wrong answers.

    Returns:
        (choices int32 `[windows, seq, 4]`, the true next token first; asked bool `[windows, seq]`). Where nothing is
        asked, all choices are the true next token; nothing is asked of text with too few different one-token words.
    """
    targets = windows.tokens[:, 1:]
    spoken = np.concatenate([s.tokens[:, 1:][s.whole_word] for s in sources])
    words, counts = np.unique(spoken, return_counts=True)
    choices = np.repeat(targets[..., None], CHOICES, axis=-1).astype(np.int32)
    if len(words) <= NEIGHBOURS:
        return choices, np.zeros_like(windows.whole_word)
    order = np.argsort(-counts, kind="stable")
    words = words[order]
    rank = {int(word): position for position, word in enumerate(words)}
    rng = np.random.default_rng(seed)
    for place in zip(*np.nonzero(windows.whole_word), strict=True):
        own = rank[int(targets[place])]
        first = min(max(own - NEIGHBOURS // 2, 0), len(words) - NEIGHBOURS - 1)
        near = [i for i in range(first, first + NEIGHBOURS + 1) if i != own]
        choices[place][1:] = words[rng.choice(near, CHOICES - 1, replace=False)]
    return choices, windows.whole_word.copy()
