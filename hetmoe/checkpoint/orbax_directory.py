"""Converted checkpoints: an Orbax tree of the parameters, and a record that makes the directory loadable."""

import dataclasses
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hetmoe.checkpoint.read import count_non_finite, warn_of_non_finite
from hetmoe.errors import InputError
from hetmoe.files import make_directory
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf, config_to_hf
from hetmoe.models.hf_fields import read_json
from hetmoe.models.model import Model
from hetmoe.models.params import Params

RECORD, TREE = "hetmoe.json", "params"
FORMAT = "hetmoe-params-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What stands beside the parameters."""

    config: ModelConfig
    dtype: str
    eos_token_id: int | None
    bos_token_id: int | None


def is_one(directory: Path) -> bool:
    """Whether a directory holds a finished conversion."""
    return (directory / RECORD).is_file()


def write(directory: Path, model: Model) -> None:
    """Writes a model as an Orbax checkpoint, in the dtype it has.

    Everything goes to a temporary directory beside the target, the record last, and is then renamed: whenever it is
    interrupted, the target is absent or complete, and the temporary directory does not load.

    Raises:
        InputError: if the target exists and is not empty, or its folder cannot be made.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists; choose another output or remove it first")
    make_directory(directory.parent)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent.absolute(), prefix=f".{directory.name}.partial-"))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / TREE, model.params)
        if model.tokenizer is not None:
            model.tokenizer.save(str(temporary / "tokenizer.json"))
        record = {
            "format": FORMAT,
            "config": config_to_hf(model.config),
            "dtype": str(model.params.embed.dtype),
            "eos_token_id": model.eos_token_id,
            "bos_token_id": model.bos_token_id,
            "files": _sizes(temporary / TREE),
        }
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)
        os.replace(temporary, directory)  # noqa: PTH105 (Path.replace has no other meaning here, but reads as of files)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_record(directory: Path) -> Record:
    """The record of a conversion.

    Raises:
        InputError: if it is malformed, or files of the tree are missing or have another size.
    """
    path = directory / RECORD
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not of format {FORMAT!r}; make one with 'hetmoe convert'")
    if content.get("dtype") not in ("float32", "bfloat16", "float16"):
        raise InputError(f"{path}: dtype {content.get('dtype')!r} must be float32, bfloat16 or float16")
    config = config_from_hf(content.get("config", {}), source=str(path))
    if content.get("files") != _sizes(directory / TREE):
        raise InputError(f"{directory / TREE}: files are not those that {RECORD} lists, or changed; convert again")
    ids = {name: content.get(name) for name in ("eos_token_id", "bos_token_id")}
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < config.vocab_size):
            raise InputError(f"{path}: {name}={value!r} must be a token id below vocab_size={config.vocab_size}")
    return Record(config=config, dtype=content["dtype"], **ids)


def _sizes(tree: Path) -> dict[str, int]:
    """Bytes of every file of the tree. Damage is told from them before Orbax starts: it fails noisily."""
    return {str(p.relative_to(tree)): p.stat().st_size for p in sorted(tree.rglob("*")) if p.is_file()}


def read_params(directory: Path, record: Record, dtype: Any, shardings: Params | None) -> Params:
    """The parameters, on their devices.

    Raises:
        InputError: if the tree is damaged or is not that of the config.
    """
    wanted = abstract_params(record.config)
    if shardings is None:
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: here, wanted, is_leaf=is_leaf)

    def target(leaf: Leaf, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype(dtype or record.dtype), sharding=place)

    targets = jax.tree.map(target, wanted, shardings, is_leaf=is_leaf)
    tree = (directory / TREE).absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            _check_tree(tree, checkpointer.metadata(tree), targets)
            params = checkpointer.restore(tree, targets)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (Orbax and TensorStore raise many kinds)
        raise InputError(f"{tree}: not a readable Orbax checkpoint ({str(error)[:300]})") from None
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        if bad := sum(count_non_finite(row) for shard in shards for row in shard):
            counts[jax.tree_util.keystr(path)] = bad
    warn_of_non_finite(directory, counts)
    return params


def _check_tree(tree: Path, metadata: Any, targets: Params) -> None:
    """Compares the stored shapes with those of the config, before memory is taken."""
    found = {jax.tree_util.keystr(p): m for p, m in jax.tree_util.tree_leaves_with_path(metadata.item_metadata.tree)}
    for path, target in jax.tree_util.tree_leaves_with_path(targets):
        key = "".join(f"['{part.name}']" for part in path)
        if key not in found:
            raise InputError(f"{tree}: parameter {key} is missing")
        shape = tuple(found.pop(key).shape)
        if shape != target.shape:
            raise InputError(f"{tree}: parameter {key} has shape {list(shape)}, expected {list(target.shape)}")
    if found:
        raise InputError(
            f"{tree}: {len(found)} parameters do not belong to this config, the first is {next(iter(found))}"
        )
