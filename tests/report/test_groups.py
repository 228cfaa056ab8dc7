"""Means, intervals and paired differences of a sweep's results."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from hetmoe.errors import InputError
from hetmoe.report.groups import ACCURACY, BITS, PERPLEXITY, Condition, Line, difference, group

CONDITION = Condition(device="pcm", time_s=None, bits=8)
ANALOG = Line(placement="experts_analog", fraction=None)
RULE = Line(placement="max_neuron_norm", fraction=0.25)
RANDOM = Line(placement="random", fraction=0.25)


def values(record, line, scale, name="perplexity"):
    """By seed, straight from the results."""
    return {
        r.point.seed_index: getattr(r, name)
        for r in record.results
        if (r.point.placement, r.point.fraction, r.point.noise_scale) == (line.placement, line.fraction, scale)
    }


@pytest.mark.parametrize("metric", [PERPLEXITY, BITS, ACCURACY])
def test_estimates_are_scipys(synthetic, metric) -> None:
    record = synthetic.make_record()
    found = group(record).measured[CONDITION, 5.0, RULE].estimate(metric)
    own = np.array(list(values(record, RULE, 5.0, metric.name).values())) * metric.factor
    test = stats.ttest_1samp(own, 0).confidence_interval(0.95)
    np.testing.assert_allclose([found.mean, found.interval.low, found.interval.high], [own.mean(), *test], rtol=1e-9)
    assert found.count == 4


def test_differences_pair_equal_seeds(synthetic) -> None:
    record = synthetic.make_record()
    # Seed 1 of the one and seed 3 of the other are not done: seeds 0 and 2 are left, in whatever order they come.
    gone = {(RULE.placement, RULE.fraction, 1), (ANALOG.placement, None, 3)}
    results = [r for r in record.results if (r.point.placement, r.point.fraction, r.point.seed_index) not in gone]
    record = dataclasses.replace(record, results=results[::-1])
    groups = group(record)
    found = difference(groups.measured[CONDITION, 5.0, RULE], groups.measured[CONDITION, 5.0, ANALOG], PERPLEXITY)
    a, b = values(record, RULE, 5.0), values(record, ANALOG, 5.0)
    test = stats.ttest_rel([a[0], a[2]], [b[0], b[2]]).confidence_interval(0.95)
    assert found.count == 2
    np.testing.assert_allclose([found.interval.low, found.interval.high], test, rtol=1e-9)


@pytest.mark.parametrize("condition", [CONDITION, Condition(device="reram_wan", time_s=86400.0, bits=8)])
def test_a_result_without_noise_pairs_with_every_seed(synthetic, condition) -> None:
    record = synthetic.make_record(devices=(condition.device,), times=(condition.time_s,))
    groups = group(record)
    drawn, fixed = groups.measured[condition, 0.0, RANDOM], groups.measured[condition, 0.0, RULE]
    assert len(fixed.by_seed) == 1
    for found, sign in ((difference(fixed, drawn, BITS), 1), (difference(drawn, fixed, BITS), -1)):
        own = values(record, RULE, 0.0, "bits_per_byte")[0] - np.array(
            list(values(record, RANDOM, 0.0, "bits_per_byte").values())
        )
        assert found.mean == pytest.approx(sign * own.mean()) and found.count == 4
        assert found.interval.standard_error == pytest.approx(stats.sem(own))
    both = difference(fixed, groups.measured[condition, 0.0, ANALOG], BITS)
    assert both.count == 1 and both.interval is None


def test_one_seed_has_no_interval_and_no_common_seed_no_difference(synthetic) -> None:
    groups = group(synthetic.make_record(seeds=1))
    found = groups.measured[CONDITION, 5.0, RULE].estimate(PERPLEXITY)
    assert found.interval is None and found.count == 1
    first, second = (
        synthetic.make_result(synthetic.make_point(placement, 0.5, seed=seed), 40.0, 0.5)
        for placement, seed in (("x", 0), ("y", 1))
    )
    measured = list(group(dataclasses.replace(synthetic.make_record(), results=[first, second])).measured.values())
    assert difference(*measured, PERPLEXITY) is None


def test_missing_accuracy_leaves_two_metrics(synthetic) -> None:
    assert group(synthetic.make_record(accuracy=False)).metrics == (PERPLEXITY, BITS)


def test_ideal_converters_come_last(synthetic) -> None:
    groups = group(synthetic.make_record(bits=(0, 8, 4), times=(25.0, None), scales=(1.0,)))
    assert [(c.time_s, c.bits) for c in groups.conditions] == [(t, b) for t in (None, 25.0) for b in (4, 8, 0)]


def test_bad_stores(synthetic) -> None:
    record = synthetic.make_record(scales=(1.0,))
    with pytest.raises(InputError, match=r"no finished point yet \(0 of 33\)"):
        group(dataclasses.replace(record, results=[], points=33))
    for changes, message in (
        ({"perplexity": math.nan}, "perplexity=nan"),
        ({"accuracy": math.inf}, "accuracy=inf"),
        ({"bytes": 0}, "bytes=0"),
        ({"crossbar_parameters": 0}, "crossbar_parameters=0"),
    ):
        bad = dataclasses.replace(record.results[3], **changes)
        with pytest.raises(InputError, match=message):
            group(dataclasses.replace(record, results=[*record.results, bad]))
