"""Model directories: exact round trips, saves that are interrupted, and everything wrong around the weights."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import SafetensorError

from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import InputError
from hetmoe.models.config import Rope
from hetmoe.models.model import Model, fingerprint, model_fingerprint
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
    assert model_fingerprint(loaded) == model_fingerprint(saved)
    again = tmp_path / "again"
    save_model(again, loaded)
    assert (again / "model.safetensors").read_bytes() == (tmp_path / "deeper/model/model.safetensors").read_bytes()


def test_fingerprint_tells_models_apart() -> None:
    one = model()
    others = [
        model(rope=Rope(theta=50.0)),
        dataclasses.replace(one, params=random_params(tiny_config(num_layers=2, num_experts=3), 4)),
    ]
    assert len({model_fingerprint(m) for m in (one, *others)}) == 3
    assert fingerprint(one.config, one.params.layers.moe.router) == model_fingerprint(one)
    narrow = dataclasses.replace(one, params=jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), one.params))
    assert model_fingerprint(narrow) == model_fingerprint(one)  # whether loaded as float32 or bfloat16


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
    refused(tmp_path / "nothing", str(tmp_path / "nothing"), "no such directory", "reference")
    refused(tmp_path / "file", str(tmp_path / "file"), "is a file", "directory")


def test_config_must_be_there_and_readable(folder: pathlib.Path) -> None:
    (folder / "config.json").write_text("{")
    refused(folder, str(folder / "config.json"), "JSON")
    (folder / "config.json").unlink()
    refused(folder, str(folder / "config.json"), "no such file")


def set_fields(folder: pathlib.Path, **fields: Any) -> None:
    """Changes some fields of the config."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize("name", ["eos_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", [40, -1, True, 2.0, "2", [], [1, 40], [40, 1], [[1]], [None]])
def test_special_tokens_must_be_tokens(folder: pathlib.Path, name: str, value: Any) -> None:
    set_fields(folder, **{name: value})
    refused(folder, "config.json", f"{name}={value!r}", "vocab_size=40")


def test_special_tokens(folder: pathlib.Path) -> None:
    """The first of several serves; a document begins with the beginning-of-text token or, without one, the end."""
    cases = [((39, None), (39, None, 39)), (([7, 5], 3), (7, 3, 3)), ((None, None), (None, None, None)),
             ((None, 0), (None, 0, 0))]  # fmt: skip
    for (eos, bos), (end, begin, start) in cases:
        set_fields(folder, eos_token_id=eos, bos_token_id=bos)
        loaded = load_model(folder)
        assert (loaded.eos_token_id, loaded.bos_token_id, loaded.start_token_id) == (end, begin, start)
        save_model(folder, loaded)
        again = load_model(folder)
        assert (again.eos_token_id, again.bos_token_id) == (end, begin)


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


def state(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NEW = model(jnp.bfloat16, tokenizer({"z": 0}), vocab_size=41)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (OSError("disk full"), InputError),
        (SafetensorError("disk full"), InputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
@pytest.mark.parametrize("at", [0, 2])
def test_interrupted_writing_of_weights_leaves_the_old_model(
    folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch, at: int, error: BaseException, seen: type
) -> None:
    before, calls = state(folder), []

    def half(tensors: dict[str, np.ndarray], target: pathlib.Path, **_: Any) -> None:
        pathlib.Path(target).write_bytes(before["model.safetensors"][:1000])
        calls.append(tensors)
        if len(calls) > at:
            raise error

    monkeypatch.setattr("hetmoe.checkpoint.save.save_file", half)
    with pytest.raises(seen, match="disk full" if seen is InputError else None):
        save_model(folder, NEW, shard_bytes=10_000)
    assert len(calls) == at + 1
    monkeypatch.undo()
    assert state(folder) == before  # and no temporary file is left
    assert_same_bits(load_model(folder).params, model().params)


@pytest.mark.parametrize("old_shard", [10**9, 10_000])
@pytest.mark.parametrize("new_shard", [10**9, 10_000])
def test_save_that_is_interrupted_anywhere_never_mixes_two_models(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, old_shard: int, new_shard: int
) -> None:
    """At every step that changes the directory: the old model, the new one, or one that lacks weights."""
    old = model(words=tokenizer({"a": 0, "b": 1}))
    outcomes = []
    for last in range(100):
        folder = tmp_path / str(last)
        save_model(folder, old, shard_bytes=old_shard)
        steps = 0

        def counted(function: Any, last: int = last) -> Any:
            def step(*arguments: Any, **options: Any) -> Any:
                nonlocal steps
                steps += 1
                if steps > last:
                    raise KeyboardInterrupt
                return function(*arguments, **options)

            return step

        for name in ("replace", "unlink"):
            monkeypatch.setattr(pathlib.Path, name, counted(getattr(pathlib.Path, name)))
        try:
            save_model(folder, NEW, shard_bytes=new_shard)
        except KeyboardInterrupt:
            finished = False
        else:
            finished = True
        monkeypatch.undo()
        outcomes.append(outcome(folder, old))
        if finished:
            break
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert "no weights" in outcomes
    assert outcomes == sorted(outcomes, key=["old", "no weights", "new"].index)


def outcome(folder: pathlib.Path, old: Model) -> str:
    """Which model the directory holds; fails if it loads as neither."""
    if not (folder / "model.safetensors").exists() and not (folder / "model.safetensors.index.json").exists():
        refused(folder, "no such file")
        return "no weights"
    loaded = load_model(folder)
    expected = old if loaded.config == old.config else NEW
    assert_same_bits(loaded.params, expected.params)
    assert loaded.tokenizer.get_vocab() == expected.tokenizer.get_vocab()
    return "old" if expected is old else "new"


def test_shards_give_the_same_model(tmp_path: pathlib.Path) -> None:
    whole = model(words=tokenizer({"a": 0}))
    counts: list[int] = []
    table: dict[str, str] = {}
    for size in (10**9, 10_000, 1):
        folder = tmp_path / "model"  # over each other: files of the earlier one may not stay
        save_model(folder, whole, shard_bytes=size)
        assert_same_bits(load_model(folder).params, whole.params)
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        counts.append(len(files))
        if len(files) == 1:
            assert files == ["model.safetensors"] and not (folder / "model.safetensors.index.json").exists()
        else:
            assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
            table = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
            assert sorted(set(table.values())) == files
            for content in (path.read_bytes() for path in folder.glob("*.safetensors")):
                header = int.from_bytes(content[:8], "little")
                alone = content[8 : 8 + header].count(b"data_offsets") == 1  # a tensor is not cut
                assert len(content) - 8 - header <= size or alone
    assert counts[0] == 1 < counts[1] < counts[2] == len(table)
    save_model(folder, whole)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    with pytest.raises(InputError, match="shard_bytes=0"):
        save_model(folder, whole, shard_bytes=0)


def test_a_tokenizer_does_not_outlive_its_model(folder: pathlib.Path) -> None:
    save_model(folder, model())
    assert not (folder / "tokenizer.json").exists()
