"""Converted checkpoints: an Orbax tree of the parameters, and a record that makes the directory loadable."""

import dataclasses
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from hetmoe.checkpoint.read import count_non_finite, warn_of_non_finite
from hetmoe.checkpoint.storage import FLOATS
from hetmoe.checkpoint.weight_files import inside
from hetmoe.errors import InputError
from hetmoe.files import staged_directory
from hetmoe.models.abstract import Leaf, abstract_params, is_leaf
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf
from hetmoe.models.hf_config_write import config_to_hf
from hetmoe.models.hf_fields import read_json
from hetmoe.models.model import Model
from hetmoe.models.params import FeedForward, Params, with_experts
from hetmoe.quantize.budget import EXPERT_MATRICES
from hetmoe.quantize.layout import QuantizedLayout, abstract_packed, check_layout, layout_from_json, layout_of
from hetmoe.quantize.mixed import MixedMatrix, Places, arranged

RECORD, TREE = "hetmoe.json", "params"
FORMAT = "hetmoe-params-1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What stands beside the parameters."""

    config: ModelConfig
    dtype: str
    eos_token_id: int | None
    bos_token_id: int | None
    layout: QuantizedLayout | None


def is_one(directory: Path) -> bool:
    """Whether a directory holds a finished conversion."""
    return (directory / RECORD).is_file()


def write(directory: Path, model: Model) -> None:
    """Writes a model as an Orbax checkpoint, in the dtype it has.

    Everything goes to a temporary directory beside the target, the record last, and is then renamed: whenever it is
    interrupted, the target is absent or complete, and a temporary directory without its record does not load.

    Raises:
        InputError: if the target exists and is not empty, or its folder cannot be made.
    """
    layout = layout_of(model.params.layers.moe.experts)
    with staged_directory(directory) as temporary:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / TREE, _arranged(model.params, layout))
        if model.tokenizer is not None:
            model.tokenizer.save(str(temporary / "tokenizer.json"))
        record = {
            "format": FORMAT,
            "config": config_to_hf(model.config),
            "dtype": str(model.params.embed.dtype),
            "eos_token_id": model.eos_token_id,
            "bos_token_id": model.bos_token_id,
            "files": _digests(temporary / TREE),
        } | ({} if layout is None else {"quantization": layout.to_json()})
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def read_record(directory: Path) -> Record:
    """The record of a conversion.

    Raises:
        InputError: if it is malformed, or files of the tree are missing, damaged or lead out of the directory.
    """
    path = inside(directory, directory / RECORD)
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not of format {FORMAT!r}; make one with 'hetmoe convert'")
    if content.get("dtype") not in FLOATS:
        raise InputError(f"{path}: dtype {content.get('dtype')!r} must be one of {', '.join(FLOATS)}")
    config, layout = config_from_hf(content.get("config", {}), source=str(path)), None
    if content.get("quantization") is not None:
        layout = layout_from_json(content["quantization"], f"{path}: quantization")
        check_layout(layout, abstract_params(config).layers.moe.experts, f"{path}: quantization")
    _check_files(directory, content.get("files"))
    ids = {name: content.get(name) for name in ("eos_token_id", "bos_token_id")}
    for name, value in ids.items():
        if value is not None and (type(value) is not int or not 0 <= value < config.vocab_size):
            raise InputError(f"{path}: {name}={value!r} must be a token id below vocab_size={config.vocab_size}")
    return Record(config=config, dtype=content["dtype"], layout=layout, **ids)


def _experts(params: Any) -> FeedForward:
    return params.layers.moe.experts


def _arranged(params: Params, layout: QuantizedLayout | None) -> Params:
    """With quantized matrices in the pools that their layout leads to."""
    if layout is None:
        return params
    found = {name: arranged(getattr(_experts(params), name), layout.pools(name)) for name in EXPERT_MATRICES}
    return with_experts(params, FeedForward(**found))


def _abstract(record: Record, dtype: Any, shardings: Params | None) -> Params:
    """Shapes, dtypes and places of the parameters."""
    wanted = abstract_params(record.config)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if shardings is None:
        shardings = jax.tree.map(lambda _: here, wanted, is_leaf=is_leaf)

    def target(leaf: Leaf, place: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype(dtype), sharding=place)

    def mixed(name: str) -> MixedMatrix:
        assert record.layout is not None
        layers, experts, rows, columns = getattr(_experts(wanted), name).shape
        pools: list[Any] = []
        for grid, where in record.layout.pools(name):
            count = len(where)
            plain = jax.ShapeDtypeStruct((count, rows, columns), dtype, sharding=here)
            pools.append(plain if grid is None else abstract_packed(count, rows, columns, grid, here))
        place: Any = jax.ShapeDtypeStruct((layers, experts), np.int32, sharding=here)
        return MixedMatrix(pools=tuple(pools), places=Places(pool=place, slot=place))

    plain = jax.tree.map(target, wanted, shardings, is_leaf=is_leaf)
    if record.layout is None:
        return plain
    return with_experts(plain, FeedForward(**{name: mixed(name) for name in EXPERT_MATRICES}))


def _digests(tree: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file of the tree: Orbax itself loads flipped bits, and fails noisily on other damage."""
    files = [path for path in sorted(tree.rglob("*")) if not path.is_dir()]
    for path in files:
        inside(tree.parent, path)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checks = list(pool.map(_crc32, files))
    return {str(p.relative_to(tree)): [p.stat().st_size, check] for p, check in zip(files, checks, strict=True)}


def _crc32(path: Path) -> int:
    check = 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(1 << 24):
            check = zlib.crc32(part, check)
    return check


def _check_files(directory: Path, recorded: Any) -> None:
    found = _digests(directory / TREE)
    if found == recorded:
        return
    listed: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    wrong = next(name for name in sorted(found | listed) if found.get(name) != listed.get(name))
    raise InputError(
        f"{directory / TREE / wrong}: {RECORD} lists [size, CRC-32] {listed.get(wrong)}, found {found.get(wrong)}: the "
        "checkpoint is damaged; convert again"
    )


def read_params(directory: Path, record: Record, dtype: Any, shardings: Params | None) -> Params:
    """The parameters, on their devices.

    Raises:
        InputError: if the tree is damaged or is not that of the config.
    """
    if record.layout is not None and shardings is not None:
        raise InputError(f"{directory}: quantized experts cannot be spread over a mesh: load them without one")
    targets = _abstract(record, dtype or record.dtype, shardings)
    tree = (directory / TREE).absolute()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            _check_tree(tree, checkpointer.metadata(tree), _abstract(record, record.dtype, shardings))
            params = checkpointer.restore(tree, targets)
    except InputError:
        raise
    except Exception as error:  # noqa: BLE001 (Orbax and TensorStore raise many kinds)
        raise InputError(f"{tree}: not a readable Orbax checkpoint ({str(error)[:300]})") from None
    counts: dict[str, int] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        shards = [np.asarray(shard.data) for shard in leaf.addressable_shards if shard.replica_id == 0]
        if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            continue  # codes and places of quantized experts
        if bad := sum(count_non_finite(row) for shard in shards for row in shard):
            counts[jax.tree_util.keystr(path)] = bad
    warn_of_non_finite(directory, counts)
    return params


def _check_tree(tree: Path, metadata: Any, wanted: Params) -> None:
    """Compares stored shapes and dtypes with those of the record, before memory is taken."""
    found = {jax.tree_util.keystr(p): m for p, m in jax.tree_util.tree_leaves_with_path(metadata.item_metadata.tree)}
    for path, target in jax.tree_util.tree_leaves_with_path(wanted):
        key = "".join(f"[{part.idx}]" if hasattr(part, "idx") else f"['{part.name}']" for part in path)
        if key not in found:
            raise InputError(f"{tree}: parameter {key} is missing")
        stored = found.pop(key)
        shape, dtype = tuple(stored.shape), np.dtype(target.dtype)
        if np.dtype(stored.dtype) != dtype:
            raise InputError(f"{tree}: parameter {key} is stored as {stored.dtype}, {RECORD} says {dtype}")
        if shape != target.shape:
            raise InputError(f"{tree}: parameter {key} has shape {list(shape)}, expected {list(target.shape)}")
    if found:
        raise InputError(
            f"{tree}: {len(found)} parameters do not belong to this config, the first is {next(iter(found))}"
        )
