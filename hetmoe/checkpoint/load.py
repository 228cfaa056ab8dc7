"""Opening and loading models: directories in the Hugging Face layout, converted checkpoints, names on the hub."""

import dataclasses
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from hetmoe.checkpoint import orbax_directory
from hetmoe.checkpoint.hub import download, looks_like_hub_id
from hetmoe.checkpoint.read import read_params
from hetmoe.checkpoint.storage import FLOATS, Storage, storage_from_hf
from hetmoe.checkpoint.weight_files import WeightFiles, inside, open_weights
from hetmoe.errors import InputError
from hetmoe.models.config import ModelConfig
from hetmoe.models.hf_config import config_from_hf
from hetmoe.models.hf_fields import read_json
from hetmoe.models.model import Model
from hetmoe.parallel.rules import param_shardings

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model directory of which config and headers were read, but no weights."""

    name: str
    directory: Path
    config: ModelConfig
    storage: Storage
    eos_token_id: int | None
    bos_token_id: int | None
    files: WeightFiles

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, None if the directory has no tokenizer.json."""
        return load_tokenizer(self.directory / "tokenizer.json", self.config)


def model_directory(name_or_dir: str | Path, *, config_only: bool = False) -> Path:
    """The directory of a model: one on disk, the embedded `"reference"`, or the local copy of one on the hub.

    With `config_only` that copy need not hold more than config.json.

    Raises:
        InputError: if it does not exist, or cannot be downloaded.
    """
    if str(name_or_dir) == "reference":
        return Path(str(resources.files("hetmoe.models").joinpath("reference")))
    path = Path(name_or_dir)
    if str(name_or_dir) and path.is_dir():
        return path
    if isinstance(name_or_dir, str) and looks_like_hub_id(name_or_dir) and not path.exists():
        return download(name_or_dir, config_only=config_only)
    if path.is_file():
        raise InputError(
            f"model {str(name_or_dir)!r}: is a file; give the directory that holds config.json and the weights (of a "
            "config.json alone, hetmoe info tells what a mesh would take)"
        )
    raise InputError(
        f"model {str(name_or_dir)!r}: no such directory; give a model directory, a name on the hub such as "
        "'allenai/OLMoE-1B-7B-0924', or 'reference'"
    )


def model_name(name_or_dir: str | Path, directory: Path) -> str:
    """The name that results carry."""
    if Path(name_or_dir).is_dir():
        return directory.resolve().name
    return str(name_or_dir)


def open_checkpoint(name_or_dir: str | Path) -> Checkpoint:
    """Reads the config of a model directory and the headers of its weight files.

    Raises:
        InputError: see `load_model`.
    """
    directory = model_directory(name_or_dir)
    if orbax_directory.is_one(directory):
        raise InputError(f"{directory}: is an Orbax checkpoint; this needs safetensors: hetmoe convert it back first")
    path, content, config = _config_file(directory)
    return Checkpoint(
        name=model_name(name_or_dir, directory),
        directory=directory,
        config=config,
        storage=storage_from_hf(content, source=str(path)),
        eos_token_id=_token_id(path, "eos_token_id", content, config),
        bos_token_id=_token_id(path, "bos_token_id", content, config),
        files=open_weights(directory),
    )


def open_config(directory: Path) -> tuple[ModelConfig, Storage]:
    """What config.json of a model directory says; weights need not be there.

    Raises:
        InputError: see `load_model`.
    """
    path, content, config = _config_file(directory)
    return config, storage_from_hf(content, source=str(path))


def _config_file(directory: Path) -> tuple[Path, dict[str, Any], ModelConfig]:
    path = directory / "config.json"
    if not path.exists() and not path.is_symlink():
        if (directory / ".partial").is_dir():
            raise InputError(f"{directory}: 'hetmoe quantize' was stopped here: repeat the same command to finish it")
        raise InputError(f"{path}: no such file; a model directory holds config.json and model*.safetensors")
    content = read_json(inside(directory, path))
    return path, content, config_from_hf(content, source=str(path))


def _token_id(path: Path, name: str, content: dict[str, Any], config: ModelConfig) -> int | None:
    """The id of a special token, or the first of several."""
    value = content.get(name)
    ids: list[Any] = value if isinstance(value, list) and value else [value]
    if value is not None and any(type(i) is not int or not 0 <= i < config.vocab_size for i in ids):
        raise InputError(
            f"{path}: {name}={value!r} must be a token id below vocab_size={config.vocab_size}, or a list of them"
        )
    return ids[0]


def load_model(name_or_dir: str | Path, dtype: Any = None, *, mesh: jax.sharding.Mesh | None = None) -> Model:
    """Loads a model: config, weights, and the tokenizer if there is one.

    Tensors go from the memory-mapped files straight to their dtype, layout and device, so that host memory holds
    little more than the parameters. Warns (`CheckpointWarning`) of weights that are NaN or infinite, and of
    multi-token-prediction layers, which are left out.

    Args:
        name_or_dir: directory with config.json and safetensors files, or made by `hetmoe convert` or `quantize` (whose
            quantized experts keep their steps in float16 whatever `dtype`); a name on the hub
            (`"allenai/OLMoE-1B-7B-0924"`, with `@revision` if wanted), downloaded into the hub's cache; or
            `"reference"` for the embedded model.
        dtype: dtype of the parameters (`"float32"`, `jnp.bfloat16`, ...); None = as stored. Block-wise FP8 weights are
            dequantised to it; float64 weights are rounded to float32 first.
        mesh: devices to spread the parameters over, by axes named data, seed, expert and tensor
            (`hetmoe.parallel.rules`); None = the default device.

    Raises:
        InputError: for a missing or malformed file, an unsupported architecture or option, a missing, unknown or
            misshapen tensor; it names file, key, expected and found.
    """
    dtype = parse_dtype(dtype)
    directory = model_directory(name_or_dir)
    if orbax_directory.is_one(directory):
        opened = orbax_directory.read_record(directory)
        shardings = None if mesh is None else param_shardings(opened.config, mesh)
        params = orbax_directory.read_params(directory, opened, dtype, shardings)
        tokenizer = load_tokenizer(directory / "tokenizer.json", opened.config)
    else:
        opened = open_checkpoint(name_or_dir)
        tokenizer = opened.tokenizer()
        shardings = None if mesh is None else param_shardings(opened.config, mesh)
        params = read_params(opened.files, opened.config, opened.storage, dtype, shardings)
    return Model(
        params=params,
        config=opened.config,
        tokenizer=tokenizer,
        eos_token_id=opened.eos_token_id,
        bos_token_id=opened.bos_token_id,
        name=model_name(name_or_dir, directory),
        mesh=mesh,
    )


def load_tokenizer(path: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a model directory, None if there is no file.

    Raises:
        InputError: if it is malformed, leads out of its directory, or has tokens that the model lacks.
    """
    if not path.exists() and not path.is_symlink():
        return None
    inside(path.parent, path)
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
            raise InputError(f"dtype {dtype!r} is unknown; choose one of {', '.join(FLOATS)}")
        return DTYPES[dtype]
    if dtype is not None and np.dtype(dtype) not in [np.dtype(d) for d in DTYPES.values()]:
        raise InputError(f"dtype {dtype!r} is not supported; choose one of {', '.join(FLOATS)}")
    return dtype
