"""Writing models in the Hugging Face layout: config.json, tokenizer.json, safetensors in one file or in shards."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.pieces import checkpoint_keys
from hetmoe.checkpoint.weight_files import INDEX, SINGLE
from hetmoe.errors import InputError
from hetmoe.files import make_directory, write_text
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.hf_config_write import config_to_hf
from hetmoe.models.model import Model

SHARD_BYTES = 2_000_000_000  # most data in one file; also the memory that saving needs beside the parameters


def save_model(directory: str | Path, model: Model, *, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a model directory that `load_model` and transformers read, with the hub's names, one tensor per expert.

    Weights are written under temporary names; then those of an earlier model are removed and the new ones take their
    place. Interrupted at any point it leaves the earlier model, or one that does not load for lack of weights.

    Raises:
        InputError: if the directory holds an Orbax checkpoint or cannot be made, the family's config.json has no way to
            say what the config says, or shard_bytes is below 1.
    """
    directory = Path(directory)
    if shard_bytes < 1:
        raise InputError(f"shard_bytes={shard_bytes} must be at least 1")
    if (directory / orbax_directory.RECORD).exists():
        raise InputError(f"{directory}: holds an Orbax checkpoint; choose another directory")
    config = json.dumps(hub_config(model), indent=2) + "\n"  # before an earlier model is touched
    make_directory(directory)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".weights-") as temporary:
        shards: list[tuple[Path, list[str]]] = []
        total = 0
        for tensors in _shards(model, shard_bytes):
            path = Path(temporary) / str(len(shards))
            _save_file(path, tensors)
            shards.append((path, list(tensors)))
            total += sum(t.nbytes for t in tensors.values())
        # The index first: alone it would make an older sharded model visible again.
        for old in [directory / INDEX, directory / SINGLE, *directory.glob("model-*-of-*.safetensors")]:
            old.unlink(missing_ok=True)
        write_text(directory / "config.json", config)
        if model.tokenizer is not None:
            write_text(directory / "tokenizer.json", model.tokenizer.to_str(pretty=True))
        else:
            (directory / "tokenizer.json").unlink(missing_ok=True)
        if len(shards) == 1:
            shards[0][0].replace(directory / SINGLE)
            return
        table: dict[str, str] = {}
        for number, (path, keys) in enumerate(shards, 1):
            name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            path.replace(directory / name)
            table |= dict.fromkeys(keys, name)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
        write_text(directory / INDEX, json.dumps(content, indent=2) + "\n")


def _save_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)
    except (SafetensorError, OSError) as error:  # a full disk, for example; which one depends on where it is noticed
        raise InputError(f"{path.parent.parent}: the weights cannot be written ({error})") from None


def hub_config(model: Model) -> dict[str, Any]:
    """The content of config.json."""
    config = config_to_hf(model.config)
    config |= {"bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
    return config | {"dtype": str(model.params.embed.dtype)}


def _shards(model: Model, shard_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    tensors: dict[str, np.ndarray] = {}
    size = 0
    for key, tensor in _tensors(model):
        if tensors and size + tensor.nbytes > shard_bytes:
            yield tensors
            tensors, size = {}, 0
        tensors[key] = tensor
        size += tensor.nbytes
    yield tensors


def _tensors(model: Model) -> Iterator[tuple[str, np.ndarray]]:
    leaves: list[Leaf] = jax.tree.leaves(abstract_params(model.config), is_leaf=is_leaf)
    for leaf, value in zip(leaves, jax.tree.leaves(model.params), strict=True):
        array = np.asarray(value)
        for piece in checkpoint_keys(leaf):
            part = array[piece.index]
            yield piece.key, np.ascontiguousarray(part.T if leaf.transposed else part)
