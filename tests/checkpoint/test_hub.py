"""Models by their name on the hub: its client's errors in one line, its cache, and names that never reach it."""

import fnmatch
import shutil
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from hetmoe.checkpoint.hub import looks_like_hub_id
from hetmoe.checkpoint.load import load_model
from tests.checkpoint.golden_files import GOLDEN, refuses
from tests.models.directories import assert_same_bits

NAME = "owner/name"


class Response:
    """What errors of the hub's client ask of an answer."""

    def __init__(self):
        self.headers, self.status_code, self.request = {}, 403, None


def answered(kind):
    return kind("refused\nfor some reason", response=Response())


@pytest.fixture
def client(monkeypatch):
    """The calls of the hub's client; each raises `fails[0]`."""
    calls, fails = [], [AssertionError("was called")]

    def download(name, **arguments):
        calls.append((name, arguments))
        raise fails[0]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls, fails


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (answered(errors.GatedRepoError), ("permission", f"https://huggingface.co/{NAME}", "hf auth login")),
        (answered(errors.RevisionNotFoundError), ("no revision 'v2'",)),
        (answered(errors.RepositoryNotFoundError), ("does not exist", "hf auth login")),
        (answered(errors.HfHubHTTPError), (f"hf download {NAME}", "HfHubHTTPError")),
        (answered(errors.DisabledRepoError), ("DisabledRepoError",)),
        (answered(errors.RemoteEntryNotFoundError), ("RemoteEntryNotFoundError",)),
        (errors.LocalEntryNotFoundError("no\nentry"), ("hub's cache", f"hf download {NAME}")),
        (errors.OfflineModeIsEnabled("offline"), ("hub's cache",)),
        (errors.FileMetadataError("none"), ("FileMetadataError",)),
        (errors.XetDownloadError("broken"), ("XetDownloadError",)),
        (ConnectionError("no route"), ("ConnectionError", "cannot be reached")),
        (TimeoutError("too late"), ("TimeoutError",)),
        (OSError(28, "No space left on device"), ("cannot be stored", "No space left")),
        (PermissionError(13, "cache"), ("cannot be stored", "cache")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_client_become_one_line(client, error, words):
    calls, fails = client
    fails[0] = error
    message = refuses(lambda: load_model(f"{NAME}@v2"), f"model '{NAME}@v2'", *words)
    assert "\n" not in message
    assert [(name, arguments["revision"]) for name, arguments in calls] == [(NAME, "v2")]


def test_errors_of_its_network_library_become_one_line(client):
    library = sys.modules[errors.HfHubHTTPError.__mro__[1].__module__.split(".")[0]]  # httpx, or its successor
    for kind in ("ConnectError", "ReadTimeout", "ProxyError", "RemoteProtocolError"):
        client[1][0] = getattr(library, kind)("no answer")
        assert "\n" not in refuses(lambda: load_model(NAME), NAME)


def test_interruption_is_not_an_error_of_the_model(client):
    client[1][0] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load_model(NAME)


def test_only_what_a_model_needs_is_asked_for(client):
    client[1][0] = OSError()
    refuses(lambda: load_model(NAME), NAME)
    ((name, arguments),) = client[0]
    assert (name, arguments["revision"]) == (NAME, None)
    patterns = arguments["allow_patterns"]

    def asked_for(file):
        return any(fnmatch.fnmatch(file, pattern) for pattern in patterns)

    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert all(asked_for(file) for file in ("config.json", "model.safetensors", "tokenizer.json", *shards))
    others = ("pytorch_model.bin", "model.pt", "modeling_x.py", "tf_model.h5", "training_args.bin", "model.ckpt.index")
    assert not any(asked_for(file) for file in others)


NO_IDS = [
    "", "name", "a/b/c", "../x", "./x", "x/..", "x/.", "/x/y", "a//b", "a/", "/b", "~/x", "a b/c", "a/b c", " a/b",
    "a/b ", "a/b\n", "-a/b", "a/-b", ".a/b", "a/.b", "a\\b", "C:/x", "https://huggingface.co/a/b", "a/b@", "@v2",
    "a/b@v@w",
    "a/b@..", "a/b@x/../y", "a..b/c", "a/b?x", "a/b#x", "a/*", "a/b:x", "\0/b", "a/b%2f",
]  # fmt: skip


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_name_never_reaches_the_client(client, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not looks_like_hub_id(name)
    refuses(lambda: load_model(name), repr(name), "no such directory")
    assert client[0] == []


@pytest.mark.parametrize("name", ["a/b-", "a/b.", "owner/na--me", "a/b.git", f"a/{'x' * 97}", "own\u00e9r/b"])
def test_names_that_the_hub_would_not_take_are_refused(name):
    """By its client, before it asks anyone."""
    refuses(lambda: load_model(name), name)


@pytest.mark.parametrize(
    "name", ["allenai/OLMoE-1B-7B-0924", "a/b", "a_b/c.d-e_f", "0/1", "a/b@main", "a/b@refs/pr/1", "a/b@v1.0"]
)
def test_names_are_known_as_such(name):
    assert looks_like_hub_id(name)


def test_what_exists_on_disk_is_never_fetched(client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    shutil.copytree(GOLDEN / "olmoe_tiny", folder)
    assert load_model(NAME).name == "name"
    shutil.rmtree(folder)
    folder.write_text("a file")
    refuses(lambda: load_model(NAME), NAME, "is a file; give the directory")
    folder.unlink()
    refuses(lambda: load_model(folder), str(folder), "no such directory")  # paths are no names
    assert client[0] == []


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache in the layout of the hub's client, with one model; and no network."""
    root = tmp_path / "hub" / "models--owner--name"
    snapshot, blobs, commit = root / "snapshots" / ("a" * 40), root / "blobs", "a" * 40
    for folder in (snapshot, blobs, root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(GOLDEN / "olmoe_tiny" / name, blobs / f"hash-{name}")
        (snapshot / name).symlink_to(f"../../blobs/hash-{name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return root


@pytest.mark.usefixtures("cache")
def test_cached_models_load_by_name():
    expected = load_model(GOLDEN / "olmoe_tiny")
    for name in (NAME, f"{NAME}@main", f"{NAME}@{'a' * 40}"):
        model = load_model(name)
        assert_same_bits(model.params, expected.params)
        assert (model.name, model.config, model.eos_token_id) == (name, expected.config, 127)


@pytest.mark.usefixtures("cache")
def test_what_the_cache_lacks_is_said():
    for name in ("owner/other", f"{NAME}@v2", f"{NAME}@{'b' * 40}"):
        message = refuses(lambda name=name: load_model(name), name, "hub's cache", "hf download")
        assert "\n" not in message


def test_cache_without_weights_is_said(cache):
    """A download of the config alone leaves such a snapshot."""
    snapshot = next((cache / "snapshots").iterdir())
    (snapshot / "model.safetensors").unlink()
    message = refuses(lambda: load_model(NAME))
    assert "model.safetensors" in message or "hub's cache" in message
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    refuses(lambda: load_model(NAME))
