"""The command, whole: what it writes, and that what is a theorem holds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from theory.experiment import Hardware, Plan, stops
from theory.run import PARTS, run
from theory.settings import SETTINGS


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("theory") / "out"
    run(list(PARTS.values()), quick=True, seeds=None, seed=0, output=folder)
    names = {path.name for path in folder.iterdir()}
    pictures = ("claims", "devices", "settings", "bounds", "reference")
    assert names == {"results.json", *(f"{name}.png" for name in pictures)}
    assert all((folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in pictures)
    return json.loads((folder / "results.json").read_text())


def claim(results: dict[str, Any], name: str) -> dict[str, Any]:
    return next(c for c in results["claims"] if c["claim"].startswith(name))


def test_the_expected_growth_is_a_theorem(results: dict[str, Any]) -> None:
    for found in (results["claims"], results["settings"]["noisy tokens"]):
        rate = next(c for c in found if c["claim"].startswith("2a"))
        assert len(rate["findings"]) == 6
        for finding in rate["findings"]:
            assert 0.85 < finding["value"] < 1.15, finding  # batches of 256, tests of 128: some % each


def test_bounds_hold(results: dict[str, Any]) -> None:
    assert len(results["bounds"]) == 12
    assert all(row["violations"] == 0 for row in results["bounds"])
    exact = [row for row in results["bounds"] if "second moment" in row["bound"] or "Gaussian" in row["bound"]]
    assert len(exact) == 3 and all(0.9 < row["median"] < 1.1 for row in exact)
    by_logits = next(row for row in results["bounds"] if row["bound"] == "routing, softmax")
    assert by_logits["smallest"] > 1 - 1e-6  # the distance itself
    errors = results["reference"]["errors"]
    assert {row["layer"] for row in errors} == {0, 1, 2, 3} and len(errors) == 4 * 5
    for row in errors:
        exact = row["kind"] in ("matrix 'up', pcm", "expert, proportional")
        limit = 1.6 if exact else 1.0
        assert 0 < row["ratio"] <= 1.1 and row["largest"] < limit  # exact ones: root mean squares of 4 chips


def test_every_claim_has_a_verdict(results: dict[str, Any]) -> None:
    names = [c["claim"].split(" ")[0] for c in results["claims"]]
    assert names == ["1a", "1b", "2a", "2b", "2c", "2d", "2e", "3", "4a", "4b", "4c", "4d"]
    words = ("holds", "holds with conditions", "does not hold here", "undecided: intervals too wide")
    assert all(c["verdict"] in words and c["statement"] and c["criterion"] and c["findings"] for c in results["claims"])
    slope = claim(results, "2b")["findings"][0]
    assert slope["low"] < slope["value"] < slope["high"] and slope["runs"] == 12
    tolerance = claim(results, "4a")["findings"]
    assert {(f["row"], f["column"]) for f in tolerance} == {
        (hardware, stop)
        for hardware in ("proportional, without converters", "pcm, with converters")
        for stop in ("early", "together", "saturated")
    }
    assert results["provenance"]["versions"]["jax"]


def test_gains_are_those_of_the_recorded_tolerances(results: dict[str, Any]) -> None:
    """Claims 4a and 4b, calculated again from what was recorded of every seed."""
    assert len(results["tolerances"]) == 2 * 3
    for record in results["tolerances"]:
        gains, per_gamma = list[float](), list[float]()
        for row in record["frequencies"]:
            analog, high, _ = (part["seeds"] for part in row["placements"].values())
            assert len(analog) == len(row["learned"]) > 0
            both = [(a, h) for a, h in zip(analog, high, strict=True) if a and h]  # neither 0 nor endless
            gains += [np.log(h / a) for a, h in both]
            per_gamma.append(np.mean([np.log(a) for a in analog if a]))
        where = {"row": record["hardware"], "column": record["stop"]}
        gain, slope = (
            next(f for f in claim(results, name)["findings"] if f.items() >= where.items()) for name in ("4b", "4a")
        )
        np.testing.assert_allclose(gain["value"], np.exp(np.mean(gains)), rtol=2e-3)  # of four digits each
        np.testing.assert_allclose(slope["value"], np.polyfit(np.log(results["gammas"]), per_gamma, 1)[0], atol=2e-3)


def test_when_training_stops() -> None:
    accuracy = np.zeros((2, 3, 5, 2))
    accuracy[0, 0, 2:] = accuracy[1, 0, 4:] = 1.0
    accuracy[0, 1, 1:], accuracy[1, 1, 3] = 1.0, 1.0  # forgets again
    accuracy[0, 2, :, 0] = 1.0  # one level only
    found = stops(accuracy)
    assert found["early"].tolist() == [[2, 1, 4], [4, 3, 4]]
    assert found["together"].tolist() == [[4, 3, 4]] * 2 and (found["saturated"] == 4).all()


def test_settings_change_one_thing() -> None:
    assert len({repr(spec) for spec in SETTINGS.values()}) == len(SETTINGS) == 14
    assert next(iter(SETTINGS)) == "analysed"


def theory(*arguments: object) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "theory", *map(str, arguments)], capture_output=True, text=True, check=False,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_bad_options_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").touch()
    for arguments, said in (
        (("claims", "--seeds", 1), "--seeds 1 must be at least 2"), (("all", "--seed", -1), "--seed -1"),
        (("bounds", "--quick", "-o", tmp_path / "here"), "here"), (("all", "--quik"), "--quik"),
    ):  # fmt: skip
        code, out, err = theory(*arguments)
        assert code == 2 and said in err and err.count("\n") == 1 and not out, err
    code, out, _ = theory("--help")
    assert code == 0 and all(name in out for name in PARTS)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"gammas": (0.0,)}, "gammas"),
        ({"seeds": 1}, "seeds=1"),
        ({"digital": 8}, "digital=8"),
        ({"chips": 0}, "chips=0"),
    ],
)
def test_impossible_plans(wrong, said: str) -> None:
    with pytest.raises(Exception, match=said):
        Plan(**wrong)
    assert Hardware("pcm", True).spec().options.adc_bits == 8 and Hardware("pcm", False).spec().options.adc_bits is None
