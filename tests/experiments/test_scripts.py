"""Every experiment runs on little text and writes its record and its figure."""

import importlib
import json
from typing import Any

import jax
import numpy as np
import pytest

import finetune_bits
from common import Options
from finetune_reference import finetune
from hetmoe.checkpoint.load import load_model
from hetmoe.errors import InputError
from hetmoe.evaluate.text import heldout_files

SMALL: dict[str, dict[str, Any]] = {
    "converter_noise": {"bits": [6]},
    "module_kinds": {"noise_scale": [5.0]},
    "rules_vs_noise": {"noise_scale": [5.0]},
    "drift_month": {"devices": ["pcm"]},
    "global_budget": {"noise_scale": [5.0]},
    "bench_measured": {"naive_experts": 1, "rounds": 1},
    "bits_vs_rules": {"fast": True, "calibration_tokens": 2048},
    "gptq_prior": {"fast": True},
}


def result_of(name: str, folder, own: dict[str, Any], **changes: Any) -> dict[str, Any]:
    options = Options(**({"tokens": 512, "seq": 64, "seeds": 2, "output": folder} | changes))
    importlib.import_module(name).main(options, **own)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / f"{name}.json").read_text())
    assert record["experiment"] == name
    assert record["provenance"]["command"][:2] == ["python", f"experiments/{name}.py"]
    assert len(record["seed_keys"]) == 2
    assert record["text"]["tokens"] == options.tokens
    assert record["text"]["scoring_tokens"] == 16 * 64
    return record["results"]


def test_served_tokens(tmp_path) -> None:
    results = result_of("served_tokens", tmp_path, {}, tokens=1024)
    assert len(results["layers"]) == 4
    for layer in results["layers"]:
        assert not set(layer["high"]["experts"]) & set(layer["low"]["experts"])
        assert min(np.array(layer["scores"])[layer["high"]["experts"]]) > max(
            np.array(layer["scores"])[layer["low"]["experts"]]
        )
        assert np.sum(layer["activations"]) == pytest.approx(2, abs=1e-3)  # two experts per token


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name: str, tmp_path) -> None:
    results = result_of(name, tmp_path, SMALL[name])
    checks = {
        "converter_noise": lambda: (
            [r["placement"] for r in results["rows"]] == ["all_digital", "experts_analog", "dense_analog", "all_analog"]
        ),
        "module_kinds": lambda: set(results["loss_increase"]) == {"experts", "attention", "lm_head"},
        "rules_vs_noise": lambda: len(results["recovered_share"]["25.0%"]) == 8,
        "drift_month": lambda: len(results["rows"]) == 2 * 5 * 2,
        "global_budget": lambda: all(
            r["digital_parameters"] <= results["crossbar_parameters"] for r in results["rows"]
        ),
        "bits_vs_rules": lambda: all(
            r["reached"] == r["average"] or (r["reached"] < r["average"] and r["rule"].startswith("expected_loss"))
            for r in results["rows"]["hqq"]
        ),
        "gptq_prior": lambda: [r["bits"] for r in results["rows"]] == [2] * (2 + 2 * 2),
        "bench_measured": lambda: results["naive_scaled_s"] == pytest.approx(128 * results["naive_part_s"]),
    }
    assert checks[name]()


@pytest.mark.slow
def test_finetune_bits(tmp_path) -> None:
    text = tmp_path / "train.txt"
    text.write_text("".join(file.read_text() for file in heldout_files())[:50_000])
    own = {"run": tmp_path / "run", "train_text": text, "output": tmp_path, "fast": True}
    small = {"tokens": 512, "calibration_tokens": 2048, "seq": 64}
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in int32
        finetune_bits.main(**own, **small, steps=2)
    first = json.loads((tmp_path / "finetune_bits.json").read_text())["results"]
    assert {tuple(row["kinds"]) for row in first["rows"]} == {("austen", "shakespeare", "wordnet")}
    assert np.any(np.array(first["router_norms"]["change"]) != 0)
    with pytest.raises(InputError, match="other settings"):
        finetune(load_model("reference", "float32"), tmp_path / "run", "wordnet", text, 3)
