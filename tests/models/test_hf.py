"""Model directories: exact round trips, saves that are interrupted, and everything wrong around the weights."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hetmoe.models import hf
from hetmoe.models.hf import load_model, save_model
from tests.models.directories import assert_same_bits, model, refused, save_valid, tokenizer
from tests.models.tiny import random_params, tiny_config


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    return save_valid(tmp_path / "model")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_keeps_every_bit(tmp_path: pathlib.Path, dtype: Any, tied: bool) -> None:
    saved = model(dtype, tokenizer({"a": 0, "b": 1, "c": 39}), tie_embeddings=tied, clip_qkv=0.5)
    save_model(tmp_path / "deeper" / "model", saved)
    loaded = load_model(str(tmp_path / "deeper" / "model"))
    assert_same_bits(loaded.params, saved.params)
    assert (loaded.config, loaded.eos_token_id, loaded.name) == (saved.config, 39, "model")
    assert loaded.tokenizer is not None
    assert loaded.tokenizer.get_vocab() == {"a": 0, "b": 1, "c": 39}
    assert hf.fingerprint(loaded) == hf.fingerprint(saved)
    again = tmp_path / "again"
    save_model(again, loaded)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "deeper/model/model.safetensors").read_bytes()


def test_fingerprint_tells_models_apart() -> None:
    one = model()
    others = [
        model(rope_theta=50.0),
        dataclasses.replace(one, params=random_params(tiny_config(num_layers=2, num_experts=3), 4)),
    ]
    assert len({hf.fingerprint(m) for m in (one, *others)}) == 3


def test_saving_over_a_model_replaces_it(folder: pathlib.Path) -> None:
    other = model(jnp.bfloat16, vocab_size=41)
    save_model(folder, other)
    assert_same_bits(load_model(folder).params, other.params)
    assert load_model(folder).config == other.config
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_dtype_is_converted_when_asked_for(folder: pathlib.Path) -> None:
    stored = load_model(folder).params
    for asked in ("bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)):
        assert_same_bits(load_model(folder, asked).params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), stored))
    save_model(folder, model(jnp.bfloat16))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), load_model(folder).params)
    assert_same_bits(load_model(folder, "float32").params, wide)


@pytest.mark.parametrize("dtype", ["int8", "float64", "", jnp.int32, jnp.float64, bool])
def test_dtype_that_cannot_be_given_is_refused(folder: pathlib.Path, dtype: Any) -> None:
    refused(folder, "dtype", "bfloat16", dtype=dtype)  # the message lists what can


def test_directory_must_exist(tmp_path: pathlib.Path) -> None:
    (tmp_path / "file").write_text("")
    for missing in (tmp_path / "nothing", tmp_path / "file"):
        refused(missing, str(missing), "directory", "reference")


def test_config_must_be_there_and_readable(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, str(folder / "config.json"), "JSON")
    (folder / "config.json").unlink()
    refused(folder, str(folder / "config.json"), "no such file")


@pytest.mark.parametrize("value", [40, -1, True, 2.0, "2", [1, 2]])
def test_eos_must_be_a_token(folder: pathlib.Path, value: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": value}))
    refused(folder, "config.json", f"eos_token_id={value!r}", "vocab_size=40")


def test_weights_must_be_there(folder: pathlib.Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, str(folder / "model.safetensors"), "no such file")
    (folder / "model.safetensors").mkdir()
    refused(folder, str(folder / "model.safetensors"))


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff\xfe\x00", b'{"model": 3}', b"x" * 1000])
def test_malformed_tokenizer_is_refused(folder: pathlib.Path, content: bytes) -> None:
    (folder / "tokenizer.json").write_bytes(content)
    refused(folder, str(folder / "tokenizer.json"), "not a tokenizers file")


@pytest.mark.parametrize("vocab", [{f"word{i}": i for i in range(41)}, {"a": 0, "b": 40}, {"a": 0, "b": 1000}])
def test_tokenizer_whose_ids_the_model_lacks_is_refused(folder: pathlib.Path, vocab: dict[str, int]) -> None:
    tokenizer(vocab).save(str(folder / "tokenizer.json"))
    refused(folder, str(folder / "tokenizer.json"), "vocab_size=40")


def test_tokenizer_may_fill_the_vocabulary_or_be_absent(folder: pathlib.Path) -> None:
    tokenizer({f"word{i}": i for i in range(40)}).save(str(folder / "tokenizer.json"))
    loaded = load_model(folder).tokenizer
    assert loaded is not None
    assert loaded.encode("word39").ids == [39]
    (folder / "tokenizer.json").unlink()
    assert load_model(folder).tokenizer is None


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("broken", ["save_file", "os.replace"])
def test_interrupted_save_leaves_the_old_model(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, broken: str, error: BaseException
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(source: Any, target: Any, **_: Any) -> None:
        if isinstance(source, dict):
            pathlib.Path(target).write_bytes(before["model.safetensors"][:1000])
        raise error

    monkeypatch.setattr(f"hetmoe.models.hf.{broken}", half)
    with pytest.raises(type(error)):
        save_model(folder, model(jnp.bfloat16, tokenizer({"z": 0}), vocab_size=41))
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # and no temporary file is left
    assert_same_bits(load_model(folder).params, model().params)
