"""CONFIG and its points: defaults, what is refused, which points exist."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from hetmoe.errors import InputError
from hetmoe.sweep.config import read_config
from hetmoe.sweep.points import expand, group_points

Write = Callable[..., Path]


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text('model = "reference"\n[grid]\ndevices = ["pcm"]\nnoise_scales = [0, 2.5]\n')
    assert read_config(path).record() == {
        "model": "reference", "dtype": "float32",
        "text": {"files": [], "tokens": 16384, "seq": 256, "batch": 16},
        "grid": {
            "placements": ["all_digital", "experts_analog", "all_analog"], "rules": [], "fractions": [],
            "devices": ["pcm"], "noise_scales": [0.0, 2.5], "times": ["programmed"], "bits": [8], "seeds": 8, "seed": 0,
            "scoring_scale": None,
        },
        "hardware": {
            "calibration": None, "input_range": "ema_std", "range_k": 12.0, "adc_bound": 3.0, "bound_axis": "tile",
            "tile_rows": 512,
            "drift_compensation": False, "down_axis": "hidden",
        },
        "execution": {"weights": "stored", "implementation": "xla"},
    }  # fmt: skip
    path.write_text(path.read_text() + '[hardware]\ninput_range = "dynamic"\n')
    assert read_config(path).hardware.adc_bound == 12


def test_the_scale_of_scoring_is_the_largest_unless_it_is_given(write_config: Write) -> None:
    grid = {"rules": '["measured", "random"]', "noise_scales": "[0, 5, 2]"}
    for changes, scale in (({}, 5.0), ({"noise_scales": "[0]"}, 1.0), ({"scoring_scale": "1.5"}, 1.5)):
        config = read_config(write_config(**(grid | changes)))
        assert config.grid.scoring_scale == scale == config.record()["grid"]["scoring_scale"]
    config = read_config(write_config(scoring_scale="1.5"))
    assert config.record()["grid"]["scoring_scale"] is None  # no rule is scored on hardware


BAD = [
    ({"head": "modle = 1"}, "unknown key 'modle'; valid are model, dtype, text, grid, hardware, execution"),
    ({"execution": "jobs = 2"}, "[execution] unknown key 'jobs'; valid are weights, implementation"),
    ({"execution": 'weights = "lazy"'}, "[execution] weights 'lazy' is unknown: use stored, layer, kernel"),
    ({"execution": 'implementation = "fast"'}, "[execution] implementation 'fast' is unknown: use xla, pallas"),
    ({"execution": 'implementation = "pallas"'}, "[execution] implementation pallas runs on TPU and NVIDIA GPU"),
    ({"head": 'dtype = "int8"'}, "dtype 'int8' is unknown"),
    ({"text": "window = 2"}, "[text] unknown key 'window'; valid are files, tokens, seq, batch"),
    ({"text": "tokens = 7"}, "Cannot overwrite"),
    ({"hardware": "tiles = 2"}, "[hardware] unknown key 'tiles'; valid are calibration, input_range"),
    ({"hardware": 'range_k = "big"'}, "[hardware] range_k = 'big' must be a number"),
    ({"hardware": "range_k = nan"}, "k=nan must be positive"),
    ({"hardware": "tile_rows = 0"}, "[hardware] tile_rows = 0 must be a whole number of at least 1"),
    ({"hardware": "drift_compensation = 1"}, "must be true or false"),
    ({"hardware": "drift_compensation = true"}, "drift_compensation needs a time"),
    ({"hardware": 'input_range = "guess"'}, "method 'guess' is unknown"),
    ({"hardware": 'bound_axis = "row"'}, "bound_axis='row'"),
    ({"hardware": 'down_axis = "rows"'}, "must be 'hidden' or 'output'"),
    ({"rule": '["random"]'}, "[grid] unknown key 'rule'; valid are placements, rules, fractions"),
    ({"rules": '["largest"]'}, "rules: unknown 'largest'; use max_neuron_norm, activation_frequency"),
    ({"devices": '["memristor"]'}, "devices: unknown 'memristor'; use pcm, hermes"),
    ({"placements": '["digital"]'}, "placements: unknown 'digital'; use all_digital, experts_analog, all_analog"),
    ({"devices": None}, "[grid] lacks 'devices'"),
    ({"devices": '"pcm"'}, "devices = 'pcm' must be a list"),
    ({"devices": "[]"}, "devices is empty"),
    ({"fractions": "[1.5]"}, "1.5 must be within"),
    ({"fractions": "[nan]"}, "nan must be within"),
    ({"fractions": "[true]"}, "must be a list of numbers"),
    ({"rules": "[]"}, "has fractions but no rules"),
    ({"fractions": None}, "has rules but no fractions"),
    ({"rules": None, "fractions": None, "placements": "[]"}, "neither placements nor rules"),
    ({"noise_scales": "[1, 1.0]"}, "noise_scales repeats 1.0"),
    ({"noise_scales": "[0, -0.0]"}, "noise_scales repeats 0.0"),
    ({"noise_scales": "[-1]"}, "noise_scale=-1.0 must be"),
    ({"noise_scales": "[inf]"}, "noise_scale=inf must be"),
    ({"times": '["later"]'}, "must be a list of numbers or 'programmed'"),
    ({"times": "[-5]"}, "time_s=-5.0 must be"),
    ({"times": '["programmed", 60]', "devices": '["pcm", "additive"]'}, "device 'additive': its source publishes no"),
    ({"times": "[60]", "devices": '["reram_wan"]'}, "1, 86400, 172800 s"),
    ({"bits": "[1]"}, "bits=1 must be"),
    ({"bits": "[8.0]"}, "must be a list of whole numbers"),
    ({"seeds": "0"}, "seeds = 0 must be a whole number of at least 1"),
    ({"seeds": "true"}, "seeds = True must be a whole number"),
    ({"seeds": "4000000"}, "points; at most 1,000,000 are possible"),
    ({"seed": "4294967296"}, "at most 4294967295"),
    ({"scoring_scale": "-2"}, "noise_scale=-2.0 must be"),
    ({"scoring_scale": '"largest"'}, "[grid] scoring_scale = 'largest' must be a number"),
    ({"noise_scales": "[]"}, "noise_scales is empty"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=lambda v: str(v) if isinstance(v, dict) else "")
def test_what_is_not_understood_is_refused(write_config: Write, changes: dict[str, str | None], message: str) -> None:
    path = write_config(**changes)
    with pytest.raises(InputError) as caught:
        expand(read_config(path))
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("model = ")
    (tmp_path / "latin.toml").write_bytes("# é".encode("latin-1"))
    for name, message in (
        ("absent.toml", "cannot be read"),
        ("bad.toml", "not readable as TOML"),
        ("latin.toml", "not readable as TOML"),
        (".", "cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            read_config(tmp_path / name)


def test_points_that_cannot_differ_between_seeds_exist_once(write_config: Write) -> None:
    config = read_config(
        write_config(
            rules='["router_norm", "random"]', fractions="[0.25, 0.5]", devices='["pcm", "reram_wan"]', seeds="3",
            noise_scales="[0, 2]", times='["programmed", 86400]', bits="[0, 8]",
        )
    )  # fmt: skip
    points = expand(config)
    assert len(set(points)) == len(points)
    count = Counter((p.placement, p.device, p.noise_scale, p.time_s) for p in points)
    assert count["all_digital", "none", 0, None] == 1 == sum(p.placement == "all_digital" for p in points)
    for placement, lines in (("experts_analog", 1), ("all_analog", 1), ("router_norm", 2)):
        assert count[placement, "pcm", 0, None] == lines * 2  # bits
        assert count[placement, "pcm", 2, None] == lines * 2 * 3  # bits, seeds
        assert count[placement, "pcm", 0, 86400] == lines * 2 * 3  # drift is random
        assert count[placement, "reram_wan", 0, 86400] == lines * 2  # its fits scale with c altogether
    assert count["random", "pcm", 0, None] == 2 * 2 * 3

    for group in group_points(points):
        assert len({(p.device, p.noise_scale, p.time_s, p.bits, p.seed_index) for p in group}) == 1
        assert len({p.placement == "all_analog" for p in group}) == 1
    assert sum(len(group) for group in group_points(points)) == len(points)
    # digital, then by hardware (2 x 2 x 2), scale and seed: three lines of seeds, all analog apart. At scale 0 without
    # drift seeds above 0 hold random placements alone.
    quiet, noisy = 3 + 1, 3 * 2
    assert len(group_points(points)) == 1 + 2 * (3 * quiet + noisy + 4 * noisy)
