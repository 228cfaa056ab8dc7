"""Gradient descent against differences of the loss, and what is kept of a run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from hetmoe.errors import InputError
from tests.theory.test_model import by_loops
from theory.data import DataSpec, draw_sequences, level_probabilities
from theory.model import ModelSpec
from theory.train import TrainSpec, in_linear_part, learned, losses, train

DATA = DataSpec(patterns=8, sequence=4)
SMALL = TrainSpec(
    data=DATA, model=ModelSpec(dim=8, experts=4, neurons=3, taken=2), batch=16, single=2, chunk=1, chunks=1,
    expert_rate=0.3, router_rate=0.2, std=0.5, tests=32,
)  # fmt: skip
KEYS = jax.random.split(jax.random.key(0), 3)


def by_hand(outputs: np.ndarray, label: np.ndarray, loss: str) -> np.ndarray:
    if outputs.shape[1] == 1:
        margin = outputs[:, 0] * (2 * label - 1)
        return np.maximum(0, 1 - margin) if loss == "hinge" else np.log1p(np.exp(-margin))
    if loss == "logistic":
        return -log_softmax(outputs, axis=1)[np.arange(len(label)), label]
    own = outputs[np.arange(len(label)), label]
    rest = np.where(np.eye(outputs.shape[1], dtype=bool)[label], -np.inf, outputs).max(axis=1)
    return np.maximum(0, 1 - own + rest)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("loss", ["hinge", "logistic"])
def test_losses(classes: int, loss: str) -> None:
    rng = np.random.default_rng(classes)
    outputs, label = rng.normal(size=(20, 1 if classes == 2 else classes)), rng.integers(0, classes, 20)
    found = losses(jnp.asarray(outputs, jnp.float32), jnp.asarray(label), loss)
    np.testing.assert_allclose(found, by_hand(outputs, label, loss), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "spec",
    [
        SMALL,
        dataclasses.replace(SMALL, loss="logistic", model=dataclasses.replace(SMALL.model, trained_output=True)),
        dataclasses.replace(
            SMALL, data=DataSpec(patterns=8, sequence=4, classes=3), model=ModelSpec(
                dim=8, experts=4, neurons=3, classes=3, gated=True, routing="token_choice"
            ),
        ),
    ],
    ids=["plain", "trained output", "gated, three classes"],
)  # fmt: skip
def test_a_step_is_the_slope_of_the_loss_times_the_rates(spec: TrainSpec) -> None:
    """Central differences of a loss of loops, in float64, for some weights of every kind."""
    found = train(KEYS[:1], jnp.asarray([0.3]), spec)
    path = jax.tree.map(lambda leaf: np.asarray(leaf[0, 0], np.float64), found.mixtures)
    before, after = (jax.tree.map(lambda leaf, at=at: leaf[at], path) for at in (0, 1))
    # The batch of step 0, as training derives it.
    first, _ = jax.random.split(jax.random.fold_in(jax.random.split(KEYS[0], 4)[3], 0))
    drawn = draw_sequences(first, spec.data, level_probabilities(0.3, 2), spec.batch)
    x = np.asarray(found.dictionary[0, 0], np.float64)[np.asarray(drawn.ids)]

    def loss(mixture) -> float:
        outputs = np.stack([by_loops(mixture, one, spec.model) for one in x])
        return float(by_hand(outputs, np.asarray(drawn.label), spec.loss).mean())

    rng, step = np.random.default_rng(0), 1e-6
    rates = {"router": spec.router_rate, "up": spec.expert_rate, "gate": spec.expert_rate}
    rates["down"] = spec.expert_rate if spec.model.trained_output else 0.0
    for name, rate in rates.items():
        w = getattr(before, name)
        if w is None:
            continue
        moved = (getattr(after, name) - w).ravel()
        if rate == 0:
            assert not moved.any()
            continue
        places = rng.choice(w.size, 12, replace=False)
        assert np.abs(moved[places]).max() > 1e-4
        for place in places:
            ends = []
            for sign in (1, -1):
                changed = w.copy()
                changed.ravel()[place] += sign * step
                ends.append(loss(before.replace(**{name: changed})))
            slope = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(moved[place], -rate * slope, rtol=1e-3, atol=2e-6)


def test_what_is_kept_of_a_run() -> None:
    spec = dataclasses.replace(SMALL, single=10, chunks=30, chunk=5)
    assert spec.times.tolist() == [*range(10), *range(10, 161, 5)]
    found = train(KEYS, jnp.asarray([0.4, 0.1]), spec)
    looks = jax.tree.map(np.asarray, found.looks)
    assert looks.accuracy.shape == (2, 3, 41, 2) and found.mixtures.up.shape == (2, 3, 41, 4, 8, 3)
    # A seed has the same start at every frequency; seeds differ.
    np.testing.assert_array_equal(found.mixtures.up[0, :, 0], found.mixtures.up[1, :, 0])
    np.testing.assert_array_equal(found.dictionary[0], found.dictionary[1])
    assert (np.asarray(found.mixtures.up[0, 0, 0]) != np.asarray(found.mixtures.up[0, 1, 0])).all()
    assert (np.asarray(found.mixtures.up[0, 0, 1]) != np.asarray(found.mixtures.up[1, 0, 1])).any()
    # A look is of the mixture that is kept beside it: accuracy, margins and components by loops.
    mixture = jax.tree.map(lambda leaf: leaf[1, 2, 7], found.mixtures)
    test = jax.tree.map(lambda leaf: np.asarray(leaf[1, 2]), found.test)
    for level in range(2):
        x = np.asarray(found.dictionary[1, 2], np.float64)[test.drawn.ids[level]]
        assert (test.drawn.level[level] == level).all()
        outputs = np.stack([by_loops(mixture, one, spec.model) for one in x])[:, 0]
        margin = outputs * (2 * test.drawn.label[level] - 1)
        np.testing.assert_allclose(looks.accuracy[1, 2, 7, level], (margin > 0).mean())
        np.testing.assert_allclose(looks.margin[1, 2, 7, level], margin.mean(), rtol=1e-4)
        np.testing.assert_allclose(looks.active[1, 2, 7, level], (margin < 1).mean())
    along = np.einsum("edm,rd->emr", np.asarray(mixture.up), np.asarray(found.dictionary[1, 2])[:4])
    np.testing.assert_allclose(looks.along[1, 2, 7], along, rtol=1e-4, atol=1e-5)
    norm = np.linalg.norm(np.asarray(mixture.up), axis=1)
    np.testing.assert_allclose(looks.norm[1, 2, 7], norm, rtol=1e-5)
    assert looks.margin[:, :, -1].mean() > looks.margin[:, :, 0].mean() + 0.5


def test_every_step_has_a_batch_of_its_own_wherever_looks_are() -> None:
    """Mixtures of a run with other looks, and one step taken by hand late in a chunk."""
    often = dataclasses.replace(SMALL, single=9, chunks=1, chunk=1)
    seldom = dataclasses.replace(SMALL, single=1, chunks=2, chunk=4)
    gamma = jnp.asarray([0.3])
    each, some = (train(KEYS[:1], gamma, spec).mixtures for spec in (often, seldom))
    assert seldom.times.tolist() == [0, 1, 5, 9]
    for place, step in enumerate(seldom.times):
        np.testing.assert_allclose(some.up[0, 0, place], each.up[0, 0, step], rtol=1e-5, atol=1e-7)
    moves = np.diff(np.asarray(each.up[0, 0]), axis=0)
    first = np.abs(moves[0]).max()
    for one in range(1, 9):  # of another batch each: not the same move again
        assert np.abs(moves[one] - moves[one - 1]).max() > 0.1 * first


def test_the_linear_part_of_losses() -> None:
    margin = jnp.asarray([-5.0, -0.3, -0.1, 0.1, 0.3, 1.1])
    assert np.asarray(in_linear_part(margin, "hinge")).tolist() == [True] * 5 + [False]
    assert np.asarray(in_linear_part(margin, "logistic")).tolist() == [False, False, True, True, False, False]
    # There the slope of the logistic loss is that at 0, 1/2, to a tenth.
    for end in (-0.2, 0.2):
        assert abs(1 / (1 + np.exp(end)) / 0.5 - 1) < 0.1


def test_weights_of_relevant_tokens() -> None:
    """Means over the test sequences that hold a pattern."""
    found = train(KEYS[:1], jnp.asarray([0.4]), SMALL)
    mixture = jax.tree.map(lambda leaf: np.asarray(leaf[0, 0, 0], np.float64), found.mixtures)
    drawn = jax.tree.map(lambda leaf: np.asarray(leaf[0, 0]), found.test.drawn)
    dictionary = np.asarray(found.dictionary[0, 0], np.float64)
    total, chosen, count = np.zeros((4, 4)), np.zeros((4, 4)), np.zeros(4)
    for ids in drawn.ids.reshape(-1, 4):
        logits = dictionary[ids] @ mixture.router
        place = int(np.flatnonzero(ids < 4)[0])
        count[ids[place]] += 1
        for e in range(4):
            taken = np.argsort(-logits[:, e], kind="stable")[:2]
            if place in taken:
                chosen[e, ids[place]] += 1
                total[e, ids[place]] += np.exp(logits[place, e]) / np.exp(logits[taken, e]).sum()
    np.testing.assert_allclose(found.looks.weight[0, 0, 0], total / count, rtol=1e-4)
    np.testing.assert_allclose(found.looks.chosen[0, 0, 0], chosen / count, rtol=1e-5)


def test_learned() -> None:
    assert np.asarray(learned(jnp.asarray([[0.99, 0.99], [1.0, 0.98]]))).tolist() == [True, False]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"loss": "square"}, "loss='square'"), ({"batch": 0}, "batch=0"), ({"single": 0}, "single=0"),
        ({"std": 0.0}, "std=0.0"),
        ({"expert_rate": float("nan")}, "expert_rate=nan"), ({"model": ModelSpec(dim=9)}, "9 dimensions"),
    ],
)  # fmt: skip
def test_impossible_training(wrong, said: str) -> None:
    with pytest.raises(InputError, match=said):
        dataclasses.replace(SMALL, **wrong)
