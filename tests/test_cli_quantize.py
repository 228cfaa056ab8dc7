"""The command line of quantization: files, reports, plans, stopped runs, and what is refused."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import hetmoe
from hetmoe.checkpoint.save import save_model
from hetmoe.commands import quantize
from hetmoe.models.params import with_experts
from hetmoe.placement.plan import experts_analog
from hetmoe.placement.plan_file import load_plan, save_plan
from hetmoe.quantize.driver import quantize_experts
from hetmoe.quantize.layout import layout_of
from hetmoe.quantize.partial import PartialRun
from hetmoe.quantize.recipe import Recipe
from hetmoe.quantize.rtn import round_to_nearest
from tests.quantize.grids import values_of
from tests.quantize.tiny_quantized import RECIPE, plain, same

Run = Callable[..., tuple[int, str, str]]
TINY = ("--group", 32, "--quantizer", "rtn")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A directory of a small model without a tokenizer."""
    save_model(tmp_path / "tiny", plain())
    return tmp_path / "tiny"


def test_the_reference_model_from_end_to_end(run: Run, tmp_path: Path) -> None:
    """Half of the experts analog, the others at 1 to 3 bits; bytes, averages and perplexity of what is written."""
    half = tmp_path / "half.json"
    assert run("place", "reference", "--digital", 0.5, "-o", half)[0] == 0
    code, out, err = run(
        "quantize", "reference", "--bits", 2.5, "--levels", "1,2,3", "--plan", half, "--quantizer", "rtn", "-o",
        tmp_path / "q", "--json", tmp_path / "q.json",
    )  # fmt: skip
    assert code == 0, err
    assert "2.5 bits on average, as asked for" in out
    assert "4 layers: 2.5 bits: 12 at 3, 0 at 2, 4 at 1 (the paper's rule; with fewest_lowest: 8 at 3, 8 at 2" in out
    record = json.loads((tmp_path / "q.json").read_text())
    weights, bits = 64 * 3 * 128 * 128, np.array(record["bits"])
    assert (np.sum(bits == 3), np.sum(bits == 1), np.sum(bits == 0)) == (144, 48, 192)
    # 16 bits of step for each 128 weights, and 16 of zero at 3 bits: 3.25 and 1.125 bits per weight.
    stored = 16384 * (144 * Fraction(13, 4) + 48 * Fraction(9, 8))
    averages = record["sizes"]["averages"]
    assert averages["quantized experts"] == [2.5, float(stored / weights)]
    everything, rest = 7_620_736, 7_620_736 - weights
    assert averages["whole model"] == [
        (2.5 * weights + 16 * rest) / everything, float((stored + 16 * rest) / everything),
    ]  # fmt: skip
    files = sum(path.stat().st_size for path in (tmp_path / "q").glob("*.safetensors"))
    assert 0 < files - (stored + 16 * rest) / 8 < 250_000  # headers

    model = hetmoe.load_model(tmp_path / "q")
    assert layout_of(model.params.layers.moe.experts).bits().tolist() == record["bits"]
    plan = json.loads((tmp_path / "q" / "plan.json").read_text())
    words = [where for row in plan["experts_run_on"] for where in row]
    assert [words.count(w) for w in ("analog", "digital at 3 bits", "digital at 1 bit")] == [64, 48, 16]
    analog = ["analog" == where for where in words]
    np.testing.assert_array_equal(np.asarray(load_plan(half, hetmoe.load_model("reference")).experts).ravel(), analog)

    code, out, err = run(
        "eval", tmp_path / "q", "--plan", tmp_path / "q" / "plan.json", "--tokens", 128, "--seq", 64, "--seeds", 1,
        "--noise-scale", 0, "--json", tmp_path / "e.json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "e.json").read_text())
    assert [point["placement"] for point in found["points"]] == ["plan plan"]
    assert found["digital"]["perplexity"][0] != found["points"][0]["perplexity"][0]
    code, out, err = run("info", tmp_path / "q")
    assert code == 0, err
    assert "144 matrices at 3 bits (groups of 128, with zeros)" in out
    assert "48 matrices at 1 bits (groups of 128, symmetric)" in out


def test_weights_in_the_directory_are_the_quantisers(run: Run, tiny: Path, tmp_path: Path) -> None:
    code, _, err = run("quantize", tiny, "--bits", 3, *TINY, "-o", tmp_path / "q")
    assert code == 0, err
    gate = hetmoe.load_model(tmp_path / "q").params.layers.moe.experts.gate
    from hetmoe.quantize.mixed import dense

    wanted = values_of(round_to_nearest(plain().params.layers.moe.experts.gate, RECIPE.grid(3)))
    np.testing.assert_allclose(np.asarray(dense(gate, np.float32)), wanted, rtol=2**-22, atol=0)
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == ["config.json", "model.safetensors", "plan.json"]


def test_the_report_prints_what_is_certain(run: Run, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "c": 2, "d": 3}, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    save_model(tmp_path / "tiny", plain().replace(tokenizer=words))
    (tmp_path / "text.txt").write_text("a b c d b d a c " * 20)
    code, out, err = run(
        "quantize", tmp_path / "tiny", "--bits", 2.5, "--levels", "2,3", *TINY, "--report", "--report-tokens", 16,
        "--seq", 8, "--text", tmp_path / "text.txt", "-o", tmp_path / "q", "--json", tmp_path / "q.json",
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "q.json").read_text())["guarantees"]
    assert found["tokens"] == 16 and found["violations"] == 0
    assert sum(row["tokens"] for row in found["experts"]) == 16 * 2 * 2  # layers, experts per token
    assert [(row["bits"], row["layer"]) for row in found["rounded"]] == [(b, x) for b in (8, 4, 3, 2) for x in (0, 2)]
    for row in found["this_model"] + found["rounded"]:
        assert row["expert_error"] < row["expert_bound"] and row["largest_tightness"] <= 1
    assert "violations of bounds and certificates: 0" in out
    last = found["rounded"][-1]
    cells = [line.split("│") for line in out.splitlines() if line.startswith("│    2 │     2 │")]
    assert len(cells) == 2
    assert cells[0][3].strip() == f"{last['expert_error']:.3g}"
    assert cells[1][-2].strip() == f"{last['whole_model_observed']:.1%}"


def test_conversion_there_and_back_keeps_model_and_plan(run: Run, tiny: Path, tmp_path: Path) -> None:
    for command in (
        ("quantize", tiny, "--bits", 3, *TINY, "-o", tmp_path / "q"),
        ("convert", tmp_path / "q", tmp_path / "orbax"),
        ("convert", tmp_path / "orbax", tmp_path / "back", "--to", "safetensors"),
    ):
        code, _, err = run(*command)
        assert code == 0, err
    for name in ("model.safetensors", "plan.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "q" / name).read_bytes()


def test_router_change_reads_the_model_before(run: Run, tiny: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "before", plain(4))
    code, out, err = run(
        "quantize", tiny, "--bits", 2.5, "--levels", "2,3", "--initial", tmp_path / "before", *TINY, "-o",
        tmp_path / "q", "--zeta", 0,
    )  # fmt: skip
    assert code == 0, err
    assert "bits by router_change" in out and "MaxVar" not in out
    now, before = (np.linalg.norm(np.asarray(plain(s).params.layers.moe.router, np.float64), axis=1) for s in (3, 4))
    bits = layout_of(hetmoe.load_model(tmp_path / "q").params.layers.moe.experts).bits()[..., 0]
    for row, change in zip(bits, now - before, strict=True):
        assert set(np.argsort(change)[:4]) == set(np.flatnonzero(row == 3))


def test_a_killed_run_goes_on_and_never_loads_half_done(tiny: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "hetmoe.cli", "quantize", str(tiny), "--bits", "2", "--group", "32", "--quantizer",
        "hqq", "-o", str(tmp_path / "q"),
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    first = tmp_path / "q" / ".partial" / "layer-00000.safetensors"
    deadline = time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.exists()
    if not (tmp_path / "q" / "model.safetensors").exists():  # killed before the end, as nearly always
        with pytest.raises(hetmoe.InputError, match="was stopped here: repeat the same command"):
            hetmoe.load_model(tmp_path / "q")
        assert subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.startswith(
            "going on with the layers in"
        )
    assert not (tmp_path / "q" / ".partial").exists()
    found = hetmoe.load_model(tmp_path / "q")
    recipe = Recipe(method="hqq", group=32)
    assert same(found, quantize_experts(plain(), np.full((2, 8, 3), 2), recipe)[0])


class Stop(BaseException):
    """No handler of errors sees it."""


def test_a_stopped_run_is_taken_up_by_the_same_command_only(
    run: Run, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        (tmp_path / "q" / ".weights-left").mkdir()
        raise Stop

    command = ["--bits", 2.5, "--levels", "2,3", "--quantizer", "rtn", "--group", 32, "-o", tmp_path / "q"]
    with monkeypatch.context() as patch:
        patch.setattr(quantize, "save_model", stop)
        with pytest.raises(Stop):
            run("quantize", tiny, *command)
    for other, name in (
        (("--quantizer", "hqq"), "method"), (("--bits", 2.25), "average"), (("--rule", "random"), "rule"),
        (("--seed", 1), "seed"), (("--zeros", "symmetric"), "zeros"), (("--dtype", "bfloat16"), "dtype"),
        (("--zeta", 2), "zeta"),
    ):  # fmt: skip
        code, _, err = run("quantize", tiny, *command, *other)
        assert code == 2 and f"({name} " in err and "repeat that command to go on" in err, err
    # Other weights behind the same routers: the sums of all matrices are the same too.
    gate = plain().params.layers.moe.experts.gate[..., ::-1]
    params = with_experts(plain().params, plain().params.layers.moe.experts.replace(gate=gate))
    save_model(tmp_path / "other" / "tiny", plain().replace(params=params))
    code, _, err = run("quantize", tmp_path / "other" / "tiny", *command)
    assert code == 2 and "(weights " in err, err

    code, out, err = run("quantize", tiny, *command)
    assert code == 0 and out.startswith("going on with the layers in"), err
    assert run("quantize", tiny, *command[:-1], tmp_path / "whole")[0] == 0
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert sorted(path.name for path in (tmp_path / "q").iterdir()) == names
    for name in names:
        assert (tmp_path / "q" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_layers_without_their_settings_are_not_taken_up(run: Run, tiny: Path, tmp_path: Path) -> None:
    """What a kill leaves that comes while finished layers are removed."""
    partial = PartialRun(tmp_path / "q")
    partial.begin({"method": "rtn"})
    partial.folder.mkdir(parents=True)
    quantize_experts(plain(), np.full((2, 8, 3), 2), Recipe(method="rtn", group=32), partial=partial)
    assert run("quantize", tiny, "--bits", 2, "--group", 32, "--quantizer", "hqq", "-o", tmp_path / "q")[0] == 0
    found = hetmoe.load_model(tmp_path / "q")
    assert same(found, quantize_experts(plain(), np.full((2, 8, 3), 2), Recipe(method="hqq", group=32))[0])


def test_plans_name_the_quantization_that_they_are_of(run: Run, tiny: Path, tmp_path: Path) -> None:
    for name, bits in (("two", 2), ("three", 3)):
        assert run("quantize", tiny, "--bits", bits, *TINY, "-o", tmp_path / name)[0] == 0
    with pytest.raises(hetmoe.InputError, match="'digital at 2 bits' there and 'digital at 3 bits' in 'three'"):
        load_plan(tmp_path / "two" / "plan.json", hetmoe.load_model(tmp_path / "three"))
    with pytest.raises(hetmoe.InputError, match="for 'tiny' with quantized experts, and these are not"):
        load_plan(tmp_path / "two" / "plan.json", hetmoe.load_model(tiny))
    record = json.loads((tmp_path / "two" / "plan.json").read_text())
    record["experts_run_on"][1].append("analog")
    (tmp_path / "longer.json").write_text(json.dumps(record))
    with pytest.raises(hetmoe.InputError, match="must name every expert of every layer"):
        load_plan(tmp_path / "longer.json", hetmoe.load_model(tmp_path / "two"))
    analog = experts_analog(plain().config)
    save_plan(tmp_path / "analog.json", analog, hetmoe.load_model(tiny))
    with pytest.raises(hetmoe.InputError, match="puts 16 quantized experts on crossbars"):
        load_plan(tmp_path / "analog.json", hetmoe.load_model(tmp_path / "two"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bits", 2.5), "no grid has exactly 2.5 bits: use 1, 2, 3, 4, 8, or give --levels"),
        (("--bits", "nan"), "no grid has exactly nan bits"),
        (("--bits", "inf"), "no grid has exactly inf bits"),
        (("--levels", "1,2"), "give --bits, the average bits per weight"),
        (("--bits", 2.5, "--levels", "1,x"), "--levels '1,x' must be whole numbers"),
        (("--bits", 2.5, "--levels", "3,4"), "2.5 bits are not between the levels 3, 4"),
        (("--bits", 2.5, "--levels", "2,5"), "levels=2,5 must be ascending ones of 1, 2, 3, 4, 8"),
        (("--bits", 2.5, "--levels", "1,2,4"), "not equally spaced"),
        (("--bits", 5), "no grid has exactly 5.0 bits"),
        (("--bits", 2, "--rule", "best"), "unknown rule 'best'"),
        (("--bits", 2, "--quantizer", "awq"), "quantiser 'awq' is unknown"),
        (("--bits", 2, "--group", 48), "group=48 must be one of 32, 64, 128"),
        (("--bits", 2, "--zeros", "none"), "zeros='none'"),
        (("--bits", 2, "--quantizer", "gptq", "--tokens", 10), "--tokens 10 is less than one window of --seq 64"),
        (("--bits", 2, "--seed", -1), "--seed -1 must be at least 0"),
        (("--bits", 2, "--seed", 2**70), "must be below 2**32"),
        (("--bits", 2, "--alternative", "foo"), "--alternative 'foo' must be paper or fewest_lowest"),
        (("--bits", 2, "--max-var", "foo"), "--max-var 'foo' must be highest_norm or all"),
        (("--bits", 2, "--more-bits", "foo"), "--more-bits 'foo' must be rare or frequent"),
        (("--bits", 2, "--zeta", "inf"), "zeta=inf"),
        (("--max-bytes", -5, "--levels", "2,3", "--rule", "expected_loss"), "a budget of -5 bytes"),
        (("--bits", 2, "--report"), "tokenizer"),
        (("--bits", 2.5, "--levels", "2,3", "--zeta", 0.5), "zeta=0.5"),
        (("--bits", 2.5, "--levels", "2,3", "--zeta", "nan"), "zeta=nan"),
        (("--bits", 2, "--rule", "uniform", "--initial", "reference"), "--initial is for --rule router_change"),
        (("--bits", 2.5, "--levels", "2,3", "--rule", "router_change"), "needs the model before training"),
        (("--bits", 2.5, "--levels", "2,3", "--rule", "uniform"), "must be one of the levels 2, 3"),
        (("--max-bytes", 100, "--levels", "2,3"), "a budget of bytes is for 'expected_loss'"),
        (("--bits", 2, "--report", "--report-tokens", 10), "--report-tokens 10 is less than one window"),
        (("--bits", 2, "--group", 64), "down: group=64 does not divide the 96 rows"),
        (
            ("--bits", 2, "--seq", 300, "--report", "--report-tokens", 300),
            "--seq 300 exceeds the model's context of 64",
        ),
        (("--bits", 2, "--quantizer", "gptq", "--seq", 32), "tokenizer"),
    ],
)
def test_bad_options_are_refused(
    run: Run, tiny: Path, tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    group = () if "--group" in arguments else ("--group", 32)
    seq = () if "--seq" in arguments else ("--seq", 64)
    code, _, err = run("quantize", tiny, *arguments, *group, *seq, "-o", tmp_path / "q")
    assert code == 2 and message in err, err
    assert not (tmp_path / "q").exists()  # so that the corrected command is not refused


def test_outputs_and_models_that_are_in_the_way(run: Run, tiny: Path, tmp_path: Path) -> None:
    assert run("quantize", tiny, "--bits", 2, *TINY) == (
        2,
        "",
        "hetmoe: name a directory for the quantized model: -o DIR\n",
    )
    assert run("quantize", tiny, "--bits", 2, *TINY, "-o", tmp_path / "q")[0] == 0
    code, _, err = run("quantize", tiny, "--bits", 2, *TINY, "-o", tmp_path / "q")
    assert code == 2 and "exists; choose another output or remove it first" in err
    code, _, err = run("quantize", tmp_path / "q", "--bits", 2, *TINY, "-o", tmp_path / "again")
    assert code == 2 and "cannot quantize again a model with quantized experts: use the one" in err
    for rule in ("max_neuron_norm", "router_norm"):
        code, _, err = run("place", tmp_path / "q", "--rule", rule)
        assert code == 2 and "place the model that it was made from" in err
    code, _, err = run(
        "quantize", tiny, "--bits", 2.5, "--levels", "2,3", "--initial", tiny, *TINY, "-o", tmp_path / "same"
    )
    assert code == 2 and "has the same routers as the model itself" in err
    short = tmp_path / "short.txt"
    short.write_text("a few words of text, far too few. " * 20)
    code, _, err = run(
        "quantize", "reference", "--bits", 2, "--quantizer", "gptq", "--text", short, "--seq", 16, "--tokens", 64, "-o",
        tmp_path / "gptq",
    )  # fmt: skip
    assert code == 2 and "too short for GPTQ: gate has 128 inputs" in err
