"""Writing models in the Hugging Face layout: config.json, tokenizer.json, safetensors in one file or in shards."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.packed_tensors import to_tensors
from hetmoe.checkpoint.pieces import checkpoint_keys
from hetmoe.checkpoint.weight_files import INDEX, SINGLE
from hetmoe.errors import InputError
from hetmoe.files import make_directory, write_text
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.hf_config_write import config_to_hf
from hetmoe.models.model import Model
from hetmoe.quantize.layout import layout_of
from hetmoe.quantize.mixed import MixedMatrix, is_mixed
from hetmoe.quantize.packed import Packed

_ROW = re.compile(r"\[\n\s+(-?\d+(?:,\n\s+-?\d+)*)\n\s+\]")  # a list of whole numbers
SHARD_BYTES = 2_000_000_000  # most data in one file; also the memory that saving needs beside the parameters


def save_model(
    directory: str | Path, model: Model, *, shard_bytes: int = SHARD_BYTES, made_by: dict[str, Any] | None = None
) -> None:
    """Writes a model directory that `load_model` and transformers read, with the hub's names, one tensor per expert.

    Quantized experts, which transformers does not know, are stored as `hetmoe.checkpoint.packed_tensors` says;
    `made_by` is kept in config.json beside their layout.

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
    config = _config_text(hub_config(model, made_by)) + "\n"  # before an earlier model is touched
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


def hub_config(model: Model, made_by: dict[str, Any] | None = None) -> dict[str, Any]:
    """The content of config.json; `made_by` says for people how experts were quantized."""
    config = config_to_hf(model.config)
    config |= {"bos_token_id": model.bos_token_id, "eos_token_id": model.eos_token_id}
    layout = layout_of(model.params.layers.moe.experts)
    if layout is not None:
        config["quantization_config"] = layout.to_json() | ({} if made_by is None else {"made_by": made_by})
    return config | {"dtype": str(model.params.embed.dtype)}


def _config_text(config: dict[str, Any]) -> str:
    """JSON with one line for the experts of each layer."""
    return _ROW.sub(lambda row: f"[{' '.join(row[1].split())}]", json.dumps(config, indent=2))


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
    for leaf, value in zip(leaves, jax.tree.leaves(model.params, is_leaf=is_mixed), strict=True):
        if is_mixed(value):
            yield from _mixed_tensors(leaf, value)
            continue
        array = np.asarray(value)
        for piece in checkpoint_keys(leaf):
            part = array[piece.index]
            yield piece.key, np.ascontiguousarray(part.T if leaf.transposed else part)


def _mixed_tensors(leaf: Leaf, mixed: MixedMatrix) -> Iterator[tuple[str, np.ndarray]]:
    numbers, slots = np.asarray(mixed.places.pool), np.asarray(mixed.places.slot)
    pools = [jax.tree.map(np.asarray, pool) for pool in mixed.pools]
    for piece in checkpoint_keys(leaf):
        pool, slot = pools[numbers[piece.index]], int(slots[piece.index])
        if isinstance(pool, Packed):
            yield from to_tensors(piece.key, pool, slot).items()
        else:
            yield piece.key, np.ascontiguousarray(np.asarray(pool[slot]).T)
