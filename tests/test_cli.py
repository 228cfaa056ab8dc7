"""The command line: what it prints and writes, and one line with exit code 2 for every bad input."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import hetmoe
from hetmoe.checkpoint.load import model_directory
from hetmoe.commands import evaluate
from hetmoe.errors import InputError

Run = Callable[..., tuple[int, str, str]]
SMALL = ("--tokens", "512", "--seq", "64", "--seeds", "2", "--batch", "4")


@pytest.mark.parametrize("command", ["calibrate", "eval", "place", "info", "convert", "tasks"])
def test_help_shows_an_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"Example: hetmoe {command}" in out


def test_info_counts_parameters(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("info", "reference", "--json", tmp_path / "info.json")
    record = json.loads((tmp_path / "info.json").read_text())
    config = record["model"]["config"]
    expert = 3 * config["hidden_size"] * config["expert_intermediate_size"]
    experts = config["num_layers"] * config["num_experts"] * expert
    assert code == 0 and record["parameters"]["experts"] == experts and f"{experts:,}" in out
    # Dense matrices in full, experts-per-token of every layer's experts, no embedding (it is looked up).
    hidden, layers = config["hidden_size"], config["num_layers"]
    active = experts * config["experts_per_token"] / config["num_experts"] + 4 * layers * hidden**2
    active += hidden * (config["vocab_size"] + layers * config["num_experts"]) + hidden * (4 * layers + 1)
    assert record["active_parameters"] == active


@pytest.mark.parametrize("rule", [rule for rule in hetmoe.RULES if rule != "measured"])
def test_place_writes_a_plan_of_the_right_size(run: Run, tmp_path: Path, rule: str) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = run(
        "place", "reference", "--rule", rule, "--digital", "0.125", "--tokens", 1024, "-o", path, "--noise-scale", 5
    )
    plan = hetmoe.load_plan(path, hetmoe.load_model("reference"))
    assert code == 0 and rule in out
    assert (~plan.experts).sum(axis=1).tolist() == [4] * 4


def test_eval_writes_table_record_and_picture(run: Run, tmp_path: Path) -> None:
    plan, few = tmp_path / "mine.json", tmp_path / "few.json"
    run("place", "reference", "--rule", "router_norm", "--digital", "0.5", "-o", plan)
    code, out, _ = run("place", "reference", "--digital", "0.01", "-o", few)
    assert code == 0 and "no expert stays digital" in out
    code, out, err = run(
        "eval", "reference", *SMALL, "--digital", "0.25", "--noise-scale", "0", "--noise-scale", "20", "--plan", plan,
        "--plan", few, "--json", tmp_path / "r.json", "--plot", tmp_path / "r.png",
    )  # fmt: skip
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    rules = ["max_neuron_norm 25.0% digital", "random 25.0% digital"]
    names = ["all analog", "experts analog", "plan mine", "plan few", *rules]
    assert list(dict.fromkeys(p["placement"] for p in record["points"])) == names
    assert all(name in out for name in names)
    assert record["text"]["tokens"] == 512 and record["options"]["seeds"] == 2 and len(record["seed_keys"]) == 2
    assert {"versions", "device", "command", "time_utc"} <= set(record["provenance"])
    noisy = {p["placement"]: p["perplexity"] for p in record["points"] if p["noise_scale"] == 20}
    digital = record["digital"]["perplexity"][0]
    assert all(len(values) == 2 and min(values) > digital for values in noisy.values())
    assert sum(noisy["all analog"]) > sum(noisy["experts analog"]) > sum(noisy["plan mine"])
    assert noisy["plan few"] == noisy["experts analog"]
    # 6 291 456 weights of experts, half of them digital or none, and 786 432 of attention and head, always digital.
    assert "plan mine: 55.6%" in out and "plan few: 11.1%" in out
    pairs = {(d["placement"], d["minus"]) for d in record["paired_differences"]["of"] if d["noise_scale"] == 20}
    assert pairs == {
        *((name, "experts analog") for name in names[2:]), *(("plan mine", name) for name in names[3:]),
        *(("plan few", name) for name in rules), tuple(rules),
    }  # fmt: skip
    assert re.search(rf"all digital\s+│\s+{digital:.2f}", out)
    with Image.open(tmp_path / "r.png") as picture:
        assert picture.size[0] > 1000
        assert picture.convert("L").getextrema() == (0, 255)


def test_eval_takes_text_drift_and_dynamic_ranges(run: Run, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("It is a truth that the old man and the young woman of the house had a good deal to say. " * 60)
    code, out, err = run(
        "eval", "reference", "--text", text, "--tokens", "128", "--seq", "32", "--seeds", "1", "--device", "hermes",
        "--time", "86400", "--drift-compensation", "--read-noise", "0.02", "--input-range", "dynamic",
        "--dac-bits", "0", "--adc-bits", "0",
    )  # fmt: skip
    assert code == 0, err
    assert "128 held-out tokens" in out


def bad_model(tmp_path: Path, name: str) -> Path:
    """A copy of the reference model, without its weights."""
    path = tmp_path / name
    path.mkdir()
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(model_directory("reference") / file, path / file)
    return path


BAD_EVAL = [
    (("--seeds", "1.5"), "Invalid value for '--seeds'"),
    (("--bogus", "1"), "No such option: --bogus"),
    (("--rule", "largest"), "unknown rule 'largest'"),
    (("--device", "memristor"), "unknown device 'memristor'"),
    (("--digital", "1.5"), "1.5 must be within"),
    (("--digital", "-0.1"), "-0.1 must be within"),
    (("--digital", "nan"), "nan must be within"),
    (("--noise-scale", "-1"), "noise_scale=-1.0 must be"),
    (("--noise-scale", "inf"), "noise_scale=inf must be"),
    (("--noise-scale", "1", "--noise-scale", "1"), "only once"),
    (("--seeds", "0"), "--seeds 0 must be at least 1"),
    (("--seq", "0"), "--seq 0 must be at least 1"),
    (("--tokens", "3"), "--tokens 3 is less than one window"),
    (("--tokens", "99999999"), "the text has"),
    (("--time", "-5"), "time_s=-5.0 must be"),
    (("--device", "additive", "--time", "5"), "publishes no drift"),
    (("--device", "reram_wan", "--time", "5"), "1, 86400, 172800 s"),
    (("--drift-compensation",), "needs time_s"),
    (("--read-noise", "-0.1"), "std=-0.1 must be"),
    (("--read-noise", "0.1", "--read-noise-kind", "pink"), "read noise 'pink' is unknown"),
    (("--input-range", "guess"), "method 'guess' is unknown"),
    (("--range-k", "0"), "k=0.0 must be positive"),
    (("--adc-bound", "0"), "adc_bound=0.0 must be positive"),
    (("--bound-axis", "row"), "bound_axis='row'"),
    (("--adc-bits", "1"), "bits=1 must be"),
    (("--tile-rows", "0"), "tile_rows=0"),
    (("--weights", "sometimes"), "--weights 'sometimes' is unknown: use stored, layer, kernel"),
    (("--implementation", "pallas"), "runs on TPU and NVIDIA GPU, this is a CPU"),
    (("--implementation", "interpret_tpu", "--read-noise", "0.1"), "interpret_tpu has no read noise"),
    (("--implementation", "fast"), "--implementation 'fast' is unknown: use xla, pallas"),
    (("--down-axis", "rows"), "must be 'hidden' or 'output'"),
    (("--dtype", "int8"), "dtype 'int8' is unknown"),
    (("--text", "absent.txt"), "absent.txt: cannot be read"),
    (("--plan", "absent.json"), "plan absent.json: no such file"),
    (("--plan", "a/p.json", "--plan", "b/p.json"), "each plan only once"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_EVAL, ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_bad_input_of_eval(run: Run, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    target = tmp_path / "out" / "r.json"
    code, out, err = run("eval", "reference", *arguments, "--json", target)
    assert code == 2 and message in err, err
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in out + err
    assert not target.parent.exists()  # not even the folder


def test_the_digital_line_is_computed_like_the_others(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise InputError(f"digital by {arguments[3]}")

    monkeypatch.setattr(evaluate, "digital_result", stop)
    _, _, err = run("eval", "reference", *SMALL, "--implementation", "interpret_cuda")
    assert "digital by interpret_cuda" in err


def test_bad_models_texts_and_plans(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    no_weights, bad_config = bad_model(tmp_path, "no_weights"), bad_model(tmp_path, "bad_config")
    (bad_config / "config.json").write_text("{")
    (tmp_path / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    (tmp_path / "empty.txt").write_bytes(b"")
    run("place", "reference", "-o", tmp_path / "plan.json")
    foreign = json.loads((tmp_path / "plan.json").read_text())
    foreign["model"]["fingerprint"] = "0" * 16
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    cases = [
        (("info", "absent"), "no such directory"),
        (("info", no_weights), "model.safetensors: no such file"),
        (("info", bad_config), "not readable as JSON"),
        (("info", "reference", "--dtype", "int4"), "dtype 'int4' is unknown"),
        (("place", "reference", "--digital", "2"), "2.0 must be within"),
        (("place", "reference", "--rule", "best"), "unknown rule 'best'"),
        (("place", "reference", "--rule", "activation_weight", "--text", "empty.txt"), "is empty"),
        (("eval", "reference", "--text", "latin.txt"), "not UTF-8 at byte 1"),
        (("eval", "reference", "--plan", "foreign.json"), "made for model 'reference'"),
        (("eval", "reference", "--json", tmp_path), "is a directory"),
    ]
    before = sorted(p.name for p in tmp_path.iterdir())
    for arguments, message in cases:
        code, out, err = run(*arguments)
        assert code == 2 and message in err, (arguments, err)
        assert len(err.strip().splitlines()) == 1 and "Traceback" not in out + err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_failing_disk_is_one_line(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_arguments: object, **_options: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "x"))

    monkeypatch.setattr("hetmoe.commands.info.run", fails)
    code, out, err = run("info", "reference")
    assert (code, out, err) == (1, "", f"hetmoe: {tmp_path / 'x'}: No space left on device\n")
