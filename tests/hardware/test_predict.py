"""The short way to an estimate gives the command's."""

import json
from pathlib import Path

import numpy as np
import pytest

import hetmoe
from hetmoe.errors import InputError
from hetmoe.hardware.description import shipped_descriptions
from hetmoe.hardware.predict import predict_decode
from tests.models.tiny import tiny_config

CONFIG = tiny_config()


def test_it_is_what_the_command_prints(run, tmp_path: Path) -> None:
    options = ("--routing", "uniform", "--batch", 8, "--context", 100, "--json", tmp_path / "r.json")
    parts = ("--processor", "h200-sxm", "--chip", "hermes-64core", "--link", "pcie5-x16")
    assert run("hardware", "--rule", "router_norm", "--digital", 0.25, *options, *parts)[0] == 0
    model = hetmoe.load_model("reference")
    plan = hetmoe.place(hetmoe.score_experts(model, "router_norm"), 0.25)
    for wanted in json.loads((tmp_path / "r.json").read_text())["estimates"][:2]:
        found = predict_decode(
            model.config, plan, batch=8, context=100, processor="h200-sxm", chip="hermes-64core", link="pcie5-x16",
            schedule=wanted["schedule"],
        )  # fmt: skip
        for name in ("tokens_per_s", "joules_per_token", "tiles", "memory_traffic"):
            assert float(getattr(found, name)) == pytest.approx(wanted[name], rel=1e-5)


def test_fewer_bytes_of_experts_are_read() -> None:
    plan, shape = hetmoe.all_digital(CONFIG), (len(CONFIG.moe_layers), CONFIG.num_experts)
    weights = 3 * CONFIG.hidden_size * CONFIG.expert_intermediate_size
    whole, half = (
        predict_decode(CONFIG, plan, batch=4, context=8, expert_bytes=np.full(shape, size * weights))
        for size in (2.0, 1.0)
    )
    assert float(whole.memory_used - half.memory_used) == shape[0] * shape[1] * weights
    uneven = np.zeros(shape)
    uneven[:, : CONFIG.experts_per_token] = 1.0  # all tokens choose the same experts
    few = predict_decode(CONFIG, plan, batch=4, context=8, frequency=uneven)
    assert float(few.memory_traffic) < float(whole.memory_traffic)


def test_bad_input_gives_no_number(tmp_path: Path) -> None:
    plan = hetmoe.all_digital(CONFIG)
    small = tmp_path / "small.toml"
    text = shipped_descriptions()["a100-80gb"].read_text()
    small.write_text(text.replace('capacity = { value = 80, unit = "GB"', 'capacity = { value = 1, unit = "B"'))
    for change, message in (
        ({"batch": 0}, "batch=0"), ({"context": 0}, "context=0"), ({"processor": "a200"}, "a200"),
        ({"schedule": "both"}, "schedule='both' must be one of serial, overlap"), ({"chip": "h200-sxm"}, "digital"),
        ({"processor": small}, "small.toml:6: .* does not hold"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            predict_decode(CONFIG, plan, **({"batch": 1, "context": 8} | change))
