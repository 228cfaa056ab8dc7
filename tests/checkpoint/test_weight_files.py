"""Which files hold the weights: shards and their index, links, what is not a file, and pickles."""

import os
import pathlib
import pickle
import shutil
import subprocess

import pytest

from hetmoe.checkpoint.load import load_model
from tests.checkpoint.golden_files import (
    GOLDEN,
    copy,
    load_refuses,
    read_tensors,
    shard,
    write_index,
    write_tensors,
)
from tests.models.directories import assert_same_bits

KEY = "model.layers.1.mlp.experts.2.down_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST = "model-00001-of-00003.safetensors"


@pytest.fixture(scope="module")
def expected():
    return load_model(GOLDEN / "olmoe_tiny").params


@pytest.fixture
def folder(tmp_path):
    return copy("olmoe_tiny", tmp_path / "model")


@pytest.fixture
def table(folder):
    """The index's table of `folder`, which is then in three shards."""
    return shard(folder, 3)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_shards_hold_what_one_file_does(folder, expected, parts):
    assert len(set(shard(folder, parts).values())) == parts
    assert_same_bits(load_model(folder).params, expected)


def test_single_file_goes_before_an_index(folder, expected):
    write_index(folder, {KEY: "absent.safetensors"})
    assert_same_bits(load_model(folder).params, expected)
    (folder / INDEX).write_text("not JSON")
    assert_same_bits(load_model(folder).params, expected)


@pytest.mark.usefixtures("table")
def test_files_that_the_index_does_not_name_are_not_read(folder, expected):
    (folder / "model-00004-of-00004.safetensors").write_bytes(b"nothing")
    (folder / "model.bin").write_bytes(b"nothing")
    assert_same_bits(load_model(folder).params, expected)


@pytest.mark.usefixtures("table")
def test_missing_shard_is_named(folder):
    (folder / FIRST).unlink()
    load_refuses(folder, str(folder / FIRST), "no such file", INDEX)


NAMES = [
    "../x.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", "./x.safetensors", "x.bin", "x.safetensors.bin",
    "", ".", "..", "safetensors", "x.safetensors/", 3, None, True, [], ["x.safetensors"], {}, "..\\x.safetensors/..",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_index_names_files_beside_it_only(folder, table, name):
    """A file that is there and valid, so that nothing but its name can be wrong."""
    (folder / "sub").mkdir()
    for place in (folder, folder.parent, folder / "sub"):
        shutil.copyfile(folder / table[KEY], place / "x.safetensors")
    write_index(folder, table | {KEY: name})
    load_refuses(folder, str(folder / INDEX), KEY, repr(name), "beside the index")


@pytest.mark.parametrize("name", ["a\0b.safetensors", "\ud800.safetensors", "a" * 300 + ".safetensors"])
def test_names_that_no_file_can_have_are_refused(folder, table, name):
    write_index(folder, {key: name if shard == table[KEY] else shard for key, shard in table.items()})
    load_refuses(folder, str(folder))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", "3", "{}", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": [1]}',
                '{"weight_map": "x.safetensors"}', '{"weight_map": ' * 5000, b"\xff"],
)  # fmt: skip
@pytest.mark.usefixtures("table")
def test_malformed_index_is_refused(folder, content):
    (folder / INDEX).write_bytes(content if isinstance(content, bytes) else content.encode())
    load_refuses(folder, str(folder / INDEX))


def test_index_and_shards_must_agree(folder, table):
    other = next(name for name in table.values() if name != table[KEY])
    write_index(folder, table | {"model.new": table[KEY]})
    load_refuses(folder, str(folder / table[KEY]), "lacks model.new", INDEX)
    write_index(folder, table | {KEY: other})
    load_refuses(folder, table[KEY], KEY, other)
    write_index(folder, {key: name for key, name in table.items() if key != KEY})
    load_refuses(folder, str(folder / table[KEY]), KEY, "places in None")


def test_key_in_two_shards_is_refused(folder, table):
    other = next(name for name in table.values() if name != table[KEY])
    tensors = read_tensors(folder / other)
    write_tensors(folder / other, tensors | {KEY: read_tensors(folder / table[KEY])[KEY]})
    load_refuses(folder, KEY, table[KEY])


@pytest.mark.usefixtures("table")
def test_damaged_shard_is_named(folder):
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-1])
    load_refuses(folder, str(folder / FIRST), "not a readable safetensors file")


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("relative", [False, True])
def test_links_out_of_the_directory_are_refused(folder, sharded, relative):
    """However valid the file that they lead to."""
    names = [FIRST, INDEX] if sharded else [SINGLE]
    if sharded:
        shard(folder, 3)
    for name in names:
        outside = folder.parent / name
        (folder / name).rename(outside)
        (folder / name).symlink_to(pathlib.Path("..") / name if relative else outside)
        load_refuses(folder, str(folder / name), f"leads to {outside}", "outside the model directory")
        (folder / name).unlink()
        outside.rename(folder / name)


def test_links_within_the_directory_are_followed(folder, expected, tmp_path):
    (folder / "weights").mkdir()
    (folder / SINGLE).rename(folder / "weights" / "blob")
    (folder / SINGLE).symlink_to("weights/blob")
    assert_same_bits(load_model(folder).params, expected)
    (tmp_path / "link").symlink_to(folder)  # a link to the directory itself is the user's choice
    assert_same_bits(load_model(tmp_path / "link").params, expected)


@pytest.mark.usefixtures("table")
def test_links_that_lead_nowhere_are_refused(folder):
    for name in (FIRST, INDEX):
        (folder / name).unlink()
        (folder / name).symlink_to("absent")
        load_refuses(folder, str(folder / name) if name == FIRST else SINGLE)
    (folder / INDEX).unlink()
    (folder / SINGLE).symlink_to("absent")
    load_refuses(folder, str(folder / SINGLE), "cannot be read")


@pytest.mark.parametrize("name", [SINGLE, INDEX, FIRST, "config.json"])
@pytest.mark.usefixtures("table")
def test_link_loops_are_refused(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(name)
    load_refuses(folder, str(folder))


@pytest.mark.parametrize("name", [SINGLE, INDEX, FIRST, "config.json", "tokenizer.json"])
@pytest.mark.usefixtures("table")
def test_directories_in_place_of_files_are_refused(folder, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).mkdir()
    load_refuses(folder, str(folder / name))


@pytest.mark.parametrize("name", [SINGLE, INDEX, FIRST, "config.json", "tokenizer.json"])
@pytest.mark.usefixtures("table")
def test_pipes_are_refused_at_once(folder, name):
    """Opening a pipe waits for a writer: one comes late, so that a loader that waits fails this test and ends."""
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    writer = subprocess.Popen(["sh", "-c", 'sleep 4; : <>"$0"', str(folder / name)])
    try:
        load_refuses(folder, str(folder / name))
        assert writer.poll() is None, "the loader waited for a writer"
    finally:
        writer.kill()
        writer.wait()


def test_pipe_called_like_a_record_of_a_conversion_is_none(folder, expected):
    os.mkfifo(folder / "hetmoe.json")
    assert_same_bits(load_model(folder).params, expected)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
@pytest.mark.parametrize("name", [INDEX, FIRST, "config.json"])
@pytest.mark.usefixtures("table")
def test_files_without_permission_are_refused(folder, name):
    (folder / name).chmod(0)
    load_refuses(folder, str(folder / name))


@pytest.fixture
def cache(tmp_path):
    """A snapshot in a cache as the hub's client makes it: links to blobs that are named by their hash."""
    root = tmp_path / "hub" / "models--owner--tiny"
    snapshot, blobs = root / "snapshots" / "abc", root / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", SINGLE):
        shutil.copyfile(GOLDEN / "olmoe_tiny" / name, blobs / f"hash-of-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-of-{name}")
    return root


def test_snapshot_of_the_hub_cache_loads(cache, expected, tmp_path):
    snapshot = cache / "snapshots" / "abc"
    assert_same_bits(load_model(snapshot).params, expected)
    (tmp_path / "link").symlink_to(snapshot)
    assert_same_bits(load_model(tmp_path / "link").params, expected)


def test_snapshot_may_not_lead_out_of_its_model(cache):
    snapshot = cache / "snapshots" / "abc"
    outside = cache.parent / "models--other--tiny" / "blobs" / "hash"
    outside.parent.mkdir(parents=True)
    (cache / "blobs" / f"hash-of-{SINGLE}").rename(outside)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to(outside)
    load_refuses(snapshot, str(snapshot / SINGLE), f"leads to {outside}")
    (snapshot / SINGLE).unlink()
    (cache / "blobs" / "chain").symlink_to(outside)  # by a link in between
    (snapshot / SINGLE).symlink_to("../../blobs/chain")
    load_refuses(snapshot, str(snapshot / SINGLE), f"leads to {outside}")


def test_directory_called_snapshots_alone_opens_nothing(tmp_path):
    folder = copy("olmoe_tiny", tmp_path / "snapshots" / "abc")
    (folder / SINGLE).rename(tmp_path / "weights")
    (folder / SINGLE).symlink_to(tmp_path / "weights")
    load_refuses(folder, f"leads to {tmp_path / 'weights'}")


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth", "pkl", "pickle", "ckpt"])
def test_pickles_are_refused_by_name_and_never_run(folder, tmp_path, suffix):
    marker = tmp_path / "was-run"
    content = pickle.dumps(Marker(marker))
    pickle.loads(content)
    assert marker.exists()
    marker.unlink()
    for name in (f"pytorch_model.{suffix}", "pytorch_model.bin.index.json", "training_args.bin", SINGLE, INDEX):
        if name == SINGLE:
            (folder / SINGLE).replace(tmp_path / "weights")
            load_refuses(folder, f"pytorch_model.{suffix}" if suffix == "bin" else suffix, "refused", "safetensors")
        (folder / name).write_bytes(content)
    load_refuses(folder, str(folder / SINGLE))
    (folder / SINGLE).unlink()
    load_refuses(folder, str(folder / INDEX))
    (folder / "config.json").write_bytes(content)
    load_refuses(folder, str(folder / "config.json"))
    assert not marker.exists()
