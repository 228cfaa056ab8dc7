"""How far routing decisions are from ties, in float64 numpy, and tokens whose decisions are far from them."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Float = npt.NDArray[np.floating[Any]]
Int = npt.NDArray[np.integer[Any]]


def consecutive_gap(values: Float, first: int, last: int) -> Float:
    """Least difference of neighbours among the ranks `first` to `last` (best = 0) of the last axis."""
    ranked = np.sort(values, axis=-1)[..., ::-1]
    return np.min(-np.diff(ranked[..., first : last + 1]), axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
    """How experts are chosen: the best `top_k` of the best `top_groups` of `groups` groups of neighbours.

    Scores are softmax probabilities, where a group is as good as its best expert, or sigmoids plus a bias, where a
    group is as good as its two best experts together.
    """

    kind: Literal["softmax", "sigmoid"] = "softmax"
    top_k: int
    groups: int = 1
    top_groups: int = 1

    def scores(self, logits: Float, bias: Float | None) -> Float:
        """What is compared, `[..., experts]`."""
        logits = logits.astype(np.float64)
        if self.kind == "sigmoid":
            sigmoids = 1 / (1 + np.exp(-logits))
            return sigmoids if bias is None else sigmoids + bias
        exp = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exp / exp.sum(axis=-1, keepdims=True)

    def group_scores(self, scores: Float) -> Float:
        """`[..., groups]`."""
        grouped = np.sort(scores.reshape(*scores.shape[:-1], self.groups, -1), axis=-1)
        return grouped[..., -1] if self.kind == "softmax" else grouped[..., -2:].sum(axis=-1)

    def allowed(self, scores: Float) -> npt.NDArray[np.bool_]:
        """Which experts belong to one of the best groups, `[..., experts]`."""
        ranks = np.argsort(np.argsort(-self.group_scores(scores), axis=-1), axis=-1)
        return np.repeat(ranks < self.top_groups, scores.shape[-1] // self.groups, axis=-1)

    def choose(self, logits: Float, bias: Float | None) -> Int:
        """The chosen experts, best first, `[..., top_k]`."""
        scores = self.scores(logits, bias)
        masked = np.where(self.allowed(scores), scores, -np.inf)
        return np.argsort(-masked, axis=-1, kind="stable")[..., : self.top_k]

    def gaps(self, logits: Float, bias: Float | None) -> Float:
        """Distance of each decision `[...]` from the nearest tie, ranks within the choice included.

        The least of: the score of the last group taken less that of the first not taken; the differences of
        neighbours among the best `top_k + 1` experts of the groups taken, in score and, for softmax, in logit too.
        """
        scores = self.scores(logits, bias)
        allowed = self.allowed(scores)
        compared = [scores, logits.astype(np.float64)] if self.kind == "softmax" else [scores]
        found = [consecutive_gap(np.where(allowed, values, -np.inf), 0, self.top_k) for values in compared]
        if self.groups > self.top_groups:
            found.append(consecutive_gap(self.group_scores(scores), self.top_groups - 1, self.top_groups))
        return np.minimum.reduce(found)


def choose_tokens(
    gaps: Callable[[npt.NDArray[np.int32]], Float], shape: tuple[int, int], vocab: int, seed: int, least: float
) -> npt.NDArray[np.int32]:
    """Random tokens of which every routing decision is farther than `least` from a tie.

    Token after token: the first of a random order of the vocabulary that keeps its sequence's gap large enough.

    Args:
        gaps: least gap of each of the sequences `[N, t]`.
        shape: sequences and length.
        vocab: size of the vocabulary.
        seed: of the orders.
        least: the gap to exceed.
    """
    rng = np.random.default_rng(seed)
    rows = np.zeros(shape, np.int32)
    for row in rows:
        for position in range(shape[1]):
            for some in np.array_split(rng.permutation(vocab).astype(np.int32), vocab // 4):
                candidates = np.column_stack([np.tile(row[:position], (len(some), 1)), some])
                good = gaps(candidates) > least
                if good.any():
                    row[position] = some[np.argmax(good)]
                    break
            else:
                raise RuntimeError(f"no token keeps every gap above {least} at position {position}")
    return rows
