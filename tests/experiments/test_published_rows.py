"""The published rows of OLMoE-1B-7B, estimated from constants that are stated elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest

import published_rows
from hetmoe.hardware.description import open_description
from published_rows import ROWS, all_analog, compared, predict, tile_joules

UNIT = open_description("a100-80gb", "digital").entries


def test_the_digital_row_is_met_in_throughput_and_energy() -> None:
    """Within 15 %, at one stated utilisation of the bandwidth, by weights that can be counted by hand."""
    case = predict("all_digital")
    row = compared("100 % digital", case)
    assert 0.7 <= UNIT["memory.utilisation"].value <= 1
    assert abs(row["throughput_ratio"] - 1) < 0.15 and abs(row["efficiency_ratio"] - 1) < 0.15
    touched = 64 * (1 - (1 - 8 / 64) ** 32)
    weights = 2 * (16 * (4 * 2048**2 + touched * 3 * 2048 * 1024 + 2048 * 64) + 2048 * 50304)
    seconds = weights / (UNIT["memory.bandwidth"].value * UNIT["memory.utilisation"].value)
    np.testing.assert_allclose(row["parts_s"]["weights"], seconds, rtol=1e-3)  # norms and embeddings aside
    np.testing.assert_allclose(row["tokens_per_s"], 32 / seconds, rtol=0.02)
    np.testing.assert_allclose(row["power_w"], UNIT["power.busy"].value, rtol=1e-6)


def test_tiles_alone_take_the_reported_energy() -> None:
    case = predict("all_analog")
    said = all_analog(case)
    # By hand: 512 x 512 tiles of attention and of eight experts in each of 16 layers, 10 nJ each.
    by_hand = 16 * (4 * 16 + 8 * 3 * 4 * 2) * 10e-9
    np.testing.assert_allclose(said["tile_joules_per_token"], by_hand, rtol=1e-6)
    for head in (False, True):
        assert abs(tile_joules(case, head=head) * ROWS["all analog"].tokens_per_joule - 1) < 0.15
    np.testing.assert_allclose(said["tile_joules_per_token_with_head"] - by_hand, 4 * 99 * 10e-9, rtol=1e-6)
    np.testing.assert_allclose(said["reported_power_w"], 0.03207, rtol=1e-3)


def test_the_slow_row_stays_unexplained() -> None:
    said = all_analog(predict("all_analog"))
    assert said["one_after_another_tokens_per_s"] > 2 * 768  # even without any work side by side


def test_the_middle_row_adds_up() -> None:
    for schedule in ("serial", "overlap"):
        row = compared("5.37 % digital", predict("experts_analog", schedule=schedule))
        np.testing.assert_allclose(sum(row["parts_s"].values()), row["step_s"], rtol=1e-5)
        np.testing.assert_allclose(row["rest_s"], 32 / 49781 - row["step_s"], rtol=1e-5)
        # Token vectors there and back, 16 bits, over the stated link.
        link = open_description("pcie4-x16", "link").entries
        crossing = 32 * 16 * 2 * 2048 * 2 / link["link.bandwidth"].value
        np.testing.assert_allclose(row["parts_s"]["link_bandwidth"], crossing, rtol=1e-5)
        np.testing.assert_allclose(row["parts_s"]["link_latency"], 32 * link["link.latency"].value, rtol=1e-5)


def test_the_script_says_what_is_not_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_rows.main(output=tmp_path / "rows.json")
    said = " ".join(capsys.readouterr().out.split())
    assert "768 tokens per second are not explained" in said and "unexplained" in said
    record = json.loads((tmp_path / "rows.json").read_text())
    assert len(record["rows"]) == 6 and len(record["not_stated"]) == 3 + 18
    committed = json.loads((published_rows.RESULTS / "published_rows.json").read_text())
    for new, old in zip(record["rows"], committed["rows"], strict=True):
        np.testing.assert_allclose(new["tokens_per_s"], old["tokens_per_s"], rtol=1e-5)
