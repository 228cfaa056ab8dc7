"""`hetmoe hardware` on the command line."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import hetmoe
from hetmoe.checkpoint.save import save_model
from hetmoe.hardware.description import shipped_descriptions
from hetmoe.models.model import Model
from hetmoe.placement.plan import Plan
from hetmoe.placement.plan_file import save_plan
from tests.models.tiny import random_params, tiny_config


def test_it_answers_for_the_reference_model(run, tmp_path: Path) -> None:
    code, out, err = run("hardware", "--explain", "--batch", 8, "--json", tmp_path / "r.json", "--tokens", 2048)
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert [(e["step"], e["schedule"]) for e in record["estimates"]] == [
        ("decode: batch 8, context 256", "serial"), ("decode: batch 8, context 256", "overlap"),
        ("prefill: 8 x 256 tokens", "serial"), ("prefill: 8 x 256 tokens", "overlap"),
    ]  # fmt: skip
    for estimate in record["estimates"]:
        assert sum(estimate["parts"].values()) == pytest.approx(estimate["step_time"], rel=1e-5)
        assert estimate["tiles"] == 4 * 32 * 3  # every matrix of 128 x 128 is one tile
    assert all(entry["source"] for part in record["hardware"] for entry in part["entries"].values())
    routing = record["routing"]["distinct_experts"]
    assert np.mean(routing["frequency"]) < np.mean(routing["uniform"])  # a text uses some experts more
    assert "counted on it" in out and "tokens per joule" in out and "waiting for each other" in out


def config_only(folder: Path) -> Path:
    content = json.loads((Path(hetmoe.__file__).parent / "models" / "reference" / "config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 2048}))
    return folder


def test_a_model_without_weights_is_taken_as_uniformly_routed(run, tmp_path: Path) -> None:
    folder = config_only(tmp_path / "m")
    code, out, err = run("hardware", folder, "--placement", "all_digital", "--json", tmp_path / "r.json")
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["model"]["fingerprint"] is None and "frequency" not in record["routing"]
    assert record["estimates"][0]["step"] == "decode: batch 32, context 1024"
    assert record["estimates"][0]["tiles"] == 0 and "if all were chosen equally often" in out
    code, out, err = run("hardware", folder, "--digital", 0.25, "--json", tmp_path / "d.json")
    assert code == 0 and "25.0% of experts digital, whichever they are" in out, err
    assert json.loads((tmp_path / "d.json").read_text())["estimates"][0]["tiles"] == 4 * 24 * 3
    for options, message in (
        (("--rule", "router_norm", "--digital", 0.5), "needs weights, which are not on this machine"),
        (("--rule", "activation_frequency"), "needs text or seeds"),
        (("--routing", "text"), "weights are read from safetensors only"),
        (("--routing", tmp_path / "absent.json"), "no such file"),
    ):
        code, _, err = run("hardware", folder, *options)
        assert code == 2 and message in err, err


def test_routing_is_measured_once_and_kept(run, tmp_path: Path) -> None:
    kept = tmp_path / "routing.json"
    first = run("hardware", "--tokens", 2048, "--save-routing", kept, "--json", tmp_path / "a.json")
    again = run("hardware", "--routing", kept, "--json", tmp_path / "b.json")
    assert first[0] == again[0] == 0, first[2] + again[2]
    a, b = (json.loads((tmp_path / f"{n}.json").read_text())["estimates"][0] for n in "ab")
    assert a["tokens_per_s"] == pytest.approx(b["tokens_per_s"], rel=1e-6)
    uniform = run("hardware", "--routing", "uniform", "--json", tmp_path / "c.json")
    assert uniform[0] == 0
    c = json.loads((tmp_path / "c.json").read_text())["estimates"][0]
    assert c["parts"]["queue"] < a["parts"]["queue"]  # nobody queues less than where all are chosen equally


def test_plans_and_rules_place(run, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    assert run("place", "--rule", "router_norm", "--digital", 0.25, "-o", plan)[0] == 0
    names = {"plan": ("--plan", plan), "rule": ("--rule", "router_norm", "--digital", 0.25), "none": ()}
    found = {}
    for name, options in names.items():
        code, _, err = run("hardware", *options, "--routing", "uniform", "--json", tmp_path / f"{name}.json")
        assert code == 0, err
        found[name] = json.loads((tmp_path / f"{name}.json").read_text())["estimates"]
    assert found["plan"] == found["rule"]
    assert [found[n][0]["tiles"] for n in ("plan", "none")] == [4 * 24 * 3, 4 * 32 * 3]


def test_quantized_experts_take_the_bytes_that_they_have(run, tmp_path: Path) -> None:
    assert run("quantize", "--bits", 4, "--quantizer", "rtn", "--group", 64, "-o", tmp_path / "q")[0] == 0
    code, out, err = run("hardware", tmp_path / "q", "--routing", "uniform", "--json", tmp_path / "q.json")
    assert code == 0, err
    assert run("hardware", "--placement", "all_digital", "--routing", "uniform", "--json", tmp_path / "f.json")[0] == 0
    small, full = (json.loads((tmp_path / f"{n}.json").read_text())["estimates"][0] for n in "qf")
    experts = 4 * 32 * 3 * 128 * 128
    packed = experts // 2 + experts // 64 * 4  # codes; a step and a zero in float16 for 64 rows
    assert full["memory_used"] - small["memory_used"] == pytest.approx(2 * experts - packed, rel=1e-5)
    assert small["terms"]["experts"]["weight_bytes"][0] / full["terms"]["experts"]["weight_bytes"][0] == pytest.approx(
        packed / (2 * experts), rel=1e-5
    )
    code, _, err = run("hardware", tmp_path / "q", "--placement", "experts_analog")
    assert code == 2 and "quantized" in err and "--plan" in err
    assert "the plan beside the model" in out


def test_a_plan_beside_the_model_is_the_default(run, tmp_path: Path) -> None:
    config = tiny_config(num_layers=2, num_experts=4, hidden_size=32, expert_intermediate_size=64)
    model = Model(params=random_params(config, 0), config=config, tokenizer=None, eos_token_id=0, name="tiny")
    save_model(tmp_path / "m", model)
    experts = np.zeros((2, 4), bool)
    experts[1, :3] = True
    found = {}
    for name, options in {"none": (), "asked": ("--placement", "experts_analog"), "beside": ()}.items():
        if name == "beside":
            save_plan(tmp_path / "m" / "plan.json", Plan(experts=jnp.asarray(experts)), model, made_by={})
        path = tmp_path / f"{name}.json"
        code, _, err = run("hardware", tmp_path / "m", "--routing", "uniform", *options, "--json", path)
        assert code == 0, err
        record = json.loads(path.read_text())
        found[name] = record["placement"], record["estimates"][0]["tiles"]
    assert found == {
        "none": ("experts analog", 8 * 3), "asked": ("experts analog", 8 * 3),
        "beside": ("the plan beside the model", 3 * 3),
    }  # fmt: skip


def test_lists_and_shows(run, tmp_path: Path) -> None:
    code, out, _ = run("hardware", "--list")
    assert code == 0 and "2039 GB/s" in out and "hermes-64core" in out
    code, out, _ = run("hardware", "--show", "h200-sxm")
    assert code == 0 and out == shipped_descriptions()["h200-sxm"].read_text()
    (tmp_path / "mine.toml").write_text(out.replace("4800", "9600"))
    options = ("--routing", "uniform", "--placement", "all_digital", "--json", tmp_path / "r.json")
    for name in ("h200-sxm", tmp_path / "mine.toml"):
        assert run("hardware", "--processor", name, *options)[0] == 0
    assert run("hardware", "--show", "h300")[0] == 2


BAD = [
    (("--batch", 0), "--batch 0 must be at least 1"),
    (("--context", 300), "context=300 must be a whole number from 1 to the model's context of 256"),
    (("--context", 0), "context=0"),
    (("--prompt", 300), "prompt=300"),
    (("--chip", "a100-80gb"), "describes digital hardware"),
    (("--placement", "nowhere"), "unknown placement 'nowhere'"),
    (("--plan", "p.json", "--digital", 0.5), "one placement at a time"),
    (("--digital", 1.5), "1.5 must be within"),
    (("--routing", "uniform", "--text", "t.txt"), "leave out --routing uniform"),
    (("--routing", "uniform", "--save-routing", "t.json"), "give --routing text"),
    (("--text", "absent.txt"), "absent.txt"),
    (("--tokens", 0), "--tokens 0"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(map(str, o)) for o, _ in BAD])
def test_bad_options_are_one_line(run, options, message) -> None:
    code, out, err = run("hardware", *options)
    assert code == 2 and message in err and err.count("\n") == 1 and not out


def test_what_does_not_fit_is_named_with_its_line(run, tmp_path: Path) -> None:
    text = shipped_descriptions()["ibm-3d-cim"].read_text()
    small = text.replace("[chip]\n", '[chip]\nchips = { value = 1, unit = "1", source = "mine" }\n')
    path = tmp_path / "small.toml"
    for tiles, message in (
        (64, "chips = 1 of 64 tiles are too few: the weights on chips need 384 tiles"),
        (2, "a single module needs up to 8 tiles, and the weights on chips need 384 tiles"),
    ):
        path.write_text(small.replace("tiles = { value = 64", f"tiles = {{ value = {tiles}"))
        code, _, err = run("hardware", "--chip", path, "--routing", "uniform")
        line = path.read_text().splitlines().index('chips = { value = 1, unit = "1", source = "mine" }') + 1
        assert code == 2 and f"{path}:{line}: [chip]" in err and message in err, err
    path.write_text(small.replace("time_multiplexing = { value = false", "time_multiplexing = { value = true"))
    code, out, err = run("hardware", "--chip", path, "--routing", "uniform")
    assert code == 0 and "programming tiles anew" in out, err
    text = shipped_descriptions()["a100-80gb"].read_text()
    path.write_text(text.replace('capacity = { value = 80, unit = "GB"', 'capacity = { value = 1, unit = "MB"'))
    code, _, err = run("hardware", "--processor", path, "--routing", "uniform")
    assert code == 2 and f"{path}:6: [memory] capacity = 1 MB does not hold" in err, err
