"""`hetmoe sweep` in this process: the numbers of `hetmoe eval`, compiled programs, what it says and refuses."""

import contextlib
import json
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest

from hetmoe.errors import InputError
from hetmoe.evaluate import rules
from hetmoe.evaluate import run as evaluate_run
from hetmoe.evaluate.calibration_file import load_calibration
from hetmoe.placement.parameters import digital_parameters
from hetmoe.placement.plan import all_analog, all_digital, experts_analog, place
from hetmoe.report.figures import slug
from hetmoe.sweep import ledger as ledger_module
from hetmoe.sweep import worker
from hetmoe.sweep.code_digest import code_digest
from hetmoe.sweep.config import read_config
from hetmoe.sweep.ledger import Ledger, open_ledger
from hetmoe.sweep.points import expand, group_points
from hetmoe.sweep.setup import early_identity, load_for_sweep, make_setup, model_identity
from hetmoe.sweep.store import read_sweep
from tests.models.tiny import full_config, random_params

Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
METRICS = ("perplexity", "bits_per_byte", "accuracy")
ONE = {"placements": '["all_digital", "experts_analog"]', "rules": None, "fractions": None, "noise_scales": "[2, 4]"}


def test_help_shows_an_example(run: Run) -> None:
    code, out, _ = run("sweep", "--help")
    assert code == 0 and "Example: hetmoe sweep" in out


def test_the_numbers_are_those_of_eval_and_programs_are_compiled_once(
    run: Run, write_config: Write, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chex.clear_trace_counter()
    # Scale 0: three lines, or random alone; each with seeds 0 and 1. Scale 4: three lines. All analog: one line.
    traced = chex.assert_max_traces(evaluate_run.evaluate_seeds.__wrapped__, n=3)
    monkeypatch.setattr(
        worker, "evaluate_seeds", jax.jit(traced, static_argnames=("config", "weights", "implementation"))
    )
    config = write_config(noise_scales="[0, 4, 8]")
    code, out, err = run("sweep", config)
    assert code == 0, err
    assert "100% of 22 points" in out and "router_norm 25.0% digital" in out and "c = 8" in out
    code, _, err = run(
        "eval", folder / "model", "--text", folder / "text.txt", "--tokens", 64, "--seq", 8, "--batch", 4,
        "--rule", "router_norm", "--digital", 0.25, "--noise-scale", 0, "--noise-scale", 4, "--noise-scale", 8,
        "--seeds", 2, "--seed", 3, "--json", tmp_path / "eval.json",
    )  # fmt: skip
    assert code == 0, err
    evaluated = json.loads((tmp_path / "eval.json").read_text())
    record = read_sweep(tmp_path / "s")
    assert record.points == len(record.results) == 22
    names = {"all analog": "all_analog", "experts analog": "experts_analog"}
    expected = {
        (names.get(line["placement"], line["placement"].split()[0]), line["noise_scale"], seed): values
        for line in evaluated["points"]
        for seed, values in enumerate(zip(*(line[metric] for metric in METRICS), strict=True))
    }
    expected["all_digital", 0.0, 0] = tuple(
        evaluated["digital"][m][0] for m in ("perplexity", "bits_per_byte", "accuracy")
    )
    found = {
        (r.point.placement, r.point.noise_scale, r.point.seed_index): (r.perplexity, r.bits_per_byte, r.accuracy)
        for r in record.results
    }
    assert found.keys() == expected.keys()
    for key, values in found.items():
        # Another compiled program: rounding may move single ADC codes.
        np.testing.assert_allclose(values, expected[key], rtol=1e-3, err_msg=str(key))
    weights = model_identity(load_for_sweep(read_config(config)))["weights_sha256"]
    assert {(r.provenance["weights_sha256"], r.provenance["calibration_sha256"]) for r in record.results} == {
        (weights, None)
    }
    words = {r.point.seed_index: r.provenance["key_words"] for r in record.results}
    assert [words[0], words[1]] == evaluated["seed_keys"]
    np.testing.assert_allclose(np.sum(record.frequencies, axis=1), 2, rtol=1e-6)  # experts per token
    assert record.scores.keys() == {"router_norm"} and np.shape(record.scores["router_norm"]) == (1, 8)

    # Nothing is left: nothing is evaluated again.
    monkeypatch.setattr(worker, "evaluate_group", None)
    code, out, err = run("sweep", config)
    assert code == 0 and "22 points, 22 finished" in out, err
    code, out, _ = run("sweep", config, "--status")
    assert code == 0 and "22 of 22 points finished, 0 claimed by processes that run, 0 open" in out


def test_digital_parameters_count_every_module_once() -> None:
    config = full_config()
    params = random_params(config, 0)
    head = params.lm_head.size
    attention = sum(
        getattr(layer.attention, name).size
        for layer in (params.layers, params.dense_layers)
        for name in ("q_a", "q_b", "kv_a", "kv_b", "o")
    )
    moe, ffn = params.layers.moe, params.dense_layers.ffn
    experts = sum(w.size for w in (moe.experts.up, moe.experts.gate, moe.experts.down))
    rest = sum(w.size for part in (moe.shared, ffn) for w in (part.up, part.gate, part.down)) + attention + head
    total = experts + rest
    assert digital_parameters(all_digital(config), config) == (total, total)
    assert digital_parameters(all_analog(config), config) == (0, total)
    assert digital_parameters(experts_analog(config), config) == (rest, total)
    plan = place(np.random.default_rng(0).random((2, 8)), 0.25)
    assert digital_parameters(plan, config) == (rest + experts // 4, total)


def test_other_settings_are_refused_and_more_points_are_added(
    run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = run("sweep", write_config(**ONE))
    assert code == 0, err
    before = {r.point: r for r in read_sweep(tmp_path / "s").results}
    grown = write_config(**(ONE | {"noise_scales": "[2, 4, 8]", "seeds": "3"}))
    code, _, err = run("sweep", grown)
    assert code == 2 and "config.grid.seeds was 2, is 3" in err and "--extend" in err
    assert len(err.splitlines()) == 1
    code, _, err = run("sweep", grown, "--extend")
    assert code == 0, err
    after = {r.point: r for r in read_sweep(tmp_path / "s").results}
    assert len(after) == 10 and all(after[point] == result for point, result in before.items())
    assert len({r.nll for r in after.values()}) == 10

    code, _, err = run("sweep", write_config("o.toml", **(ONE | {"seed": "4"})), "--extend", "-o", tmp_path / "s")
    assert code == 2 and "config.grid.seed was 3, is 4" in err
    model = tmp_path / "model.toml"
    model.write_text(grown.read_text().replace("tokens = 64", "tokens = 56"))
    code, _, err = run("sweep", model, "-o", tmp_path / "s", "--status")
    assert code == 2 and "config.text.tokens was 64, is 56" in err
    monkeypatch.setattr("hetmoe.sweep.code_digest.code_digest", lambda _: "0123")
    code, _, err = run("sweep", grown)
    assert code == 2 and "code.source_digest was" in err and 'is "0123"' in err


def test_the_code_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    seen = [code_digest(tmp_path)]
    (tmp_path / "a" / "x.py").write_text("2")
    seen.append(code_digest(tmp_path))
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    seen.append(code_digest(tmp_path))
    (tmp_path / "a" / "notes.txt").write_text("no code")
    assert len(set(seen)) == 3 and code_digest(tmp_path) == seen[-1]


def test_points_without_a_number_fail_and_the_sweep_goes_on(
    run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(**(ONE | {"noise_scales": "[2, 1e38]"}))
    code, out, err = run("sweep", config)
    assert code == 0, err
    words = " ".join(out.split())
    assert "2 points failed and are in no mean; --retry-failed evaluates them again" in words
    assert "experts_analog on pcm, c = 1e+38, 8 bits, seed 0: the log-likelihood of the text is nan" in words
    record = read_sweep(tmp_path / "s")
    assert {(r.point.placement, r.point.noise_scale) for r in record.results} == {
        ("all_digital", 0.0), ("experts_analog", 2.0)
    }  # fmt: skip
    assert [(f.point.noise_scale, f.point.seed_index) for f in record.failures] == [(1e38, 0), (1e38, 1)]
    code, out, _ = run("sweep", config, "--status")
    assert code == 0 and "3 of 5 points finished, 2 failed, 0 claimed by processes that run, 0 open" in out
    code, out, err = run("sweep", config, "--status", "--retry-failed")
    assert code == 2 and "leave out --retry-failed" in err
    done: list[float] = []
    evaluate = worker.evaluate_group
    monkeypatch.setattr(worker, "evaluate_group", lambda s, p: [done.append(p[0].noise_scale), evaluate(s, p)][1])
    for arguments, again in (((), []), (("--retry-failed",), [1e38, 1e38])):
        code, _, err = run("sweep", config, *arguments)
        assert code == 0 and done == again, err
        assert read_sweep(tmp_path / "s").results == record.results
    code, out, err = run("report", tmp_path / "s", "-o", tmp_path / "report")
    assert code == 0 and "2 points failed" in out, err
    page = (tmp_path / "report" / "index.html").read_text()
    assert "experts_analog on pcm, c = 1e+38, 8 bits, seeds 0, 1" in page and 'class="status unfinished"' in page
    assert len((tmp_path / "report" / "failed.csv").read_text().splitlines()) == 3


def test_rules_that_need_hardware_are_scored_for_each_device(
    write_config: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(
        write_config(
            rules='["router_norm", "noise_sensitivity", "measured"]', devices='["pcm", "reram_wan"]',
            noise_scales="[4]", times="[86400]", scoring_scale="3", bits="[6, 8]",
        )
    )  # fmt: skip
    asked: list[tuple[Any, ...]] = []
    rising = np.arange(8.0)[None]

    def score(_: Any, rule: str, *, key: Any, tokens: Any, spec: Any, calibration: Any, **__: Any) -> np.ndarray:
        bits = spec.options.dac_bits, spec.options.adc_bits
        drawn = None if key is None else jax.random.key_data(key).tolist()
        asked.append((rule, spec.device, float(spec.noise_scale), spec.time_s, bits, drawn))
        assert rule == "router_norm" or (tokens.shape == (16, 9) and calibration is not None)
        return rising if len(asked) % 2 else -rising

    monkeypatch.setattr(rules, "score_experts", score)
    setup = make_setup(config, load_for_sweep(config))
    key = jax.random.key_data(jax.random.fold_in(jax.random.key(3), rules.SCORE_STREAM)).tolist()
    pcm, wan = (config.spec(device, 3, None, 6).device for device in ("pcm", "reram_wan"))
    assert asked == [
        ("router_norm", pcm, 3, None, (6, 6), None),
        *((rule, device, 3, None, (6, 6), key) for rule in ("noise_sensitivity", "measured") for device in (pcm, wan)),
    ]
    for point in expand(config):  # placed by the scores of its own device, whatever its bits and time
        if point.placement == "measured":
            expected = rising < 6 if point.device == "reram_wan" else rising > 1
            assert np.array_equal(worker.make_plan(setup, point).experts, expected)


# A minute; it last ran, and passed, on 2026-11-28.
@pytest.mark.slow
def test_rules_that_need_hardware_in_a_sweep_and_its_report(run: Run, write_config: Write, tmp_path: Path) -> None:
    config = write_config(
        placements="[]", rules='["router_norm", "noise_sensitivity", "measured"]', devices='["pcm", "reram_wan"]',
        noise_scales="[4]", seeds="1",
    )  # fmt: skip
    code, _, err = run("sweep", config)
    assert code == 0, err
    record = read_sweep(tmp_path / "s")
    scored = [f"{rule} ({device})" for rule in ("noise_sensitivity", "measured") for device in ("pcm", "reram_wan")]
    assert record.scores.keys() == {"router_norm", *scored} and len(record.results) == 6
    assert len({json.dumps(scores) for scores in record.scores.values()}) == 5
    assert all(np.shape(scores) == (1, 8) for scores in record.scores.values())

    code, _, err = run("report", tmp_path / "s", "-o", tmp_path / "report")
    assert code == 0, err
    maps = {f"scores-{slug(name)}.png" for name in scored}
    assert len(maps) == 4 and maps <= {path.name for path in (tmp_path / "report").iterdir()}
    rows = [line.split(",")[:2] for line in (tmp_path / "report" / "spearman.csv").read_text().splitlines()[1:]]
    first = [row for row in rows if row[0].startswith("measured")]
    assert rows[: len(first)] == first and not any("measured" in name for row in rows[len(first) :] for name in row)
    assert ["measured (pcm)", "noise_sensitivity (pcm)"] in first and ["measured (pcm)", "router_norm"] in first


def test_interrupted_and_full(run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(**ONE)
    write, writes = Ledger.write, []

    def interrupt(self: Ledger, *arguments: object) -> None:
        write(self, *arguments)
        writes.append(1)
        if len(writes) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a job in the background
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "write", interrupt)
        code, _, err = run("sweep", config)
    signal.signal(signal.SIGINT, before)
    assert code == 130
    assert err == f"hetmoe: interrupted; 2 of 5 points are stored in {tmp_path / 's'}; the same command goes on\n"
    code, _, err = run("sweep", config)
    assert code == 0, err
    assert len(read_sweep(tmp_path / "s").results) == 5


def test_a_full_disk_is_one_line(
    run: Run, write_config: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect = ledger_module.connect

    def connect_to_small_disk(path: Path) -> sqlite3.Connection:
        connection = connect(path)
        connection.execute("PRAGMA max_page_count = 25")
        return connection

    config = write_config(**(ONE | {"seeds": "150"}))
    with monkeypatch.context() as patch:
        patch.setattr(ledger_module, "connect", connect_to_small_disk)
        code, _, err = run("sweep", config)
    assert code == 2 and "database or disk is full; all finished points are kept" in err and len(err.splitlines()) == 1
    kept = {r.point: r for r in read_sweep(tmp_path / "s").results}
    assert 0 < len(kept) < 301
    code, _, err = run("sweep", config)
    assert code == 0, err
    after = {r.point: r for r in read_sweep(tmp_path / "s").results}
    assert len(after) == 301 and all(after[point] == result for point, result in kept.items())


def test_a_worker_waits_for_what_others_have_claimed(write_config: Write, tmp_path: Path) -> None:
    config = read_config(write_config(**ONE))
    model = load_for_sweep(config)
    setup, groups = make_setup(config, model), group_points(expand(config))
    identity = early_identity(config) | {"model": model_identity(model)}
    pauses: list[float] = []
    seen: list[int] = []
    with (
        contextlib.ExitStack() as dies,
        open_ledger(tmp_path / "s", identity, groups, extend=False) as ledger,
    ):
        other = dies.enter_context(open_ledger(tmp_path / "s", identity, groups, extend=False))
        claimed = other.claim()

        def pause(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 2:
                dies.close()  # as when it is killed

        worker.work(setup, ledger, seen.append, pause=pause)
    assert pauses == [1.0, 1.0] and len(claimed) == 1
    assert seen == sorted(seen) and seen[-1] == 5
    assert len(read_sweep(tmp_path / "s").results) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.toml",), "absent.toml: cannot be read"),
        (("s.toml", "-o", "s.toml"), "is a file; name a directory"),
        (("s.toml", "-o", "/proc/hetmoe"), "cannot be made a directory"),
        (("s.toml", "--resume"), "No such option: --resume"),
    ],
)
def test_bad_input(
    run: Run,
    write_config: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_config(**ONE)
    code, out, err = run("sweep", *arguments)
    assert code == 2 and message in err and len(err.splitlines()) == 1, err
    assert "Traceback" not in out and [p.name for p in tmp_path.iterdir()] == ["s.toml"]


def test_a_calibration_file_gives_ranges_and_bound_and_is_part_of_what_a_store_is(
    run: Run, write_config: Write, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "c.safetensors"
    text = ("--text", folder / "text.txt", "--tokens", 64, "--seq", 8)

    def calibrate(k: float) -> None:
        code, _, err = run("calibrate", folder / "model", *text, "--k", k, "--adc-bound", 2.5, "-o", file)
        assert code == 0, err

    calibrate(9.0)
    config = write_config(**ONE, hardware=f'calibration = "{file.name}"')
    read = read_config(config)
    assert read.hardware.adc_bound == 2.5 and read.calibration_file() == file
    setup = make_setup(read, load_for_sweep(read))
    expected = load_calibration(file, setup.model).calibration
    assert setup.calibration is not None
    jax.tree.map(np.testing.assert_array_equal, setup.calibration, expected)
    before = early_identity(read)
    calibrate(7.0)
    assert early_identity(read)["calibration"] != before["calibration"]
    config.write_text(config.read_text() + "range_k = 3.0\n")
    with pytest.raises(InputError, match="leave out input_range and range_k"):
        read_config(config)


def test_texts_of_one_name_are_told_apart(write_config: Write, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(f"{name} text")
    path = write_config(**ONE)
    lines = [line for line in path.read_text().splitlines() if not line.startswith("files")]
    where = lines.index("[text]") + 1
    path.write_text("\n".join([*lines[:where], 'files = ["a/x.txt", "b/x.txt"]', *lines[where:]]))
    before = early_identity(read_config(path))["text"]
    for name in ("a", "b"):
        (tmp_path / name / "x.txt").write_text("another")
        after = early_identity(read_config(path))["text"]
        assert {file for file in after if after[file] != before[file]} == {f"{name}/x.txt"}
        before = after
