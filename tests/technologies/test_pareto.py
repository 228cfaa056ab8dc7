"""Deployments that a search measures, and the command."""

import csv
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.analog.spec import analog_spec
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import InputError
from hetmoe.evaluate.run import evaluate_digital, evaluate_seeds, loss_batches
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan, stack_plans
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.recipe import Recipe
from hetmoe.technologies.candidates import Candidate, Digital, evaluate_candidates, uniform_candidate
from tests.models.tiny import random_params, random_tokens, tiny_config

CONFIG = tiny_config(num_layers=2, num_experts=4, hidden_size=32, expert_intermediate_size=64)
RECIPE = Recipe(method="rtn", group=32)
SPEC = analog_spec("pcm", noise_scale=3.0, adc_bound=4.0)


def made() -> Model:
    return Model(params=random_params(CONFIG, 0), config=CONFIG, tokenizer=None, eos_token_id=0, name="tiny")


def mixed() -> Candidate:
    """Experts 0 analog, 1 at 2 bits, 2 at 4 bits but for its last matrix, 3 not quantized."""
    bits = np.zeros((2, 4, 3), int)
    bits[:, 1], bits[:, 2, :2] = 2, 4
    analog = np.zeros((2, 4), bool)
    analog[:, 0] = True
    return Candidate(rule="by hand", fraction=None, bits="mixed", analog=analog, expert_bits=bits)


def test_names_and_equality() -> None:
    nothing, everything = np.zeros((2, 4), bool), np.ones((2, 4), bool)
    assert uniform_candidate("all digital", None, nothing, 3).name == "all digital, 3 bits"
    assert uniform_candidate("x", None, everything, 3).name == "experts analog"
    assert mixed().name == "by hand, 75.0% digital, mixed"
    half = np.array([[True, False, True, False]] * 2)
    one = uniform_candidate("rule", 0.5, half, None)
    assert one.name == "rule, 50.0% digital, 16 bits" and not one.expert_bits.any()
    assert one.equals(uniform_candidate("other", None, half, None)) and not one.equals(mixed())
    quantized = uniform_candidate("rule", 0.5, half, 2)
    assert (quantized.expert_bits == np.where(half, 0, 2)[..., None]).all() and not one.equals(quantized)


def test_one_program_measures_what_each_deployment_is() -> None:
    """Digital ones are the quantized model; analog experts are programmed from weights that are not quantized."""
    model, windows = made(), np.asarray(random_tokens(CONFIG, 4, (6, 13)))
    batches, keys = loss_batches(windows, 3), jax.random.split(jax.random.key(8), 2)
    one = mixed()
    nothing = np.zeros((2, 4), bool)
    candidates = [one, uniform_candidate("all digital", None, nothing, 2)]
    digital, steps = Digital(model, RECIPE, (2, 4)), []
    nll, _ = evaluate_candidates(model, digital, candidates, SPEC, None, keys, batches, steps.append)
    assert sum(steps) == 4
    # All digital at two bits: the library's own quantized model.
    quantized = quantize_experts(model, np.full((2, 4, 3), 2), RECIPE)[0]
    np.testing.assert_allclose(nll[1], float(evaluate_digital(quantized.params, batches, CONFIG).nll), rtol=1e-5)
    plain = float(evaluate_digital(model.params, batches, CONFIG).nll)
    assert abs(nll[1, 0] / plain - 1) > 1e-4
    # The mixed one: the model whose digital experts alone are quantized, each as it is asked.
    by_hand = quantize_experts(model, one.expert_bits, RECIPE)[0]
    wanted = evaluate_seeds(
        by_hand.params, keys, stack_plans([stack_plans([Plan(experts=jnp.asarray(one.analog))])] * 2), SPEC, None,
        batches, CONFIG,
    )  # fmt: skip
    np.testing.assert_allclose(nll[0], wanted.nll[:, 0], rtol=1e-5)
    assert nll[0, 0] != nll[0, 1]


def test_codes_that_depend_on_others_are_refused() -> None:
    with pytest.raises(InputError, match="use hqq or rtn"):
        Digital(made(), Recipe(method="gptq", group=32), (2,))


OPTIONS = ("--rule", "max_neuron_norm", "--rule", "random", "--digital", 0.5, "--bits", 2, "--bits", 16, "--batch", 1,
           "--batch", 8, "--noise-scale", 4, "--seeds", 2, "--quantizer", "rtn")  # fmt: skip


@pytest.mark.slow
def test_the_command_measures_and_writes(run, tmp_path: Path) -> None:
    code, out, err = run("pareto", "reference", *OPTIONS, "--tokens", 512, "-o", tmp_path / "p")
    assert code == 0, err
    record = json.loads((tmp_path / "p" / "pareto.json").read_text())
    group = record["groups"]["pareto"]
    rows = list(csv.DictReader((tmp_path / "p" / "pareto.csv").read_text().splitlines()))
    assert len(rows) == len(group["points"]) == 2 * (1 + 2 + 4 + 2)  # analog, digital, rules x bits, assignments
    names = {row["deployment"] for row in rows}
    assert {"experts analog", "all digital, 16 bits", "all digital, 2 bits"} <= names
    assert sum(name.startswith("both technologies") for name in names) == 2
    front = list(csv.DictReader((tmp_path / "p" / "pareto-front.csv").read_text().splitlines()))
    values = np.array([[float(r["perplexity"]), float(r["joules_per_token"]), -float(r["tokens_per_s"])] for r in rows])
    for row in front:
        point = np.array([float(row["perplexity"]), float(row["joules_per_token"]), -float(row["tokens_per_s"])])
        assert not ((values <= point).all(axis=1) & (values < point).any(axis=1)).any()
    assert "beaten by none" in out and f"{len(front)} of {len(rows)} points" in out
    assert (tmp_path / "p" / "pareto.png").stat().st_size > 20_000 and (tmp_path / "p" / "pareto.svg").exists()
    like = {r["deployment"]: r for r in rows if r["batch"] == "1"}
    for name, row in like.items():
        if name.startswith("both technologies"):
            bits = row["bits"].removeprefix("bytes of ")
            other = like[f"max_neuron_norm, 50.0% digital, {bits}"]
            assert float(row["memory_used"]) <= float(other["memory_used"]) * (1 + 1e-6)
            assert float(row["tiles"]) <= float(other["tiles"])


BAD: list[tuple[tuple[Any, ...], str]] = [
    ((), "name a directory"),
    (("-o", "p", "--schedule", "x"), "--schedule 'x' must be one of"),
    (("-o", "p", "--rule", "x"), "unknown rule 'x'"),
    (("-o", "p", "--digital", 1.5), "1.5"),
    (("-o", "p", "--batch", 1, "--batch", 1), "--batch 1 1 must name different values"),
    (("-o", "p", "--batch", 0), "--batch 0 must be at least 1"),
    (("-o", "p", "--seeds", 1), "--seeds 1 must be at least 2"),
    (("-o", "p", "--tokens", 8), "--tokens 8 must be at least 256"),
    (("-o", "p", "--quantizer", "gptq"), "use hqq or rtn"),
    (("-o", "p", "--bits", 5), "5"),
    (("-o", "p", "--noise-scale", -1), "noise_scale=-1"),
    (("-o", "p", "--device", "x"), "unknown device 'x'"),
    (("-o", "p", "--processor", "x"), "digital hardware 'x' is neither"),
    (("-o", "p", "--group", 48), "group=48"),
    (("nothing", "-o", "p"), "nothing"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[m for _, m in BAD])
def test_bad_options_are_one_line_and_leave_nothing(run, tmp_path: Path, monkeypatch, options, message) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("pareto", *options)
    assert code == 2 and message in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_quantized_model_is_no_start(run, tmp_path: Path) -> None:
    model = quantize_experts(made(), np.full((2, 4, 3), 4), RECIPE)[0]
    save_model(tmp_path / "m", model)
    code, _, err = run("pareto", tmp_path / "m", "-o", tmp_path / "p")
    assert code == 2 and "quantized" in err and not (tmp_path / "p").exists()
