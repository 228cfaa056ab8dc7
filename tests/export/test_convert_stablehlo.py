"""`hetmoe convert --stablehlo`: what it writes and prints, and one line for every bad input."""

import json

import numpy as np
import pytest

import hetmoe
from hetmoe.checkpoint.save import save_model
from hetmoe.export import load_exported
from tests.export.models import make_model, run_forward
from tests.models.tiny import random_params, random_tokens, tiny_config


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory):
    config = tiny_config()
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(path, make_model(random_params(config, 0), config))
    return path


def test_a_planned_model_becomes_a_program(run, model_directory, tmp_path):
    """The plan's experts, and the first chip of the seed that `hetmoe eval` would take."""
    model = hetmoe.load_model(model_directory)
    plan = hetmoe.place(np.arange(8.0)[None], 0.25)
    hetmoe.save_plan(tmp_path / "plan.json", plan, model)
    code, out, err = run(
        "convert", model_directory, "--stablehlo", "-o", tmp_path / "out", "--plan", tmp_path / "plan.json",
        "--device", "additive", "--noise-scale", 3, "--input-range", "dynamic", "--seed", 4, "--platform", "cpu",
    )  # fmt: skip
    assert code == 0, err
    assert "run on cpu in a new process, 3 x 64 tokens" in out and "plan plan" in out
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    assert record["check"]["largest_difference"] <= 1e-5 * record["check"]["largest_logit"]
    assert record["analog"]["plan"]["experts"] == [6, 8] and record["analog"]["noise_scale"] == 3
    key = hetmoe.evaluate.prepare.noise_keys(4, 2)[0]
    spec = hetmoe.analog_spec("additive", noise_scale=3.0)
    programmed = hetmoe.program(key, model.params, spec, dense=False)
    tokens = random_tokens(model.config, 0, (3, 64))  # the size that the command has compiled
    wanted = run_forward(model.params, tokens, model.config, plan=plan, spec=spec, programmed=programmed)
    np.testing.assert_allclose(load_exported(tmp_path / "out")(tokens), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--platform", "gpu"], "platform 'gpu' is unknown: use cpu, cuda, tpu"),
        (["--device", "pcm"], "--device is about crossbars, and nothing is on one: say what is with --plan"),
        (["--noise-scale", 1], "--noise-scale is about crossbars"),
        (["--to", "orbax"], "--to names a layout"),
        (["--plan", "x.json", "--rule", "random"], "one placement at a time"),
        (["--placement", "some"], "unknown placement 'some'"),
        (["--digital", 2], "must be within [0, 1]"),
        (["--placement", "all_analog", "--noise-scale", -1], "noise_scale=-1.0"),
        (["--placement", "all_analog", "--weights", "x"], "--weights 'x' is unknown"),
        (["--placement", "all_analog", "--seed", -1], "--seed -1 must be at least 0"),
        (["--implementation", "pallas"], "give batch and length"),
        (["--implementation", "pallas", "--batch", 1, "--length", 2, "--platform", "cpu"], "leave out platform cpu"),
        (["--batch", 0], "batch 0 must be at least 1"),
        (["--dtype", "int8"], "dtype 'int8' is unknown"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_loaded(run, tmp_path, options, words):
    code, out, err = run("convert", "no-such-model", "--stablehlo", "-o", tmp_path / "out", *options)
    assert (code, out) == (2, "") and words in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_named_once_and_are_new(run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    for arguments, words in (
        (["--stablehlo"], "name the directory to write once"),
        ([tmp_path / "a", "-o", tmp_path / "b"], "name the directory to write once"),
        (["--stablehlo", "-o", tmp_path], "exists; choose another output"),
        (["--stablehlo", tmp_path / "mine"], "exists"),
        ([tmp_path / "a", "--platform", "cpu"], "--platform is an option of convert --stablehlo"),
        ([tmp_path / "a", "--plan", "x"], "--plan is an option of convert --stablehlo"),
        ([tmp_path / "a", "--noise-scale", "1"], "--noise-scale is an option of convert --stablehlo"),
    ):
        code, _, err = run("convert", "no-such-model", *arguments)
        assert code == 2 and words in err, err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_plans_of_other_models_are_refused(run, model_directory, tmp_path):
    (tmp_path / "plan.json").write_text("{}")
    code, _, err = run(
        "convert", model_directory, "--stablehlo", "-o", tmp_path / "out", "--plan", tmp_path / "plan.json",
        "--input-range", "dynamic",
    )  # fmt: skip
    assert code == 2 and "not a plan file" in err and not (tmp_path / "out").exists()
