"""Saved models: shards, saving over another model, and what a save leaves that is stopped."""

import json
import pathlib

import jax.numpy as jnp
import pytest

from hetmoe.checkpoint import save
from hetmoe.checkpoint.load import load_model
from hetmoe.checkpoint.save import save_model
from hetmoe.errors import InputError
from tests.checkpoint.golden_files import outcome, read_tensors, refuses
from tests.models.directories import assert_same_bits, model
from tests.models.tiny import full_config, random_params


def test_shards_are_complete_and_always_the_same(tmp_path):
    original = model()
    for name in ("one", "two"):
        save_model(tmp_path / name, original, shard_bytes=5000)
        assert_same_bits(load_model(tmp_path / name).params, original.params)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two").iterdir())
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    shards = [name for name in files if name.endswith(".safetensors")]
    assert shards == [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    assert len(shards) > 5
    for name in shards:
        tensors = read_tensors(tmp_path / "one" / name)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 5000
    content = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text())
    total = sum(t.nbytes for name in shards for t in read_tensors(tmp_path / "one" / name).values())
    assert content["metadata"]["total_size"] == total
    refuses(lambda: save_model(tmp_path / "one", original, shard_bytes=0), "shard_bytes=0")


def test_saving_in_the_other_form_removes_the_first(tmp_path):
    first, second = model(), model(vocab_size=41)
    for size in (5000, 10**9, 3000, 5000):
        save_model(tmp_path / "model", first, shard_bytes=size)
        first, second = second, first
        assert_same_bits(load_model(tmp_path / "model").params, second.params)
    assert not (tmp_path / "model" / "model.safetensors").exists()


def test_saving_keeps_the_earlier_model_if_the_config_cannot_be_said(tmp_path):
    save_model(tmp_path / "model", model())
    config = full_config()
    unsayable = model().replace(config=config, params=random_params(config, 3))
    refuses(lambda: save_model(tmp_path / "model", unsayable))
    assert_same_bits(load_model(tmp_path / "model").params, model().params)


class Stop(BaseException):
    """No handler of errors sees it."""


def stop_at(patch, limit):
    """Lets `limit` changes to the file system pass and stops at the next; returns the list that counts them."""
    done = []

    def counted(function):
        def call(*arguments, **options):
            if len(done) == limit:
                raise Stop
            done.append(function)
            return function(*arguments, **options)

        return call

    patch.setattr(save, "save_file", counted(save.save_file))
    patch.setattr(save, "write_text", counted(save.write_text))
    for method in ("unlink", "replace"):
        patch.setattr(pathlib.Path, method, counted(getattr(pathlib.Path, method)))
    return done


def leave_shards(folder, earlier):
    """An index and shards of another model, beside the single file of `folder`, which goes before them."""
    other = folder.with_name(f"other-{folder.name}")
    save_model(other, earlier.replace(params=random_params(earlier.config, 4)), shard_bytes=5000)
    for path in other.glob("model*"):
        path.rename(folder / path.name)


@pytest.mark.parametrize(
    ("before", "after", "both"),
    [(10**9, 10**9, False), (5000, 10**9, False), (10**9, 5000, False), (5000, 4000, False), (10**9, 10**9, True)],
)
def test_save_stopped_anywhere_leaves_one_model_or_none(tmp_path, monkeypatch, before, after, both):
    """Stopped before each of its changes to the file system in turn, until one save gets through."""
    old, new = model(), model(jnp.bfloat16, vocab_size=41)
    outcomes, finished, folder, limit = [], False, tmp_path, 0
    while not finished:
        folder = tmp_path / str(limit)
        save_model(folder, old, shard_bytes=before)
        if both:
            leave_shards(folder, old)
        with monkeypatch.context() as patch:
            done = stop_at(patch, limit)
            try:
                save_model(folder, new, shard_bytes=after)
                finished = True
            except Stop:
                assert len(done) == limit
        found = outcome(lambda folder=folder: load_model(folder))
        if isinstance(found, InputError):
            outcomes.append("none")
        else:  # the new one, where only tidying up was left to do
            outcomes.append("old" if found.config == old.config else "new")
            assert_same_bits(found.params, old.params if found.config == old.config else new.params)
        limit += 1
    assert outcomes[0] == "old" and "none" in outcomes and outcomes[-1] == "new"
    assert outcomes == sorted(outcomes, key=["old", "none", "new"].index)
