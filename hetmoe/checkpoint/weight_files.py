"""Which files of a model directory hold its weights, and what is in them."""

import re
import threading
from pathlib import Path

import numpy as np

from hetmoe.checkpoint.safetensors_file import MappedFile, StoredTensor, read_header
from hetmoe.errors import InputError
from hetmoe.models.hf_fields import read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


class WeightFiles:
    """All tensors of a model directory by key; opened only when a value is asked for."""

    def __init__(self, directory: Path, tensors: dict[str, StoredTensor]) -> None:
        self.directory, self.tensors = directory, tensors
        self._maps: dict[Path, MappedFile] = {}
        self._lock = threading.Lock()

    def view(self, key: str) -> np.ndarray:
        """Values of a tensor, read-only, straight from the file's pages."""
        return self._file(key).view(self.tensors[key])

    def release(self, key: str, row: int | None = None) -> None:
        """Gives back the pages of a tensor that was read, or of one of its rows."""
        self._file(key).release(self.tensors[key], row)

    def where(self, key: str) -> str:
        """File and key, for messages."""
        return f"{self.tensors[key].path}: {key}"

    def _file(self, key: str) -> MappedFile:
        path = self.tensors[key].path
        with self._lock:
            if path not in self._maps:
                self._maps[path] = MappedFile(path)
            return self._maps[path]


def open_weights(directory: Path) -> WeightFiles:
    """Finds the safetensors files of a directory, single or sharded, and reads their headers.

    `model.safetensors` goes before an index, as in transformers. Nothing is ever unpickled.

    Raises:
        InputError: if there are none, a file is malformed, leads out of the directory, or disagrees with the index.
    """
    single, index = directory / SINGLE, directory / INDEX
    if single.exists() or single.is_symlink():
        return WeightFiles(directory, read_header(inside(directory, single)))
    if index.exists():
        return WeightFiles(directory, _sharded(directory, index))
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{directory}: holds {pickles[0]} but no {SINGLE}; pickled weights can run code and are refused: convert "
            "them to safetensors first"
        )
    raise InputError(f"{single}: no such file, and no {INDEX} either; weights are read from safetensors only")


def inside(directory: Path, path: Path) -> Path:
    """The path itself, once it is certain that its target is a file in the directory (or its hub cache's blobs).

    Raises:
        InputError: if it is not.
    """
    try:
        target, root = path.resolve(strict=True), directory.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if root.parent.name == "snapshots" and (root.parent.parent / "blobs").is_dir():
        root = root.parent.parent  # a snapshot of the hub's cache: its files are links to ../../blobs
    if not target.is_relative_to(root):
        raise InputError(f"{path}: leads to {target}, outside the model directory; copy or hard-link the file instead")
    if not target.is_file():
        raise InputError(f"{path}: is not a file")
    return path


def _sharded(directory: Path, index: Path) -> dict[str, StoredTensor]:
    content = read_json(inside(directory, index))
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise InputError(f"{index}: weight_map must be an object of tensor names to file names")
    for key, name in table.items():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise InputError(
                f"{index}: {key}: file {ascii(name)[:200]} must be the name of a .safetensors file beside the index"
            )
    tensors: dict[str, StoredTensor] = {}
    for name in dict.fromkeys(table.values()):
        path = directory / name
        if not path.exists() and not path.is_symlink():
            raise InputError(f"{path}: no such file, but {INDEX} names it")
        for key, tensor in read_header(inside(directory, path)).items():
            if key in tensors:
                raise InputError(f"{path}: {key} is also in {tensors[key].path.name}; a tensor must be in one file")
            if table.get(key) != name:
                raise InputError(f"{path}: holds {key}, which {INDEX} places in {table.get(key)!r}")
            tensors[key] = tensor
    if missing := sorted(table.keys() - tensors.keys()):
        raise InputError(f"{directory / table[missing[0]]}: lacks {missing[0]}, which {INDEX} places there")
    return tensors
