"""Calibration files: what was saved comes back, and everything wrong is named."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hetmoe.analog.calibration import RangeMethod
from hetmoe.checkpoint.load import open_checkpoint
from hetmoe.errors import InputError
from hetmoe.evaluate.calibrate import calibrate
from hetmoe.evaluate.calibration_file import SavedCalibration, load_calibration, save_calibration, stored_adc_bound
from hetmoe.models.model import Model
from tests.models.tiny import random_params, random_tokens

# A model with dense layers and shared experts.
CONFIG = open_checkpoint(pathlib.Path(__file__).parents[1] / "golden" / "deepseek_v1_tiny").config
HOW = RangeMethod(k=5.0, min_tokens=3)


def made(seed: int = 0) -> Model:
    return Model(params=random_params(CONFIG, seed), config=CONFIG, tokenizer=None, eos_token_id=0, name=f"m{seed}")


@pytest.fixture(scope="module")
def saved() -> SavedCalibration:
    tokens = random_tokens(CONFIG, 1, (2, 9))
    ranges = calibrate(made().params, tokens, CONFIG, HOW, tile_rows=12)
    return SavedCalibration(calibration=ranges, adc_bound=2.5, bound_axis="column", how=HOW, made_by={"tokens": 18})


@pytest.fixture
def path(tmp_path: pathlib.Path, saved: SavedCalibration) -> pathlib.Path:
    save_calibration(tmp_path / "c.safetensors", saved, made())
    return tmp_path / "c.safetensors"


def test_round_trip(path: pathlib.Path, saved: SavedCalibration) -> None:
    found = load_calibration(path, made())
    jax.tree.map(np.testing.assert_array_equal, found.calibration, saved.calibration)
    assert jax.tree.structure(found.calibration) == jax.tree.structure(saved.calibration)  # tile_rows too
    assert (found.adc_bound, found.how, found.made_by) == (2.5, HOW, {"tokens": 18})
    assert stored_adc_bound(path) == 2.5
    assert load_calibration(path, made(), "column").bound_axis == "column"
    with pytest.raises(InputError, match="per column, not per tile"):
        load_calibration(path, made(), "tile")


def test_another_model_is_refused(path: pathlib.Path) -> None:
    with pytest.raises(InputError, match=r"made for model 'm0'.*not for 'm1'"):
        load_calibration(path, made(1))


def rewritten(path: pathlib.Path, metadata: Any, record: Any, tensors: Any = lambda t: t) -> None:
    """Writes the file again with its record, its metadata or its tensors changed."""
    content = path.read_bytes()
    found = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    changed = {k: v for k, v in (json.loads(found["record"]) | record).items() if v is not None}
    written = {k: v for k, v in (found | metadata | {"record": json.dumps(changed)}).items() if v is not None}
    save_file(tensors(load_file(path)), path, written)


@pytest.mark.parametrize(
    ("metadata", "record", "message"),
    [
        ({"format": "hetmoe-calibration-9"}, {}, "format 'hetmoe-calibration-9'"),
        ({"format": None}, {}, "not a calibration file"),
        ({}, {"adc_bound": -1.0}, "adc_bound=-1.0"),
        ({}, {"adc_bound": "3"}, "adc_bound='3'"),
        ({}, {"tile_rows": None}, "lacks one of"),
        ({}, {"method": {"k": -1.0}}, "k=-1.0"),
        ({}, {"method": {"kk": 1.0}}, "malformed"),
    ],
)
def test_changed_records_are_refused(path: pathlib.Path, metadata: Any, record: Any, message: str) -> None:
    rewritten(path, metadata, record)
    with pytest.raises(InputError, match=message):
        load_calibration(path, made())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda t: t | {"lm_head": t["lm_head"] * np.float32(np.nan)}, "lm_head must be float32, finite"),
        (lambda t: t | {"lm_head": -t["lm_head"]}, "lm_head must be float32, finite and at least 0"),
        (lambda t: t | {"lm_head": t["lm_head"].astype(np.float16)}, "lm_head must be float32"),
        (lambda t: {k: v for k, v in t.items() if k != "tokens_seen"}, "malformed"),
    ],
)
def test_changed_ranges_are_refused(path: pathlib.Path, tensors: Any, message: str) -> None:
    rewritten(path, {}, {}, tensors)
    with pytest.raises(InputError, match=message):
        load_calibration(path, made())


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, b"PK\x03\x04 not a file of ours", b"\xff" * 64])
def test_other_files_are_refused(tmp_path: pathlib.Path, content: bytes) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(content)
    for read in (stored_adc_bound, lambda p: load_calibration(p, made())):
        with pytest.raises(InputError, match=r"other\.safetensors: not a calibration file"):
            read(other)
        with pytest.raises(InputError, match="absent: cannot be read"):
            read(tmp_path / "absent")


def test_a_model_in_16_bits_has_the_same_calibration(path: pathlib.Path) -> None:
    model = made()
    low = Model(
        params=jax.tree.map(lambda p: p.astype(jnp.bfloat16), model.params), config=CONFIG, tokenizer=None,
        eos_token_id=0, name="low",
    )  # fmt: skip
    assert load_calibration(path, low).adc_bound == 2.5
