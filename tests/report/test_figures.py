"""What is drawn, read back from the axes."""

import dataclasses
import math

import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.report.figures import bits_figures, fraction_figures, noise_figures, time_figures
from hetmoe.report.groups import group
from hetmoe.report.pareto import front, pareto_figures
from hetmoe.report.score_maps import digital_marks, score_maps
from hetmoe.report.style import DIGITAL_COLOUR


def mean(record, placement, fraction, name="perplexity", **where):
    values = [
        getattr(r, name)
        for r in record.results
        if (r.point.placement, r.point.fraction) == (placement, fraction)
        and all(getattr(r.point, key) == value for key, value in where.items())
    ]
    return float(np.mean(values))


def line(axes, label):
    (found,) = [drawn for drawn in axes.get_lines() if drawn.get_label() == label]
    return found.get_xdata(), found.get_ydata()


def test_noise_figure_shows_the_means(synthetic) -> None:
    scales = (0.0, 1.0, 5.0)
    record = synthetic.make_record(scales=scales)
    (figure,) = noise_figures(group(record))
    for axes, (name, factor) in zip(
        figure.figure.axes, (("perplexity", 1), ("bits_per_byte", 1), ("accuracy", 100)), strict=True
    ):
        x, y = line(axes, "router_norm, 12.5 %")
        own = [mean(record, "router_norm", 0.125, name, noise_scale=s) * factor for s in scales]
        np.testing.assert_array_equal(x, scales)
        np.testing.assert_allclose(y, own)
        reference = next(drawn for drawn in axes.get_lines() if drawn.get_color() == DIGITAL_COLOUR)
        assert reference.get_ydata()[0] == pytest.approx(getattr(record.results[0], name) * factor)
        assert len(axes.collections) == 8  # a band per line


def test_bands_are_intervals(synthetic) -> None:
    record = synthetic.make_record(rules=("router_norm",), fractions=(0.5,), scales=(1.0, 5.0))
    groups = group(record)
    (figure,) = noise_figures(groups)
    band = figure.figure.axes[2].collections[0].get_paths()[0].vertices  # experts_analog
    estimates = [m.estimate(groups.metrics[2]).interval for (_, _, n), m in groups.measured.items()
                 if n.placement == "experts_analog"]  # fmt: skip
    for interval in estimates:
        assert np.isclose(band[:, 1], interval.low).any() and np.isclose(band[:, 1], interval.high).any()


def test_a_failing_model_does_not_squeeze_the_others(synthetic) -> None:
    record = synthetic.make_record()
    huge = [
        dataclasses.replace(r, perplexity=1e304, bits_per_byte=700 / math.log(2) * r.tokens / r.bytes)
        if r.point.placement == "all_analog" and r.point.noise_scale == 10
        else r
        for r in record.results
    ]
    (figure,) = noise_figures(group(dataclasses.replace(record, results=huge)))
    others = [mean(record, "experts_analog", None, noise_scale=10.0), record.results[0].perplexity]
    low, high = figure.figure.axes[0].get_ylim()
    assert low < min(others) < max(others) < high < 1.5 * max(others)
    low, high = figure.figure.axes[1].get_ylim()
    assert high - low < 2 * (mean(record, "experts_analog", None, "bits_per_byte", noise_scale=10.0) - low)
    carets = [drawn for drawn in figure.figure.axes[0].get_lines() if not drawn.get_clip_on()]
    assert carets and "beyond the axis" in figure.caption
    figure.figure.draw_without_rendering()


def test_the_axis_is_logarithmic_beyond_a_decade(synthetic) -> None:
    record = synthetic.make_record(rules=("router_norm",))
    stretched = [dataclasses.replace(r, perplexity=r.perplexity ** (1 + r.point.noise_scale / 10))
                 for r in record.results if r.point.placement != "all_analog"]  # fmt: skip
    for results, kind in ((record.results, "linear"), (stretched, "log")):
        (figure,) = noise_figures(group(dataclasses.replace(record, results=results)))
        assert [axes.get_yscale() for axes in figure.figure.axes] == [kind, "linear", "linear"]


def test_fraction_figure_starts_at_experts_analog(synthetic) -> None:
    record = synthetic.make_record(scales=(1.0, 5.0))
    (figure,) = fraction_figures(group(record))
    axes = figure.figure.axes[3]  # second row: c = 5
    assert axes.get_title() == "c = 5"
    x, y = line(axes, "random")
    own = [mean(record, "experts_analog", None, noise_scale=5.0)]
    own += [mean(record, "random", f, noise_scale=5.0) for f in (0.125, 0.25)]
    np.testing.assert_allclose(x, [0, 12.5, 25])
    np.testing.assert_allclose(y, own)


def test_time_and_bits_figures(synthetic) -> None:
    record = synthetic.make_record(times=(None, 25.0, 86400.0), bits=(6, 8, 0), scales=(1.0,), rules=("router_norm",))
    groups = group(record)
    times, bits = time_figures(groups), bits_figures(groups)
    assert len(times) == len(bits) == 3
    axes = times[1].figure.axes[0]
    assert axes.get_xscale() == "log"
    x, y = line(axes, "router_norm, 25 %")
    own = [mean(record, "router_norm", 0.25, bits=8, time_s=t) for t in (25.0, 86400.0)]
    np.testing.assert_allclose(x, [25, 86400])
    np.testing.assert_allclose(y, own)
    assert [t.get_text() for t in axes.get_xticklabels()] == ["0 s", "25 s", "1 d"]
    axes = bits[0].figure.axes[0]
    np.testing.assert_allclose(
        line(axes, "experts_analog")[1], [mean(record, "experts_analog", None, bits=b, time_s=None) for b in (6, 8)]
    )
    assert [t.get_text() for t in axes.get_xticklabels()] == ["6", "8", "ideal"]


def test_figures_that_have_nothing_to_show_are_left_out(synthetic) -> None:
    groups = group(synthetic.make_record(scales=(1.0,), rules=()))
    assert not any(make(groups) for make in (noise_figures, fraction_figures, time_figures, bits_figures))
    groups = group(dataclasses.replace(synthetic.make_record(), results=[synthetic.digital_result()]))
    assert not any(make(groups) for make in (noise_figures, fraction_figures, pareto_figures))


@pytest.mark.parametrize("seed", range(20))
def test_front_is_that_of_brute_force(seed) -> None:
    random = np.random.default_rng(seed)
    points = [tuple(p) for p in random.integers(0, 6, (12, 2)).tolist()]  # small integers: many ties

    def dominated(p):
        return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)

    assert front(points) == [i for i, p in enumerate(points) if not dominated(p)]


def test_pareto_figure_draws_the_front(synthetic) -> None:
    record = synthetic.make_record(scales=(5.0,))
    (figure,) = pareto_figures(group(record))
    x, y = line(figure.figure.axes[1], "front")
    assert x[0] == 0 and x[-1] == 100 and (np.diff(x) > 0).all() and (np.diff(y) > 0).all()
    assert y[1] == pytest.approx(100 * mean(record, "experts_analog", None, "accuracy"))
    assert x[1] == pytest.approx(20)


def test_marks_are_the_best_of_each_layer() -> None:
    scores = np.random.default_rng(0).normal(size=(3, 8))
    marks = digital_marks(scores, [0.5, 0.25, 0.01])
    assert list(marks) == [0.25, 0.5]  # 1 % of 8 experts is none
    for layer in range(3):
        order = np.argsort(-scores[layer])
        assert {e for la, e in marks[0.25] if la == layer} == set(order[:2])
        assert {e for la, e in marks[0.5] if la == layer} == set(order[2:4])


def test_score_maps_show_the_scores(synthetic) -> None:
    record = synthetic.make_record()
    maps = score_maps(record, (0.125,))
    assert [m.name for m in maps] == ["scores-max-neuron-norm", "scores-router-norm", "activation-frequency"]
    (mesh,) = maps[1].figure.axes[0].collections
    np.testing.assert_array_equal(np.ravel(mesh.get_array()), np.ravel(record.scores["router_norm"]))
    twice = dataclasses.replace(record, scores={"activation_frequency": record.frequencies, "measured (pcm)": [[0.1]]})
    maps = score_maps(twice, ())
    assert [m.name for m in maps] == ["scores-activation-frequency", "scores-measured-pcm"]  # the same map once
    assert [m.figure.axes[1].get_ylabel() for m in maps] == ["score", "nats per token"]
    for bad in ([[1.0, math.nan]], [1.0], [["x"]], [[1.0], [1.0, 2.0]]):
        with pytest.raises(InputError, match="the store's x: not"):
            score_maps(dataclasses.replace(record, scores={"x": bad}), ())
