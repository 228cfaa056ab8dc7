"""Converted models: bit by bit there and back, and what interruptions and damage leave."""

import json
import os
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.load import load_model, open_checkpoint
from hetmoe.checkpoint.save import save_model
from tests.checkpoint.golden_files import FOLDERS, GOLDEN, ROOT, copy, load_refuses, read_tensors, refuses
from tests.models.directories import assert_same_bits, model, tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*predict further tokens:hetmoe.errors.CheckpointWarning")
FUSED = {"olmoe_fused": "olmoe_tiny", "mixtral_fused": "mixtral_tiny"}


@pytest.mark.parametrize("name", FOLDERS)
def test_conversion_there_and_back_keeps_every_bit(name, tmp_path):
    original = load_model(GOLDEN / name)
    orbax_directory.write(tmp_path / "converted", original)
    converted = load_model(tmp_path / "converted")
    save_model(tmp_path / "saved", converted)
    saved = load_model(tmp_path / "saved")
    for again in (converted, saved):
        assert_same_bits(again.params, original.params)
        assert again.config == original.config
        assert (again.eos_token_id, again.bos_token_id) == (original.eos_token_id, original.bos_token_id)
    found = read_tensors(tmp_path / "saved" / "model.safetensors")
    if name != "deepseek_v3_fp8":  # which is saved as bfloat16
        expected = read_tensors(GOLDEN / FUSED.get(str(name), str(name)) / "model.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape)
            assert found[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("asked", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_conversion_loads_in_any_dtype(tmp_path, stored, asked):
    original = model(stored)
    orbax_directory.write(tmp_path / "converted", original)
    found, expected = load_model(tmp_path / "converted", asked).params, original.params
    for get in (lambda p: p.embed, lambda p: p.layers.moe.experts.down, lambda p: p.final_norm):
        assert get(found).dtype == jnp.dtype(asked)
        assert np.asarray(get(found)).tobytes() == np.asarray(get(expected)).astype(jnp.dtype(asked)).tobytes()


def test_tokenizer_and_token_ids_go_along(tmp_path):
    original = model(words=tokenizer({"a": 0, "b": 1})).replace(bos_token_id=7)
    orbax_directory.write(tmp_path / "converted", original)
    save_model(tmp_path / "saved", load_model(tmp_path / "converted"))
    for name in ("converted", "saved"):
        loaded = load_model(tmp_path / name)
        assert (loaded.name, loaded.eos_token_id, loaded.bos_token_id) == (name, 39, 7)
        assert loaded.tokenizer.get_vocab() == {"a": 0, "b": 1}


class Stop(BaseException):
    """No handler of errors sees it."""


@pytest.mark.parametrize("error", [OSError("disk full"), Stop()])
@pytest.mark.parametrize("broken", ["save", "tokenizer", "record", "rename"])
def test_conversion_stopped_anywhere_leaves_nothing(tmp_path, monkeypatch, error, broken):
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        if broken == "save":
            patch.setattr(ocp.StandardCheckpointer, "save", fail)
        elif broken == "tokenizer":
            patch.setattr(orbax_directory, "config_to_hf", fail)
        elif broken == "record":
            patch.setattr("pathlib.Path.write_text", fail)
        else:
            patch.setattr("os.replace", fail)
        with pytest.raises(type(error)):
            orbax_directory.write(tmp_path / "new", model(words=tokenizer({"a": 0})))
    assert list(tmp_path.iterdir()) == []
    orbax_directory.write(tmp_path / "new", model())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_killed_conversion_leaves_no_target_and_nothing_that_loads(tmp_path):
    """`kill -9` at several moments after it began; what it was writing is there, and refused."""
    script = f"""
import sys, pathlib
from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.orbax_directory import write
loaded = load_model({str(GOLDEN / "deepseek_v2_tiny")!r})
print("loaded", flush=True)
for number in range(1000):
    write(pathlib.Path(sys.argv[1]) / str(number), loaded)
"""
    leftovers = 0
    for moment in (0.0, 0.02, 0.05, 0.1, 0.3):
        folder = tmp_path / str(moment)
        folder.mkdir()
        process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"loaded\n"
        while not any(folder.iterdir()):
            time.sleep(0.001)
        time.sleep(moment)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in folder.iterdir():
            if path.name.isdigit():
                assert_same_bits(load_model(path).params, load_model(GOLDEN / "deepseek_v2_tiny").params)
            elif not (path / "hetmoe.json").exists():
                leftovers += 1
                load_refuses(path, str(path))
    assert leftovers > 0


@pytest.mark.parametrize("kind", ["file", "directory", "model", "link"])
def test_existing_targets_are_refused(tmp_path, kind):
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("mine")
    elif kind == "model":
        orbax_directory.write(target, model())
    else:
        (tmp_path / "real" if kind == "link" else target).mkdir()
        if kind == "link":
            target.symlink_to("real")
        (target / "mine").write_text("mine")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    refuses(lambda: orbax_directory.write(target, model()), str(target), "exists")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_empty_directories_may_be_filled(tmp_path):
    (tmp_path / "target").mkdir()
    orbax_directory.write(tmp_path / "target", model())
    assert_same_bits(load_model(tmp_path / "target").params, model().params)
    assert (tmp_path / "target").stat().st_mode & 0o777 == 0o755


def test_the_two_kinds_do_not_mix(tmp_path):
    orbax_directory.write(tmp_path / "converted", model())
    refuses(lambda: save_model(tmp_path / "converted", model()), "Orbax")
    refuses(lambda: open_checkpoint(tmp_path / "converted"), "Orbax")
    folder = copy("olmoe_tiny", tmp_path / "saved")
    refuses(lambda: orbax_directory.write(folder, model()), str(folder), "exists")


@pytest.fixture
def converted(tmp_path):
    orbax_directory.write(tmp_path / "converted", model())
    return tmp_path / "converted"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": "hetmoe-params-2"}, ("hetmoe-params-1",)),
        ({"format": None}, ("hetmoe-params-1",)),
        ({"dtype": "int8"}, ("int8", "bfloat16")),
        ({"dtype": None}, ("dtype",)),
        ({"dtype": ["float32"]}, ("dtype",)),
        ({"config": None}, ("JSON object",)),
        ({"config": []}, ("JSON object",)),
        ({"config": {}}, ("model_type",)),
        ({"eos_token_id": 40}, ("eos_token_id=40", "vocab_size=40")),
        ({"bos_token_id": -1}, ("bos_token_id=-1",)),
        ({"bos_token_id": True}, ("bos_token_id=True",)),
        ({"eos_token_id": [1]}, ("eos_token_id=[1]",)),
    ],
)
def test_damaged_records_are_refused(converted, changes, words):
    path = converted / "hetmoe.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    load_refuses(converted, str(path), *words)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"3", b"\xff", b"[" * 10**5])
def test_unreadable_records_are_refused(converted, content):
    (converted / "hetmoe.json").write_bytes(content)
    load_refuses(converted, str(converted / "hetmoe.json"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 41, ("embed", "[40, 23]", "[41, 23]")),
        ("vocab_size", 10**12, ("embed", "[40, 23]", "[1000000000000, 23]")),
        ("num_hidden_layers", 3, ("has shape", "expected [3,")),
        ("tie_word_embeddings", True, ("1 parameters do not belong", "lm_head")),
    ],
)
def test_trees_of_other_configs_are_refused(converted, field, value, words):
    path = converted / "hetmoe.json"
    content = json.loads(path.read_text())
    content["config"][field] = value
    path.write_text(json.dumps(content))
    load_refuses(converted, str(converted / "params"), *words)


# Orbax leaves coroutines behind that nobody awaited.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning")
def test_damaged_trees_are_refused(converted):
    for path in [path for path in (converted / "params").rglob("*") if path.is_file()]:
        content = path.read_bytes()
        flipped = content[:-1] + bytes([content[-1] ^ 1])  # which Orbax alone would load
        for spoilt in {b"", content[: len(content) // 2], content + b"x", flipped} - {content}:
            path.write_bytes(spoilt)
            load_refuses(converted, str(converted / "params"), "hetmoe.json lists")
        path.unlink()
        load_refuses(converted, str(converted / "params"), "hetmoe.json lists")
        path.write_bytes(content)
    assert_same_bits(load_model(converted).params, model().params)


def test_absent_trees_are_refused(converted):
    (converted / "params").rename(converted / "elsewhere")
    load_refuses(converted, str(converted / "params"), "hetmoe.json lists")
