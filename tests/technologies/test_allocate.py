"""Choices, their assignment, error bounds and the command."""

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.analog.spec import analog_spec
from hetmoe.errors import InputError
from hetmoe.hardware.description import open_description
from hetmoe.models.model import Model
from hetmoe.placement.noise_sensitivity import noise_sensitivity
from hetmoe.quantize.budget import EXPERT_MATRICES, expert_bytes
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.expected_loss import expected_increase
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest
from hetmoe.technologies.assign import assign, describe
from hetmoe.technologies.choices import Choices, expected_losses, make_choices
from hetmoe.technologies.error_report import layer_errors
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2, num_experts=4, hidden_size=32, expert_intermediate_size=64)
RECIPE = Recipe(method="rtn", group=32)
HARDWARE = {"digital": open_description("a100-80gb", "digital"), "analog": open_description("ibm-3d-cim", "analog")}


def made(seed: int = 0) -> Model:
    return Model(params=random_params(CONFIG, seed), config=CONFIG, tokenizer=None, eos_token_id=0, name="tiny")


def choices(seed: int = 0) -> Choices:
    rng = np.random.default_rng(seed)
    losses = np.concatenate([np.sort(rng.random((2, 4, 4)), axis=-1)[..., ::-1], np.zeros((2, 4, 1))], axis=-1)
    share = rng.dirichlet(np.ones(4) * 3, size=2) * 2
    share = np.minimum(share, 1)
    share[:, 0] += 2 - share.sum(axis=1)
    share = np.clip(share, 0, 1)
    share += (2 - share.sum(axis=1, keepdims=True)) / 4
    return make_choices(CONFIG, losses, (2, 3, 4), RECIPE, np.clip(share, 0, 1), batch=8, **HARDWARE)


def test_losses_are_those_of_the_two_estimates() -> None:
    model, spec, key = made(), analog_spec("pcm", noise_scale=3.0), jax.random.key(1)
    windows = random_tokens(CONFIG, 2, (6, 12))
    found = expected_losses(model, windows, spec, RECIPE, (2, 4), key=key)
    noise = noise_sensitivity(model, windows, spec, key=key, dense=False)
    np.testing.assert_allclose(found[..., 0], noise.variance.experts + noise.bias.experts, rtol=1e-6)
    experts = model.params.layers.moe.experts
    rounded = {
        n: [round_to_nearest(getattr(experts, n), RECIPE.grid(level), name=n) for level in (2, 4)]
        for n in EXPERT_MATRICES
    }
    together = expected_increase(model, windows, rounded, key=key)
    np.testing.assert_array_equal(found[..., 1:3], together.expert_curvature)
    assert np.abs(together.curvature.sum(axis=2) / together.expert_curvature - 1).max() > 0.01  # matrices interact
    assert not found[..., 3].any() and (found[..., :3].sum(axis=(0, 1)) > 0).all()


def test_what_choices_take() -> None:
    found = choices()
    assert found.names == ["analog", "2 bits", "3 bits", "4 bits", "not quantized"]
    weights = 3 * 32 * 64
    packed = expert_bytes(CONFIG, [RECIPE.grid(level) for level in (2, 3, 4)]).sum(axis=0)
    np.testing.assert_array_equal(found.stored[1, 2], [0, *packed, 2 * weights])
    np.testing.assert_array_equal(found.tiles[0, 0], [3, 0, 0, 0, 0])
    assert (np.diff(found.energy[..., 1:], axis=-1) >= 0).all()  # more bytes, or bound by arithmetic


def test_assignments_are_the_best_of_all() -> None:
    found = choices(3)
    small = dataclasses.replace(
        found, **{n: getattr(found, n)[:1] for n in ("losses", "stored", "energy", "tiles")}
    )  # 4 experts of 5 options
    budgets = {"max_bytes": 9000.0, "max_energy": float(small.energy[0, :, 2].sum()), "max_tiles": 6.0}
    best = assign(small, **budgets)
    every = [describe(small, np.array([option])) for option in itertools.product(range(5), repeat=4)]
    allowed = [
        one for one in every
        if one.stored <= 9000 and one.energy <= budgets["max_energy"] * (1 + 1e-12) and one.tiles <= 6
    ]  # fmt: skip
    assert best.expected == pytest.approx(min(one.expected for one in allowed), abs=1e-12) and best.gap < 1e-9
    assert best.stored <= 9000 and best.tiles <= 6
    np.testing.assert_array_equal(best.analog, best.option == 0)
    bits = np.array([0, 2, 3, 4, 0])[best.option]
    np.testing.assert_array_equal(best.bits, np.repeat(bits[..., None], 3, axis=-1))
    without = assign(small, max_bytes=9_600.0, exclude=("analog",))
    assert not without.analog.any() and without.stored <= 9_600
    assert assign(small, max_tiles=0).expected == 0  # not quantized


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_bytes": -1}, "max_bytes=-1 must be"),
        ({"max_energy": math.nan}, "max_energy=nan must be"),
        (
            {"max_bytes": 10, "exclude": ("analog",)},
            r"max_bytes=10 B is too small: the options that need least take \d+ B",
        ),
        (
            {"max_tiles": 3, "max_bytes": 20_000, "exclude": ("2 bits",)},
            "max_bytes=20000, max_tiles=3: no choice keeps",
        ),
        ({"exclude": ("5 bits",)}, "option '5 bits' does not exist: the options are analog, 2 bits"),
    ],
)
def test_budgets_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        assign(choices(), **options)


def test_bad_choices() -> None:
    share = np.full((2, 4), 0.5)
    for losses, levels, message in (
        (np.zeros((2, 4, 3)), (2, 3), "losses"), (np.full((2, 4, 4), np.nan), (2, 3), "finite"),
        (np.zeros((2, 4, 4)), (3, 2), "ascending"), (np.zeros((2, 4, 2)), (), "ascending"),
        (np.zeros((2, 4, 3)), (5,), "levels=5: give some of 1, 2, 3, 4, 8"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            make_choices(CONFIG, losses, levels, RECIPE, share, batch=8, **HARDWARE)


def test_errors_of_layers_are_below_one_bound() -> None:
    """Half of the experts analog, two at 3 bits, two as they are; every layer's output, mean over 200 chips."""
    model, spec = made(), analog_spec("pcm", noise_scale=2.0)
    option = np.array([[0, 0, 2, 4], [0, 2, 0, 4]])
    found = describe(choices(), option)
    quantized, _ = quantize_experts(model, found.bits, RECIPE)
    tokens = random_tokens(CONFIG, 4, (2, 8))
    errors = layer_errors(
        model, quantized.params.layers.moe.experts, found, spec, tokens, jax.random.split(jax.random.key(0), 200)
    )
    assert len(errors) == 2
    for layer in errors:
        row = layer.row()
        assert row["violations"] == 0 and 0.05 < row["tightness"] < 1
        assert (layer.measured**2 - 5 * layer.deviation <= layer.bound**2).all()
    # Only quantized: nothing is random, and the bound is that of quantized experts.
    still = describe(choices(), np.array([[2, 2, 2, 4], [4, 2, 4, 4]]))
    quantized, _ = quantize_experts(model, still.bits, RECIPE)
    fixed = layer_errors(
        model, quantized.params.layers.moe.experts, still, spec, tokens, jax.random.split(jax.random.key(0), 2)
    )
    assert all(not layer.deviation.any() and (layer.measured <= layer.bound).all() for layer in fixed)
    assert all(layer.measured.any() for layer in fixed)
    nothing, two = describe(choices(), np.full((2, 4), 4)), jax.random.split(jax.random.key(0), 2)
    # Fixed errors may all point the same way: bounds of single quantized experts add up.
    alone = np.zeros(len(fixed[0].bound))
    for expert in np.nonzero(still.bits[0].any(axis=1))[0]:
        option = np.full((2, 4), 4)
        option[0, expert] = 2
        one = layer_errors(model, quantized.params.layers.moe.experts, describe(choices(), option), spec, tokens, two)
        alone += one[0].bound
    np.testing.assert_allclose(fixed[0].bound, alone, rtol=1e-6)
    for layer in layer_errors(model, None, nothing, spec, tokens, two):
        assert not layer.bound.any() and not layer.measured.any()
    with pytest.raises(InputError, match="leave out the time"):
        layer_errors(model, None, nothing, analog_spec("pcm", time_s=5.0), tokens, two)
    with pytest.raises(InputError, match="at least 2 noise seeds"):
        layer_errors(model, None, nothing, spec, tokens, two[:1])


@pytest.mark.slow
def test_the_command_writes_a_model_that_other_commands_take(run, tmp_path: Path) -> None:
    options = ("--max-bytes", 1_000_000, "--max-tiles", 300, "--noise-scale", 5, "--tokens", 1024, "--levels", "2,4")
    report = ("--report", "--report-tokens", 256, "--report-seeds", 4)
    code, out, err = run("allocate", *options, *report, "-o", tmp_path / "m", "--json", tmp_path / "r.json")
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["found"]["stored"] <= 1_000_000 and record["found"]["tiles"] <= 300 and record["found"]["gap"] < 1e-9
    assert all(row["violations"] == 0 for row in record["errors"]) and len(record["errors"]) == 4
    option = np.array(record["option"])
    model = hetmoe.load_model(tmp_path / "m", "float32")
    plan = hetmoe.load_plan(tmp_path / "m" / "plan.json", model)
    np.testing.assert_array_equal(np.asarray(plan.experts), option == 0)
    # As the model is stored; losses are estimated in float32.
    assert hetmoe.load_model(tmp_path / "m").params.embed.dtype == hetmoe.load_model("reference").params.embed.dtype
    assert "no choice within the budgets is expected to lose less" in out
    plan_option = ("--plan", tmp_path / "m" / "plan.json")
    code, out, err = run("hardware", tmp_path / "m", *plan_option, "--routing", "uniform")
    assert code == 0, err
    code, out, err = run("eval", tmp_path / "m", *plan_option, "--tokens", 512, "--noise-scale", 5, "--seeds", 2)
    assert code == 0 and "plan plan" in out, err


BAD = [
    ((), "name a directory"),
    (("-o", "m"), "without a budget"),
    (("-o", "m", "--max-energy", "20"), "'20' must be a number, a space and a unit like 'J'"),
    (("-o", "m", "--max-energy", "20 W"), "unit 'W' does not fit: use a unit like 'J'"),
    (("-o", "m", "--max-bytes", "5 W"), "--max-bytes unit 'W' does not fit: use a unit like 'B'"),
    (("-o", "m", "--max-bytes", "many"), "--max-bytes 'many' must be a number"),
    (("-o", "m", "--max-bytes", "1MB"), "--max-bytes '1MB' must be a number, a space and a unit like 'B'"),
    (("-o", "m", "--max-bytes", "nan"), "--max-bytes nan is not finite"),
    (("-o", "m", "--max-bytes", "-1"), "--max-bytes '-1' must be at least 0"),
    (("-o", "m", "--max-energy", "-1 uJ"), "--max-energy '-1 uJ' must be at least 0"),
    (("-o", "m", "--max-tiles", -1), "--max-tiles -1 must be at least 0"),
    (("-o", "m", "--max-bytes", 5, "--levels", "2,x"), "--levels '2,x' must be whole numbers"),
    (("-o", "m", "--max-bytes", 5, "--levels", "2,5"), "levels=2,5: give some of 1, 2, 3, 4, 8"),
    (("-o", "m", "--max-bytes", 5, "--tokens", 256), "--tokens 256 must be at least 512"),
    (("-o", "m", "--max-bytes", 5, "--report-seeds", 1), "--report-seeds 1"),
    (("-o", "m", "--max-bytes", 5, "--report", "--time", 5), "leave out --time"),
    (("-o", "m", "--max-bytes", 5, "--chip", "nothing"), "analog hardware 'nothing' is neither"),
    (("-o", "m", "--max-bytes", 5, "--device", "x"), "unknown device 'x'"),
    (("-o", "m", "--max-bytes", 5, "--quantizer", "x"), "quantiser 'x' is unknown"),
    (("-o", "m", "--max-bytes", 5, "--group", 48), "group=48"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options_are_one_line_and_leave_nothing(run, tmp_path: Path, monkeypatch, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("allocate", *options)
    assert code == 2 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_plans_without_quantized_experts_are_plans_alone(run, tmp_path: Path, monkeypatch) -> None:
    """Losses are not estimated here: 0 bytes leave analog experts only."""
    monkeypatch.setattr("hetmoe.commands.allocate.expected_losses", lambda *_, **__: np.zeros((4, 32, 6)))
    code, out, err = run("allocate", "--max-bytes", 0, "--tokens", 512, "-o", tmp_path / "m")
    assert code == 0 and "plan (no expert is quantized)" in out, err
    assert [p.name for p in (tmp_path / "m").iterdir()] == ["plan.json"]
    plan = hetmoe.load_plan(tmp_path / "m" / "plan.json", hetmoe.load_model("reference"))
    assert bool(jnp.all(plan.experts))
