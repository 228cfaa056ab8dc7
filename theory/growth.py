"""Growth of neurons along patterns, against what gradient descent predicts while the loss is linear.

While a loss is linear in the margin (hinge: every margin below 1), the expected step of a neuron w that votes for the
class of pattern v, and is active on it, has the component along v

    rate * slope * P(v) * G_v,     P(v) = probability(level) / classes,

where G_v is the mean weight that the expert gives v in sequences that hold it, and `slope` how much the loss falls per
unit of the neuron's activation. See README.md, step 2.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from theory.model import fixed_votes
from theory.specialisation import for_class
from theory.train import TrainSpec

STILL_LINEAR = 0.99  # share of sequences that must still be in the linear part of the loss


def loss_slope(spec: TrainSpec) -> float:
    """Minus the derivative of the loss by the activation of a neuron that votes for the label, at outputs of zero.

    Two classes: 1 of the hinge loss, 1/2 of the logistic one. More: of the hinge loss 1 + 1 / (classes - 1), its own
    vote and that of the class it is compared with; of the cross-entropy 1.
    """
    if spec.model.classes == 2:
        return 1.0 if spec.loss == "hinge" else 0.5
    return 1.0 + 1.0 / (spec.model.classes - 1) if spec.loss == "hinge" else 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """Of all runs, over their first looks.

    Attributes:
        measured: growth of a neuron along its pattern; NaN where no expert takes the pattern.
        predicted: of that neuron.
        square: growth of that neuron's squared norm.
        square_predicted: what it would be if the neuron moved along its pattern only, and as predicted.
    """

    measured: Float[np.ndarray, "runs relevant"]
    predicted: Float[np.ndarray, "runs relevant"]
    square: Float[np.ndarray, "runs relevant"]
    square_predicted: Float[np.ndarray, "runs relevant"]


def linear_looks(active: Float[np.ndarray, "runs looks levels"]) -> Int[np.ndarray, "runs levels"]:
    """How many looks after the first each level remains in the linear part of the loss; 0 where it is not at one."""
    inside = active >= STILL_LINEAR
    last = np.where(inside.all(axis=1), inside.shape[1], inside.argmin(axis=1)) - 1
    return np.maximum(last, 0)


def growth(
    along: Float[np.ndarray, "runs looks experts neurons relevant"],
    norm: Float[np.ndarray, "runs looks experts neurons"],
    weight: Float[np.ndarray, "runs looks experts relevant"],
    frequency: Float[np.ndarray, "runs relevant"],
    looks: Int[np.ndarray, "runs levels"],
    spec: TrainSpec,
) -> Growth:
    """Measured and predicted growth over the first `looks` looks of each run, along patterns of each level.

    NaN where `looks` is 0. Of every pattern the expert is looked at that gives it the most weight at the start, among
    those that vote for its class; and of that expert the neuron with the largest component at the start, which is
    active on it.
    """
    runs = np.arange(along.shape[0])
    levels, patterns = spec.data.levels, along.shape[-1]
    measured, predicted, square, square_predicted = (np.full((len(runs), patterns), np.nan) for _ in range(4))
    able = for_class(spec.model, levels)
    for pattern in range(patterns):
        first = np.where(able[:, pattern], weight[:, 0, :, pattern], -1.0)
        expert = first.argmax(axis=1)
        start = along[runs, 0, expert, :, pattern]
        neuron = _voters(spec, expert, pattern, start).argmax(axis=1)
        path, size = along[runs, :, expert, neuron, pattern], norm[runs, :, expert, neuron]
        known = (first[runs, expert] > 0) & (path[:, 0] > 0) & (looks[:, pattern % levels] > 0)
        given = weight[runs, :, expert, pattern]
        for run in runs[known]:
            end = int(looks[run, pattern % levels])
            steps = np.trapezoid(given[run, : end + 1], spec.times[: end + 1])
            moved = spec.expert_rate * loss_slope(spec) * frequency[run, pattern] * steps
            predicted[run, pattern], measured[run, pattern] = moved, path[run, end] - path[run, 0]
            square[run, pattern] = size[run, end] ** 2 - size[run, 0] ** 2
            square_predicted[run, pattern] = moved * (2 * path[run, 0] + moved)
    return Growth(measured=measured, predicted=predicted, square=square, square_predicted=square_predicted)


def _voters(spec: TrainSpec, expert: np.ndarray, pattern: int, start: np.ndarray) -> Float[np.ndarray, "runs neurons"]:
    """Components of neurons that vote for the pattern's class, -inf for others."""
    votes, label = fixed_votes(spec.model)[expert], pattern // spec.data.levels
    sign = votes[:, :, 0] * (2 * label - 1) if spec.model.classes == 2 else votes[:, :, label]
    return np.where(sign > 0, start, -np.inf)


def pattern_frequency(
    probabilities: Float[np.ndarray, "runs levels"], classes: int
) -> Float[np.ndarray, "runs relevant"]:
    """Probability that a sequence holds each pattern."""
    return np.tile(probabilities / classes, (1, classes))
