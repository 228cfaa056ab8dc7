"""Scores of padded batches against single sequences without padding, in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.errors import InputError
from hetmoe.evaluate.tasks import score
from hetmoe.evaluate.tasks.batching import Request
from hetmoe.evaluate.tasks.score import Chip, score_requests
from hetmoe.models.model import Model
from tests.models import numpy_model
from tests.tasks.tiny import numpy_score, score_of_logits, tiny_model

# (context, continuation) lengths; the last two lose their first tokens.
SIZES = [(1, 1), (9, 24), (20, 3), (31, 2), (70, 40), (140, 11), (160, 1)]


@pytest.fixture(scope="module")
def tiny() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    rng = np.random.default_rng(3)
    return [
        Request(context=rng.integers(0, 256, a).tolist(), continuation=rng.integers(0, 256, b).tolist())
        for a, b in SIZES
    ]


def test_padding_and_batching_change_nothing(tiny: Model, requests: list[Request]) -> None:
    scores = score_requests(tiny, requests, Chip(), 300)
    for request, (log_prob, greedy) in zip(requests, scores, strict=True):
        exact, exactly_greedy = numpy_score(tiny, request.context, request.continuation)
        # Up to 40 terms, each off by a few float32 units of logits of order 10.
        assert log_prob == pytest.approx(exact, rel=1e-5, abs=1e-4)
        assert greedy == exactly_greedy


def greedy_request(tiny: Model, count: int, wrong: int | None) -> Request:
    """A continuation of likeliest tokens, one of them replaced."""
    ids = [3, 1, 4]
    for _ in range(count):
        logits = numpy_logits(tiny, ids)
        ids.append(int(logits.argmax()))
    if wrong is not None:
        ids[3 + wrong] = (ids[3 + wrong] + 1) % 257
    return Request(context=ids[:3], continuation=ids[3:])


def numpy_logits(tiny: Model, ids: list[int]) -> np.ndarray:
    return numpy_model.forward(tiny.params, np.asarray(ids)[None], tiny.config, numpy_model.digital)[0][0][-1]


@pytest.mark.parametrize("wrong", [None, 0, 3])
def test_is_greedy_needs_every_token(tiny: Model, wrong: int | None) -> None:
    (found,) = score_requests(tiny, [greedy_request(tiny, 4, wrong)], Chip(), 64)
    assert found.is_greedy == (wrong is None)


def test_chips_match_one_forward_each_and_share_a_program(tiny: Model, requests: list[Request]) -> None:
    """Seeds, noise scales and plans of one structure compile once per length (32, 64, 128 and 150 positions)."""
    chex.clear_trace_counter()
    counted = jax.jit(chex.assert_max_traces(score.score_batch.__wrapped__, n=3), static_argnames="config")
    forward = jax.jit(hetmoe.forward, static_argnames="config")
    longest = requests[5]  # as long as the model's positions, so that one more program serves all references
    ids = np.asarray([*longest.context, *longest.continuation])
    used = [requests[i] for i in (0, 3, 4, 5)]  # lengths 32, 128 and 150
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score, "score_batch", counted)
        for scale, seed, digital in ((1.0, 0, 0.25), (3.0, 1, 0.5), (3.0, 2, 0.0)):
            spec = hetmoe.analog_spec("pcm", noise_scale=scale, dac_bits=None, adc_bits=None)
            plan = hetmoe.place(jax.random.uniform(jax.random.key(seed), (1, 4)), digital)
            programmed = hetmoe.program(jax.random.key(seed), tiny.params, spec, dense=False)
            scores = score_requests(tiny, used, Chip(plan=plan, spec=spec, programmed=programmed), 300)
            logits = forward(
                tiny.params, jnp.asarray(ids[None, :-1]), tiny.config, plan=plan, spec=spec, programmed=programmed
            )[0]
            exact, greedy = score_of_logits(np.asarray(logits), ids, len(longest.continuation))
            assert scores[3].log_prob == pytest.approx(exact, rel=1e-5, abs=1e-4) and scores[3].is_greedy == greedy
            found.append(scores[0].log_prob)
    assert len(set(found)) == 3


def test_read_noise_differs_by_chip_only(tiny: Model, requests: list[Request]) -> None:
    spec = hetmoe.analog_spec("pcm", noise_scale=0.0, read_noise=hetmoe.make_read_noise("pcm", 0.3))
    plan = hetmoe.experts_analog(tiny.config)
    programmed = hetmoe.program(jax.random.key(0), tiny.params, spec, dense=False)
    runs = [
        score_requests(
            tiny, requests[:3], Chip(plan=plan, spec=spec, programmed=programmed, read_key=jax.random.key(k)), 300
        )
        for k in (0, 0, 1)
    ]
    assert runs[0] == runs[1] and runs[0] != runs[2]


def test_implementation_changes_rounding_only(tiny: Model, requests: list[Request]) -> None:
    """Digital and on a chip; ideal converters, since a code could move with the last bit."""
    spec = hetmoe.analog_spec("additive", dac_bits=None, adc_bits=None)
    plan = hetmoe.place(jnp.arange(4.0)[None], 0.5)
    programmed = hetmoe.program(jax.random.key(0), tiny.params, spec, dense=False)
    for analog in ({}, {"plan": plan, "spec": spec, "programmed": programmed}):
        found, wanted = (
            score_requests(tiny, requests[:3], Chip(**analog, implementation=name), 300)
            for name in ("interpret_cuda", None)
        )
        for score_by_kernel, score_by_xla in zip(found, wanted, strict=True):
            assert score_by_kernel.log_prob == pytest.approx(score_by_xla.log_prob, rel=1e-5, abs=1e-4)
    with pytest.raises(NotImplementedError, match="'fast' does not exist"):
        score_requests(tiny, requests[:1], Chip(implementation="fast"), 300)


def test_nan_gives_no_number(tiny: Model) -> None:
    broken = tiny.replace(params=tiny.params.replace(final_norm=tiny.params.final_norm * jnp.nan))
    with pytest.raises(InputError, match="log-likelihood of a continuation is nan"):
        score_requests(broken, [Request(context=[1], continuation=[2])], Chip(), 64)
