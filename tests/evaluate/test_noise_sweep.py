"""Sweeps: means, standard errors, and what is run how often."""

import dataclasses
import math

import jax
import numpy as np
import pytest

import hetmoe
from hetmoe.errors import InputError
from hetmoe.evaluate.noise_sweep import (
    Placement,
    Point,
    TextSize,
    digital_point,
    evaluations,
    noise_sweep,
    random_placement,
)  # fmt: skip
from hetmoe.evaluate.plot import plot_sweep
from hetmoe.evaluate.run import Batches
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, all_analog, experts_analog

SIZE = TextSize(tokens=80, bytes=240, questions=50)


def test_means_and_standard_errors() -> None:
    values = [10.0, 12.0, 17.0]
    point = Point(
        placement="x", noise_scale=1.0, deterministic=False, perplexity=values, bits_per_byte=[2.0], accuracy=[0.5]
    )
    assert point.mean("perplexity") == pytest.approx(13.0)
    # Sample variance (9 + 1 + 16) / 2 = 13, over 3 seeds.
    assert point.standard_error("perplexity") == pytest.approx(math.sqrt(13 / 3))
    assert point.standard_error("accuracy") is None


def sweep(tiny: Model, batches: Batches, scales: list[float], seeds: int) -> tuple[list[Point], int, int]:
    spec = hetmoe.analog_spec("pcm")
    keys = jax.random.split(jax.random.key(0), seeds)
    placements = [
        Placement(name="all analog", plans=[all_analog(tiny.config)]),
        Placement(name="experts analog", plans=[experts_analog(tiny.config)]),
        random_placement("random", tiny, 0.5, keys),
    ]
    done: list[int] = []
    points = noise_sweep(tiny, spec, None, placements, scales, keys, batches, SIZE, jobs=2, progress=done.append)
    return points, sum(done), evaluations(placements, scales, spec, seeds)


@pytest.mark.parametrize("seeds", [3, 4])
def test_every_placement_and_scale_is_there_and_progress_adds_up(tiny: Model, batches: Batches, seeds: int) -> None:
    points, done, planned = sweep(tiny, batches, [0.0, 6.0], seeds)
    assert done == planned
    assert [(p.placement, p.noise_scale) for p in points] == [
        (name, scale) for name in ("all analog", "experts analog", "random") for scale in (0.0, 6.0)
    ]
    for point in points:
        fixed = point.noise_scale == 0 and point.placement != "random"  # random placements differ at any scale
        assert len(point.perplexity) == (1 if fixed else seeds)
        assert point.deterministic == fixed
        np.testing.assert_allclose(
            np.log(point.perplexity) * SIZE.tokens, np.array(point.bits_per_byte) * math.log(2) * SIZE.bytes, rtol=1e-9
        )
    noisy = [p for p in points if p.noise_scale > 0]
    assert all(len(set(p.perplexity)) == seeds for p in noisy)


def test_placements_share_their_random_numbers_whatever_the_number_of_jobs(tiny: Model, batches: Batches) -> None:
    keys = jax.random.split(jax.random.key(0), 4)
    head_only = Plan(experts=experts_analog(tiny.config).experts, attention=None, lm_head=np.array(False))
    placements = [
        Placement(name="a", plans=[experts_analog(tiny.config)]),
        Placement(name="b", plans=[experts_analog(tiny.config)] * 4),
        Placement(name="c", plans=[head_only]),  # another structure: LM head switchable, attention not
    ]
    runs = [
        noise_sweep(
            tiny, hetmoe.analog_spec("pcm"), None, placements, [6.0], keys, batches, SIZE, jobs=jobs,
            progress=lambda _: None,
        )
        for jobs in (1, 2)
    ]  # fmt: skip
    assert runs[0] == runs[1]
    assert runs[0][0].perplexity == runs[0][1].perplexity
    # The same weights and converters in another compiled program: rounding may move single ADC codes.
    np.testing.assert_allclose(runs[0][2].perplexity, runs[0][0].perplexity, rtol=1e-3)


def test_random_placement_is_drawn_anew_for_each_seed(tiny: Model) -> None:
    plans = random_placement("r", tiny, 0.5, jax.random.split(jax.random.key(0), 6)).plans
    assert len({np.asarray(p.experts).tobytes() for p in plans}) == 6
    assert all((np.asarray(p.experts).sum(axis=1) == 4).all() for p in plans)


def test_digital_point_is_the_digital_model(tiny: Model, batches: Batches) -> None:
    point = digital_point(tiny, batches, SIZE)
    assert point.deterministic and len(point.perplexity) == 1 and 0 < point.accuracy[0] < 1
    with pytest.raises(NotImplementedError, match="'fast' does not exist"):
        digital_point(tiny, batches, SIZE, "fast")


def test_plans_that_do_not_fit_are_refused(tiny: Model, batches: Batches) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    spec = hetmoe.analog_spec("pcm")
    wrong = Plan(experts=np.ones((2, 7), bool), attention=None, lm_head=None)  # pyright: ignore[reportArgumentType]
    for plans, message in (
        ([wrong], r"experts has shape \[2, 7\]"),
        ([experts_analog(tiny.config)] * 3, "3 plans for"),
    ):
        with pytest.raises(InputError, match=message):
            noise_sweep(
                tiny,
                spec,
                None,
                [Placement(name="x", plans=plans)],
                [1.0],
                keys,
                batches,
                SIZE,
                jobs=1,
                progress=lambda _: None,
            )


def test_text_without_questions_has_no_accuracy(tiny: Model, batches: Batches) -> None:
    size = dataclasses.replace(SIZE, questions=0)
    digital = digital_point(tiny, batches, size)
    assert digital.accuracy is None and digital.perplexity[0] > 1
    assert plot_sweep(digital, [dataclasses.replace(digital, placement="x")], "two panels").startswith(b"\x89PNG")


def test_a_model_with_nan_gives_no_number(tiny: Model, batches: Batches) -> None:
    """Accuracy would be a number: NaN never equals the largest log-likelihood."""
    broken = tiny.replace(params=tiny.params.replace(final_norm=tiny.params.final_norm.at[3].set(np.nan)))
    with pytest.raises(InputError, match=r"'all digital' at noise scale 0: the log-likelihood of the text is nan"):
        digital_point(broken, batches, SIZE)
    with pytest.raises(InputError, match="NaN or infinite"):
        hetmoe.calibrate(broken.params, batches.tokens[0], broken.config, hetmoe.RangeMethod())
