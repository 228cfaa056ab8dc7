"""`hetmoe simulate` on the command line."""

import csv
import json
import re
from pathlib import Path

import pytest

from hetmoe.hardware.description import shipped_descriptions

FAST = ("--routing", "uniform", "--seed", 5)


def test_a_run_leaves_a_record_a_figure_and_its_requests(run, tmp_path: Path) -> None:
    options = ("--rate", 300, "--duration", 2, "--prompt", 20, "--generate", 30, "--max-batch", 8)
    code, out, err = run("simulate", "reference", *FAST, *options, "--digital", 0.25, "-o", tmp_path / "r")
    assert code == 0, err
    record = json.loads((tmp_path / "r" / "simulation.json").read_text())
    summary = record["summary"]
    rows = list(csv.DictReader((tmp_path / "r" / "requests.csv").read_text().splitlines()))
    assert len(rows) == summary["requests"] and f"{len(rows):,} requests in" in out
    assert sum(int(row["output_tokens"]) for row in rows) == summary["generated_tokens"]
    assert all(float(r["arrival_s"]) <= float(r["started_s"]) < float(r["first_token_s"]) for r in rows)
    assert max(float(r["finished_s"]) for r in rows) == pytest.approx(summary["seconds"])
    assert summary["tokens_per_s"] == pytest.approx(summary["generated_tokens"] / summary["seconds"])
    energy = sum(span["energy_j"] for span in record["spans"])
    assert energy == pytest.approx(summary["energy_j"]) and summary["joules_per_token"] > 0
    assert record["spans"][-1]["digital"] == 0.25 and record["looks"] == []
    assert record["options"]["rate"] == 300 and [d["kind"] for d in record["hardware"]] == ["digital", "analog", "link"]
    assert (tmp_path / "r" / "simulation.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (tmp_path / "r" / "simulation.svg").read_text()
    # The written requests are a trace, which gives the same run.
    again = run("simulate", *FAST, "--trace", tmp_path / "r" / "requests.csv", "--max-batch", 8, "--digital", 0.25,
                "-o", tmp_path / "s")  # fmt: skip
    assert again[0] == 0, again[2]
    repeated = json.loads((tmp_path / "s" / "simulation.json").read_text())["summary"]
    latencies, found = summary.pop("latencies"), repeated.pop("latencies")
    assert repeated == pytest.approx(summary)
    assert all(found[name] == pytest.approx(wanted) for name, wanted in latencies.items())


def test_the_policy_decides(run, tmp_path: Path) -> None:
    options = ("--rate", 300, "--duration", 2, "--prompt", 20, "--generate", 30, "--processor", "jetson-orin-nx")
    schedule = ("--budget", "0=0.3", "--budget", "1=0.05", "--noise-scale", 2.5, "--observe", 0.5, "--tokens", 512)
    code, out, err = run("simulate", *FAST, *options, "--adaptive", *schedule, "-o", tmp_path / "r")
    assert code == 0, err
    record = json.loads((tmp_path / "r" / "simulation.json").read_text())
    looks = record["looks"]
    assert len(looks) >= 4 and looks[0]["digital"] > looks[-1]["digital"] > 0 and looks[0]["moved"] == 0
    assert record["summary"]["action_j"] == pytest.approx(sum(look["action_j"] for look in looks))
    assert f"the policy looked {len(looks)} times" in out and record["analog"]["noise_scale"] == 2.5


BAD = [
    (("--max-batch", 0), "--max-batch 0 must be at least 1"),
    (("--adaptive", "--probes", 1), "--probes 1 must be at least 2"),
    (("--span", 0), "--span 0 must be a positive number of seconds"),
    (("--adaptive", "--observe", -1), "--observe -1 must be a positive number"),
    (("--adaptive", "--dwell", -1), "--dwell -1 must be a number of seconds of at least 0"),
    (("--schedule", "parallel"), "--schedule 'parallel' must be one of serial, overlap"),
    (("--rate", 0), "rate=0.0 must be finite and above 0"),
    (("--rate", 1e-9), "no request arrives"),
    (("--generate", 0.5), "output=0.5 must be finite and at least 1"),
    (("--trace", "absent.csv"), "absent.csv"),
    (("--budget", "0=1", "--probes", 4), "--budget, --probes: for --adaptive only"),
    (("--noise-scale", 2), "--noise-scale: for --adaptive only"),
    (("--device", "pcm"), "--device: for --adaptive only"),
    (("--trace", "absent.csv", "--rate", 2), "--rate: --trace says which requests arrive"),
    (("--trace", "absent.csv", "--prompt", 2, "--duration", 5), "--duration, --prompt: --trace says"),
    (("--adaptive", "--digital", 0.5), "--adaptive decides on the placement itself"),
    (("--adaptive", "--budget", "1=1"), "--budget '1=1': times must begin with 0"),
    (("--adaptive", "--noise", "0=0"), "--noise '0=0': the value must be from 0.001 to 1000"),
    (("--adaptive", "--device", "pmc"), "pmc"),
    (("--processor", "h300"), "h300"),
    (("--tokens", 0), "--tokens 0 must be at least 1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[" ".join(map(str, o)) for o, _ in BAD])
def test_bad_options_are_one_line(run, options, message) -> None:
    code, out, err = run("simulate", *options)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert "tokens per second" not in out


def test_an_output_that_exists_is_left_alone(run, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mine").touch()
    code, _, err = run("simulate", *FAST, "-o", tmp_path / "here")
    assert code == 2 and "here" in err


@pytest.mark.parametrize(
    ("adaptive", "size", "part", "message"),
    [
        # All experts take 12.6 MB, the rest 2.7 MB: one copy of some experts would fit 10 MB.
        (True, 10, "processor", ":6: .* capacity = 10 MB does not hold the 0.02 GB"),
        (False, 1, "processor", ":6: .* capacity = 1 MB does not hold"),
        (True, None, "chip", r": \[chip\] chips = 1 of 64 tiles are too few: the weights on chips need 384 tiles"),
    ],
)
def test_what_does_not_hold_the_model_is_named_with_its_line(
    run, tmp_path: Path, adaptive, size, part, message
) -> None:
    """With --adaptive both copies of every expert are resident."""
    path = tmp_path / "small.toml"
    if part == "processor":
        text = shipped_descriptions()["a100-80gb"].read_text()
        path.write_text(
            text.replace('capacity = { value = 80, unit = "GB"', f'capacity = {{ value = {size}, unit = "MB"')
        )
    else:
        text = shipped_descriptions()["ibm-3d-cim"].read_text()
        path.write_text(text.replace("[chip]\n", '[chip]\nchips = { value = 1, unit = "1", source = "mine" }\n'))
    code, _, err = run("simulate", *FAST, f"--{part}", path, *(("--adaptive",) if adaptive else ()))
    assert code == 2 and re.search(message, err), err
