"""Model directories in the Hugging Face layout: config.json, model.safetensors, tokenizer.json."""

import hashlib
import json
import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.params import Leaf, Params, abstract_params, checkpoint_keys, is_leaf

WEIGHTS = "model.safetensors"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
_STORED = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}


@struct.dataclass
class Model:
    """A loaded model: `params` is the only traced field."""

    params: Params
    config: ModelConfig = struct.field(pytree_node=False)
    tokenizer: Tokenizer | None = struct.field(pytree_node=False)
    eos_token_id: int | None = struct.field(pytree_node=False)
    name: str = struct.field(pytree_node=False)


def model_directory(name_or_dir: str | Path) -> Path:
    """The directory of a model; `"reference"` is the one that ships with the package.

    Raises:
        InputError: if it does not exist.
    """
    if str(name_or_dir) == "reference":
        return Path(str(resources.files("hetmoe.models").joinpath("reference")))
    path = Path(name_or_dir)
    if not path.is_dir():
        raise InputError(f"model {str(name_or_dir)!r}: no such directory; give a model directory, or 'reference'")
    return path


def load_model(name_or_dir: str | Path, dtype: Any = None) -> Model:
    """Loads a model directory (config.json, model.safetensors, and tokenizer.json if there is one).

    Args:
        name_or_dir: directory, or `"reference"` for the embedded model.
        dtype: dtype of the parameters (`"float32"`, `jnp.bfloat16`, ...); None = as stored.

    Raises:
        InputError: for a missing or malformed file, an unsupported architecture, a missing, unknown or misshapen
            tensor; it names file, key, expected and found.
    """
    directory = model_directory(name_or_dir)
    config_file = directory / "config.json"
    config = ModelConfig.from_file(config_file)
    eos = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token_id")
    if eos is not None and not (type(eos) is int and 0 <= eos < config.vocab_size):
        raise InputError(f"{config_file}: eos_token_id={eos!r} must be a token id below vocab_size={config.vocab_size}")
    return Model(
        params=load_params(directory / WEIGHTS, config, dtype),
        config=config,
        tokenizer=_load_tokenizer(directory / "tokenizer.json", config),
        eos_token_id=eos,
        name="reference" if str(name_or_dir) == "reference" else directory.name,
    )


def _load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    if not path.exists():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        raise InputError(f"{path}: not a tokenizers file ({error})") from None
    highest = max(tokenizer.get_vocab().values(), default=-1)  # ids may have gaps
    if highest >= config.vocab_size:
        raise InputError(f"{path}: token id {highest} does not fit the model's vocab_size={config.vocab_size}")
    return tokenizer


def parse_dtype(dtype: Any) -> Any:
    """A floating dtype from its name or itself. Raises InputError for others."""
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype is not None and np.dtype(dtype) not in [np.dtype(d) for d in DTYPES.values()]:
        raise InputError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    return dtype


def load_params(path: Path, config: ModelConfig, dtype: Any = None) -> Params:
    """Reads every tensor of a safetensors file into the parameter tree of `config`; see `load_model`."""
    dtype = parse_dtype(dtype)
    if not path.is_file():
        raise InputError(f"{path}: no such file; weights are read from a single {WEIGHTS}")
    leaves, treedef = jax.tree.flatten(abstract_params(config), is_leaf=is_leaf)
    try:
        with safe_open(path, framework="numpy") as file:
            stored = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 (not a mapping)
            _check_keys(path, set(file.keys()), leaves)
            if unknown := stored - set(_STORED):
                raise InputError(f"{path}: stored dtype {sorted(unknown)} is not supported ({', '.join(_STORED)})")
            if dtype is None:
                if len(stored) != 1:
                    raise InputError(f"{path}: mixed dtypes {sorted(stored)}; choose one with dtype=")
                dtype = _STORED[stored.pop()]
            arrays = [_read_leaf(path, file, leaf, np.dtype(dtype)) for leaf in leaves]
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from None
    for leaf, array in zip(leaves, arrays, strict=True):
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {leaf.key} holds NaN or infinity")
    return jax.tree.unflatten(treedef, [jnp.asarray(a) for a in arrays])


def _check_keys(path: Path, found: set[str], leaves: list[Leaf]) -> None:
    expected = {key for leaf in leaves for _, key in checkpoint_keys(leaf)}
    if missing := sorted(expected - found):
        raise InputError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}")
    if unknown := sorted(found - expected):
        raise InputError(f"{path}: {len(unknown)} tensors do not belong to this config, the first is {unknown[0]}")


def _read_leaf(path: Path, file: Any, leaf: Leaf, dtype: np.dtype) -> np.ndarray:
    for index, key in checkpoint_keys(leaf):  # from the header: no memory is taken for a wrong shape
        wanted = leaf.shape[len(index) :]
        wanted = wanted[::-1] if leaf.transposed else wanted
        found = tuple(file.get_slice(key).get_shape())
        if found != wanted:
            raise InputError(f"{path}: {key} has shape {list(found)}, expected {list(wanted)}")
    out = np.empty(leaf.shape, dtype)
    for index, key in checkpoint_keys(leaf):
        value = file.get_tensor(key)
        out[index] = value.T if leaf.transposed else value
    return out


def save_model(directory: Path, model: Model) -> None:
    """Writes config.json, model.safetensors and tokenizer.json; the weights appear whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, np.ndarray] = {}
    leaves = jax.tree.leaves(abstract_params(model.config), is_leaf=is_leaf)
    for leaf, value in zip(leaves, jax.tree.leaves(model.params), strict=True):
        array = np.asarray(value)
        for index, key in checkpoint_keys(leaf):
            tensors[key] = np.ascontiguousarray(array[index].T if leaf.transposed else array[index])
    handle, temporary = tempfile.mkstemp(dir=directory, prefix=".weights-")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        Path(temporary).chmod(0o644)
        Path(temporary).replace(directory / WEIGHTS)
    finally:
        Path(temporary).unlink(missing_ok=True)
    config = model.config.to_hf() | {"eos_token_id": model.eos_token_id, "dtype": str(model.params.embed.dtype)}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if model.tokenizer is not None:
        model.tokenizer.save(str(directory / "tokenizer.json"))


def fingerprint(model: Model) -> str:
    """Identifies a model by its config and router weights: what a plan was made for.

    Routers are small, and differ between any two trainings; hashing them costs nothing beside reading all weights.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_hf(), sort_keys=True).encode())
    digest.update(np.asarray(model.params.layers.router.astype(jnp.float32)).tobytes())
    return digest.hexdigest()[:16]
