"""The command line of calibration and of placement under budgets."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.commands.tables import differences
from hetmoe.evaluate.calibration_file import load_calibration
from hetmoe.evaluate.noise_sweep import Point
from hetmoe.evaluate.prepare import unevaluated_text
from hetmoe.evaluate.text import heldout_files
from hetmoe.hardware.description import open_description
from hetmoe.placement.budget import digital_cost
from hetmoe.placement.energy_costs import energy_costs
from hetmoe.placement.module_scores import module_parameters

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model() -> hetmoe.Model:
    return hetmoe.load_model("reference", "float32")


def test_calibration_is_searched_saved_and_reused(run: Run, tmp_path: Path, model: hetmoe.Model) -> None:
    path = tmp_path / "c.safetensors"
    code, out, err = run(
        "calibrate", "reference", "--tokens", 512, "--seq", 64, "--k", 6, "--k", 12, "--adc-bound", 2, "--adc-bound",
        4, "--min-tokens", 20, "-o", path,
    )  # fmt: skip
    assert code == 0, err
    saved = load_calibration(path, model)
    search = saved.made_by["search"]
    cost = np.array(search["cost"])
    assert cost.shape == (2, 2) and search["ranges"] == ["K = 6", "K = 12"] and search["lambda"] == [2.0, 4.0]
    best = np.unravel_index(np.argmin(cost), cost.shape)
    assert (saved.how.k, saved.adc_bound) == ([6.0, 12.0][best[0]], [2.0, 4.0][best[1]])
    assert f"chosen: K = {saved.how.k:g}, lambda = {saved.adc_bound:g}" in out
    seen = np.asarray(saved.calibration.tokens_seen)
    layer, expert = np.argwhere(seen < 20)[0]
    assert f"{(seen < 20).sum()} of 128 experts saw fewer than 20 tokens" in out
    assert f"layer {layer}: experts (tokens) {expert} ({seen[layer, expert]:.0f})" in out
    assert "apart from what hetmoe eval evaluates" in out and "at the edge of the grid: ranges and lambda" in out
    code, out, err = run(
        "eval", "reference", "--calibration", path, "--tokens", 128, "--seq", 64, "--seeds", 1, "--noise-scale", 0,
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["analog"]["adc_bound"] == saved.adc_bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--by", "accuracy"), "--by 'accuracy' is unknown: use output or loss"),
        (("--analog", "dense"), "--analog 'dense' is unknown: use experts or all"),
        (("--method", "mean"), "method 'mean' is unknown"),
        (("--method", "max", "--k", 3), "--k belongs to --method ema_std"),
        (("--quantile", 0.9), "--quantile belongs to --method quantile"),
        (("--k", 0), "k=0.0 must be positive"),
        (("--adc-bound", 0), "adc_bound=0.0 must be positive"),
        (("--min-tokens", 0), "min_tokens=0"),
        (("--tokens", 3), "--tokens >= --seq"),
        (("--seq", 257, "--tokens", 257), "exceeds the model's context of 256"),
        (("-o", "/"), "is a directory"),
        (("--dtype", "int4"), "dtype 'int4' is unknown"),
    ],
)
def test_bad_calibration_options_are_one_line(run: Run, arguments: tuple[object, ...], message: str) -> None:
    code, out, err = run("calibrate", "reference", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def test_calibration_excludes_options_that_it_holds(run: Run, tmp_path: Path) -> None:
    for command, rest in (("eval", ("--range-k", 3)), ("eval", ("--input-range", "max"))):
        path = tmp_path / "c.safetensors"
        code, _, err = run(command, "reference", "--calibration", path, "--adc-bound", 3, *rest)
        assert code == 2 and "leave out --input-range and --range-k" in err
    code, _, err = run("eval", "reference", "--calibration", tmp_path / "absent")
    assert code == 2 and "absent: cannot be read" in err


def test_dense_modules_compete_under_a_parameter_budget(run: Run, tmp_path: Path, model: hetmoe.Model) -> None:
    path = tmp_path / "plan.json"
    code, out, err = run(
        "place", "reference", "--rule", "noise_sensitivity", "--noise-scale", 5, "--budget", "parameters", "--dense",
        "--digital", 0.3, "--compare", "--tokens", 512, "--seq", 64, "-o", path,
    )  # fmt: skip
    assert code == 0, err
    plan, record = hetmoe.load_plan(path, model), json.loads(path.read_text())
    costs = module_parameters(model.config)
    every = sum(
        float(np.sum(getattr(costs, f.name))) for f in dataclasses.fields(costs) if getattr(costs, f.name) is not None
    )
    spent = digital_cost(plan, costs)
    # Nothing that is worth anything would still fit: the cheapest module is one expert.
    assert 0.3 * every - float(costs.experts[0, 0]) < spent <= 0.3 * every
    assert record["made_by"]["digital_cost"] == spent and record["made_by"]["budget"] == "parameters"
    assert plan.lm_head is not None and not bool(plan.lm_head)  # by far the most sensitive
    assert record["made_by"]["dense_scores"]["lm_head"] > 0.1
    assert "Spearman correlation with noise_sensitivity" in out and "lm_head" in out and "activation_weight" in out


def test_energy_budget_prefers_what_costs_little(run: Run, tmp_path: Path, model: hetmoe.Model) -> None:
    """With the scores of a rule, the plan is worth as much as any: one more expert would pass the budget."""
    path = tmp_path / "plan.json"
    options = ("--tokens", 512, "--seq", 64, "--budget", "energy", "--digital", 0.25, "-o", path)
    code, out, err = run("place", "reference", "--rule", "router_norm", *options)
    assert code == 0 and "not in one unit" in out, err
    plan, made_by = hetmoe.load_plan(path, model), json.loads(path.read_text())["made_by"]
    windows, _ = unevaluated_text(model, heldout_files(), tokens=512, seq=64)
    stored = hetmoe.load_model("reference")  # in the dtype that `place` reads it in
    share = hetmoe.score_experts(stored, "activation_frequency", tokens=jnp.asarray(windows.tokens[:, :-1]))
    hardware = {
        "digital": open_description("a100-80gb", "digital"), "analog": open_description("ibm-3d-cim", "analog"),
    }  # fmt: skip
    costs = np.asarray(energy_costs(model.config, np.asarray(share), **hardware).experts)
    digital = ~np.asarray(plan.experts)
    np.testing.assert_allclose(made_by["digital_cost"], costs[digital].sum(), rtol=1e-3)
    assert costs[digital].sum() <= 0.25 * costs.sum() * (1 + 1e-9)
    assert costs[digital].sum() + costs[~digital].min() > 0.25 * costs.sum()
    paid = costs > 0  # an expert that the text never chooses costs nothing, and is digital
    assert digital[~paid].all()
    density = np.asarray(made_by["scores"])[paid] / costs[paid]
    assert density[digital[paid]].mean() > density[~digital[paid]].mean()
    assert plan.attention is None


def test_measured_places_and_its_chips_follow_the_seed(run: Run, tmp_path: Path) -> None:
    scores = []
    for number, seed in enumerate((0, 0, 1)):
        path = tmp_path / f"{number}.json"
        code, out, err = run(
            "place", "reference", "--rule", "measured", "--noise-scale", 10, "--tokens", 64, "--seq", 32, "--seeds", 1,
            "--seed", seed, "-o", path,
        )  # fmt: skip
        assert code == 0 and "measured" in out, err
        scores.append(json.loads(path.read_text())["made_by"]["scores"])
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "watts"), "--budget 'watts' is unknown: use one of per_layer, parameters, energy"),
        (("--dense",), "needs --rule noise_sensitivity or measured and --budget parameters or energy"),
        (("--dense", "--rule", "measured"), "--budget parameters or energy"),
        (("--seeds", 0), "--seeds 0"),
        (("--energy-batch", 0), "--energy-batch 0"),
        (("--noise-scale", -1), "noise_scale=-1.0"),
        (("--device", "dram"), "unknown device 'dram'"),
        (("--rule", "measured", "--calibration", "absent"), "absent: cannot be read"),
        (("--calibration", "absent"), "--calibration is for --rule measured"),
        (("--energy-bytes", 0), "--energy-bytes 0.0"),
    ],
)
def test_bad_placement_options_are_one_line(run: Run, arguments: tuple[object, ...], message: str) -> None:
    code, out, err = run("place", "reference", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1) and message in err


def point(name: str, values: list[float], scale: float = 1.0) -> Point:
    return Point(
        placement=name, noise_scale=scale, deterministic=len(values) == 1, perplexity=values, bits_per_byte=values,
        accuracy=None,
    )  # fmt: skip


def test_differences_are_taken_chip_by_chip() -> None:
    points = [
        point("a", [5.0, 7.0, 12.0]), point("b", [4.0, 5.0, 9.0]), point("c", [5.0]), point("d", [3.0]),
    ]  # fmt: skip
    found = {(d.placement, d.minus): d for d in differences("perplexity", points, [("a", "b"), ("a", "c"), ("d", "c")])}
    paired = found["a", "b"]
    assert paired.interval is not None and paired.mean == 2.0
    # Differences 1, 2, 3: standard error 1 / sqrt(3), Student's t of 2 degrees of freedom 4.302653.
    np.testing.assert_allclose(
        [paired.interval.low, paired.interval.high], 2 + np.array([-1, 1]) * 4.30265273 / 3**0.5, rtol=1e-6
    )
    assert found["a", "c"].mean == 3.0 and found["a", "c"].interval is not None
    assert found["d", "c"].mean == -2.0 and found["d", "c"].interval is None
