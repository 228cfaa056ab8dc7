"""What the experiments share, against numbers worked out by hand."""

import dataclasses
import math
import sys

import numpy as np
import pytest

import common
from hetmoe.errors import InputError
from hetmoe.evaluate.statistics import Interval
from tests.models.tiny import full_config


def test_recovered_share_is_the_ratio_of_the_means() -> None:
    # Increases 2 and 3 over the digital 1, gains 1 and 2: 3 of 5. The rest is 1 - 1.2 and 2 - 1.8: standard error 0.2,
    # and Student's t for two values is tan(0.475 pi).
    share = common.recovered_share(np.array([3.0, 4.0]), np.array([2.0, 2.0]), 1.0)
    reach = math.tan(0.475 * math.pi) * 0.2 / 2.5
    assert share.mean == pytest.approx(0.6)
    assert (share.low, share.high) == pytest.approx((0.6 - reach, 0.6 + reach))
    assert share.standard_error == pytest.approx(0.2 / 2.5)
    assert share.count == 2


def test_a_gain_in_proportion_to_the_increase_has_no_spread() -> None:
    analog = np.array([1.5, 3.0, 9.0])
    share = common.recovered_share(analog, analog - 0.25 * (analog - 1.0), 1.0)
    assert (share.mean, share.low, share.high) == pytest.approx((0.25, 0.25, 0.25))


@pytest.mark.parametrize(("placed", "expected"), [(1.0, 1.0), (3.0, 0.0), (4.0, -0.5)])
def test_recovered_share_at_its_ends(placed: float, expected: float) -> None:
    share = common.recovered_share(np.array([3.0, 3.0]), np.array([placed, placed]), 1.0)
    assert share.mean == pytest.approx(expected)


def test_nothing_to_recover() -> None:
    with pytest.raises(InputError, match="nothing to recover"):
        common.recovered_share(np.array([1.0, 1.0]), np.array([1.0, 1.0]), 1.0)


def test_only_the_named_kinds_are_analog() -> None:
    plan = common.analog_only(full_config(), ["attention", "lm_head"])
    analog = {f.name: np.unique(np.asarray(getattr(plan, f.name))).tolist() for f in dataclasses.fields(plan)}
    off, on = [False], [True]
    assert analog == {"experts": off, "attention": on, "shared_experts": off, "dense_ffn": off, "lm_head": on}


def test_noise_scales() -> None:
    assert common.scales_or(None, (1.0, 5.0)) == [1.0, 5.0]
    assert common.scales_or([3.0, 0.0], (1.0,)) == [3.0, 0.0]
    for wrong in ([1.0, 1.0], [0.0]):
        with pytest.raises(InputError, match="--noise-scale"):
            common.scales_or(wrong, (1.0,))


def test_numbers_are_shortened() -> None:
    assert common.digits([[1 / 3, 2.0], [1e-9 / 3, -20000.0]], 3) == [[0.333, 2.0], [3.33e-10, -20000.0]]
    interval = Interval(mean=1 / 3, low=0.25, high=5 / 12, standard_error=0.1, count=3)
    assert common.as_record(interval) == {"mean": 0.333333, "low": 0.25, "high": 0.416667}
    assert common.plus_minus(interval, 100, 1) == "33.3 ± 8.3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 1}, "--seeds 1 must be at least 2"),
        ({"seq": 0}, "--seq 0"),
        ({"seed": -1}, "--seed -1"),
        ({"tokens": 10}, "--tokens 10 is less than one window"),
        ({"seq": 512}, "--seq 512 exceeds the model's context of 256"),
    ],
)
def test_options_that_make_no_experiment(changes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        common.prepare("nothing", common.Options(**changes))


def test_the_command_line_has_shared_and_own_options(monkeypatch, capsys) -> None:
    seen = []

    def main(options: common.Options, factor: float = 2.0, *, fast: bool = False) -> None:
        seen.append((options.tokens, options.model, factor, fast))
        if factor < 0:
            raise InputError(f"--factor {factor} is negative")

    monkeypatch.setattr(sys, "argv", ["it.py", "--tokens", "512", "--factor", "3.5", "--fast"])
    with pytest.raises(SystemExit) as ended:
        common.run(main)
    assert ended.value.code in {0, None}
    assert seen == [(512, "reference", 3.5, True)]
    monkeypatch.setattr(sys, "argv", ["it.py", "--factor", "-1"])
    with pytest.raises(SystemExit) as ended:
        common.run(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "it.py: --factor -1.0 is negative\n"
