"""The tables' numbers against numpy and scipy."""

import csv
import dataclasses
import io

import numpy as np
import pytest
from scipy import stats

from hetmoe.report import tables
from hetmoe.report.groups import ACCURACY, PERPLEXITY, Condition, Line, group

CONDITION = Condition(device="pcm", time_s=None, bits=8)


@pytest.fixture(scope="module")
def record(synthetic):
    return synthetic.make_record(scales=(0.0, 5.0), layers=3, experts=8)


@pytest.fixture(scope="module")
def maps(record):
    return {rule: np.array(scores) for rule, scores in record.scores.items()}


def values(record, placement, fraction, scale, name):
    found = {
        r.point.seed_index: getattr(r, name)
        for r in record.results
        if (r.point.placement, r.point.fraction, r.point.noise_scale) == (placement, fraction, scale)
    }
    return np.array([found[seed] for seed in sorted(found)])


def read(content):
    return list(csv.DictReader(io.StringIO(content.decode())))


def test_means(record) -> None:
    perplexity, _, accuracy = tables.means(group(record), CONDITION)
    assert list(perplexity.header) == ["placement", "c = 0", "c = 5"]
    rows = {row[0]: row[1:] for row in perplexity.rows}
    assert rows["all_digital"] == ["31.00", "31.00"]
    own = values(record, "router_norm", 0.25, 5.0, "perplexity")
    assert rows["router_norm, 25 %"][1] == f"{own.mean():.2f} ± {stats.sem(own):.2f} (4)"
    assert rows["router_norm, 25 %"][0] == f"{values(record, 'router_norm', 0.25, 0.0, 'perplexity')[0]:.2f} (1)"
    own = 100 * values(record, "random", 0.125, 0.0, "accuracy")
    assert {row[0]: row[1] for row in accuracy.rows}["random, 12.5 %"] == (
        f"{own.mean():.2f} ± {stats.sem(own):.2f} (4)"
    )


def test_differences(record) -> None:
    found = tables.differences(group(record), CONDITION)
    assert len(found) == 6  # three metrics, against two
    a, b = (values(record, rule, 0.25, 5.0, "perplexity") for rule in ("max_neuron_norm", "random"))
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    cell = {row[0]: row[2] for row in found[3].rows}["max_neuron_norm, 25 %"]
    star = " *" if low > 0 or high < 0 else ""
    assert cell == f"{(a - b).mean():+.3f} [{low:+.3f}, {high:+.3f}] (4){star}"
    assert star == " *" and cell.endswith(star)
    assert not any(row[0].startswith("random") for row in found[3].rows)
    zero = {row[0]: row[1] for row in found[0].rows}["random, 25 %"]  # at c = 0: nothing but chance
    assert not zero.endswith("*")
    assert {row[0].split(",")[0] for row in found[0].rows} == {
        "all_analog", "max_neuron_norm", "router_norm", "random"
    }  # fmt: skip


def test_every_number_is_in_the_csv_files(record, maps) -> None:
    files = {name: read(content) for name, content in tables.csv_files(group(record), maps, []).items()}
    assert set(files) == {"means.csv", "differences.csv", "pareto.csv", "spearman.csv"}
    assert len(files["means.csv"]) == 3 * (1 + 2 * 8)
    assert len(files["differences.csv"]) == 3 * 2 * (7 + 4)
    for row in files["differences.csv"]:
        fraction = float(row["fraction"]) if row["fraction"] else None
        against = None if row["against"] == "experts_analog" else fraction
        scale, name = float(row["noise_scale"]), row["metric"]
        factor = 100 if name == "accuracy" else 1
        a = factor * values(record, row["placement"], fraction, scale, name)
        b = factor * values(record, row["against"], against, scale, name)
        assert float(row["mean"]) == pytest.approx((a - b).mean(), rel=1e-6, abs=1e-9)
        if len(a) > 1 and len(b) > 1:
            low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
            assert (float(row["low_95"]), float(row["high_95"])) == pytest.approx((low, high), rel=1e-6)
    for row in files["spearman.csv"]:
        a, b = maps[row["rule_a"]], maps[row["rule_b"]]
        a, b = (a, b) if row["layer"] == "all" else (a[int(row["layer"])], b[int(row["layer"])])
        assert float(row["spearman"]) == pytest.approx(stats.spearmanr(a.ravel(), b.ravel())[0])


def test_fronts_hold_what_nothing_beats(record) -> None:
    groups = group(record)
    table = tables.fronts(groups, CONDITION)
    rows = [row for row in table.rows if row[:2] == ["c = 5", ACCURACY.label]]
    assert [row[2] for row in rows][:2] == ["all_analog", "experts_analog"] and rows[-1][2] == "all_digital"
    assert [row[3] for row in rows][:2] == ["0 %", "20 %"]
    csv_rows = read(tables.csv_files(groups, {}, [])["pareto.csv"])
    on_front = [r for r in csv_rows if r["on_front"] == "1" and r["noise_scale"] == "5.0" and r["metric"] == "accuracy"]
    assert len(on_front) == len(rows)


def test_huge_and_absent_values(synthetic, record) -> None:
    huge = [
        dataclasses.replace(r, perplexity=1e304 * (1 + 0.1 * r.point.seed_index))
        for r in record.results
        if r.point.placement == "all_analog" and r.point.noise_scale == 5
    ]
    groups = group(dataclasses.replace(record, results=[*huge, synthetic.digital_result()]))
    (row,) = [row for row in tables.means(groups, CONDITION)[0].rows if row[0] == "all_analog"]
    assert row[1].startswith("1.15e+304 ± 6.45e+302")
    assert tables.comparisons(groups.lines) == []
    lines = [Line(placement="x", fraction=0.5), Line(placement="random", fraction=0.25)]
    assert tables.comparisons(lines) == []  # random at another fraction is no partner
    assert tables.number(123456.789, PERPLEXITY) == "123,456.79"


def test_correlations_with_what_was_measured_come_first() -> None:
    maps = {name: np.random.default_rng(n).random((1, 6)) for n, name in enumerate(("a", "b", "measured (pcm)", "z"))}
    names = [row[0] for row in tables.correlations(maps).rows]
    assert names == ["measured (pcm), a", "measured (pcm), b", "measured (pcm), z", "a, b", "a, z", "b, z"]


def test_rules_without_an_order_have_no_correlation() -> None:
    maps = {"a": np.array([[1.0, 2.0], [3.0, 3.0]]), "b": np.array([[1.0, 5.0], [7.0, 6.0]])}
    table = tables.correlations(maps)
    expected = stats.spearmanr([1, 2, 3, 3], [1, 5, 7, 6])[0]
    assert table.rows == [["a, b", f"{expected:.3f}", "1.000", "-"]]
    assert tables.correlations({"a": maps["a"]}) is None
