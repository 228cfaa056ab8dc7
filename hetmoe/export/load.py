"""Exported forward passes, ready to be called."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int
from safetensors import SafetensorError
from safetensors.flax import load_file

from hetmoe.errors import InputError
from hetmoe.export.directory import ARGUMENTS, FORMAT, RECORD, describe_arguments, describe_file, program_file
from hetmoe.models.hf_fields import read_json


@dataclasses.dataclass(frozen=True)
class ExportedForward:
    """An exported forward pass.

    `arguments` may be replaced by others of the same names, shapes and dtypes (`dataclasses.replace`): other weights,
    another plan, another key.
    """

    arguments: dict[str, jax.Array]
    program: export.Exported
    record: dict[str, Any]  # the content of export.json

    def __call__(self, tokens: Int[Array, "batch seq"] | np.ndarray) -> Float[Array, "batch seq vocab"]:
        """Float32 logits of integer tokens `[batch, seq]`, of the sizes of the export.

        Raises:
            InputError: for tokens of another size or dtype, or outside the vocabulary.
        """
        self._check(tokens)
        return jax.jit(self.program.call)(self.arguments, jnp.asarray(tokens, jnp.int32))

    def _check(self, tokens: Any) -> None:
        if getattr(tokens, "ndim", None) != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size:
            raise InputError("tokens must be a non-empty integer array [batch, seq]")
        wanted, vocabulary = self.record["tokens"], self.record["model"]["vocab_size"]
        for name, size in zip(("batch", "length"), tokens.shape, strict=True):
            if wanted[name] not in (None, size):
                raise InputError(f"tokens {list(tokens.shape)}: this program was exported for {name} {wanted[name]}")
        if tokens.shape[1] > wanted["most_length"]:
            raise InputError(f"tokens {list(tokens.shape)}: this program takes at most {wanted['most_length']} a row")
        lowest, highest = int(np.min(tokens)), int(np.max(tokens))
        if lowest < 0 or highest >= vocabulary:
            wrong = lowest if lowest < 0 else highest
            raise InputError(f"tokens: id {wrong} is outside the vocabulary, 0 to {vocabulary - 1}")


def load_exported(directory: str | Path, platform: str | None = None) -> ExportedForward:
    """Reads what `hetmoe convert --stablehlo` wrote; uses none of hetmoe's model code.

    The same without hetmoe, in the directory, and without its checks:

        import jax
        from jax import export
        from safetensors.flax import load_file

        arguments = load_file("arguments.safetensors")
        with open("forward.cpu.jaxexport", "rb") as file:
            forward = export.deserialize(bytearray(file.read()))
        logits = jax.jit(forward.call)(arguments, tokens)

    Args:
        directory: the export.
        platform: cpu, cuda or tpu; None = that of JAX's default device. A program can only be called on its platform.

    Raises:
        InputError: if the directory holds no export, or one of another format, for other platforms, or for a newer or
            older JAX; if a file is missing or was changed; if record, arguments and program do not belong together.
    """
    directory = Path(directory)
    record = _read_record(directory)
    platform = export.default_export_platform() if platform is None else platform
    if platform not in record["platforms"]:
        raise InputError(
            f"{directory}: exported for {', '.join(record['platforms'])}, not for {platform}: export again with "
            f"--platform {platform}"
        )
    _check_kernels(directory, record, platform)
    for name in (ARGUMENTS, program_file(platform)):
        _check_file(directory / name, record["files"].get(name))
    try:
        program = export.deserialize(bytearray((directory / program_file(platform)).read_bytes()))
    except Exception as error:  # noqa: BLE001 (of many kinds: a file of this hash that this JAX cannot read)
        raise InputError(f"{directory / program_file(platform)}: JAX cannot read it ({str(error)[:300]})") from None
    try:
        arguments = load_file(directory / ARGUMENTS)
    except SafetensorError as error:
        raise InputError(f"{directory / ARGUMENTS}: not a safetensors file ({error})") from None
    arguments = {name: arguments[name] for name in sorted(arguments)}  # the order of a dict in JAX
    _check_arguments(directory, record, arguments, program)
    return ExportedForward(arguments, program, record)


def _read_record(directory: Path) -> dict[str, Any]:
    path = directory / RECORD
    if not path.is_file():
        raise InputError(f"{directory}: holds no export ({RECORD}); make one with 'hetmoe convert --stablehlo'")
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        found = record.get("format") if isinstance(record, dict) else type(record).__name__
        raise InputError(f"{path}: format {found!r} is not {FORMAT!r}: export again, or use the hetmoe that wrote it")
    kinds = {
        "calling_convention_version": int, "platforms": list, "files": dict, "tokens": dict, "model": dict,
        "arguments": list,
    }  # fmt: skip
    for name, kind in kinds.items():
        if type(record.get(name)) is not kind:
            raise InputError(f"{path}: {name}={str(record.get(name))[:100]} must be {kind.__name__}: export again")
    inner = {("tokens", "most_length"), ("model", "vocab_size")}
    for outer, name in sorted(inner):
        if type(record[outer].get(name)) is not int:
            raise InputError(f"{path}: {outer} {name}={record[outer].get(name)!r} must be int: export again")
    for name in ("batch", "length"):
        if type(record["tokens"].get(name, 0.5)) not in (int, type(None)):
            raise InputError(f"{path}: tokens {name}={record['tokens'].get(name)!r} must be int or null: export again")
    oldest = export.minimum_supported_calling_convention_version
    newest = export.maximum_supported_calling_convention_version
    found = record["calling_convention_version"]
    if not oldest <= found <= newest:
        way = "a newer jax" if found > newest else "an older jax"
        raise InputError(
            f"{path}: calling convention version {found}; jax {jax.__version__} supports {oldest} to {newest}: use "
            f"{way}, or export again"
        )
    return record


def _check_kernels(directory: Path, record: dict[str, Any], platform: str) -> None:
    """JAX keeps old programs running, but for kernels on GPU."""
    wrote = record.get("provenance", {}).get("versions", {}).get("jaxlib")
    if record.get("implementation") == "pallas" and platform == "cuda" and wrote != version("jaxlib"):
        raise InputError(
            f"{directory}: its kernels for GPU were made by jaxlib {wrote} and this is {version('jaxlib')}, which need "
            "not understand them: export again, or with --implementation xla"
        )


def _check_file(path: Path, recorded: Any) -> None:
    if not path.is_file():
        raise InputError(f"{path}: no such file, but {RECORD} lists it: the export is incomplete; export again")
    found = describe_file(path)
    if found != recorded:
        raise InputError(f"{path}: {RECORD} lists {recorded}, found {found}: the file was changed; export again")


def _check_arguments(directory: Path, record: dict[str, Any], arguments: Any, program: export.Exported) -> None:
    listed, held = record["arguments"], describe_arguments(arguments)
    if listed != held:
        at = next((n for n, pair in enumerate(zip(listed, held, strict=False)) if pair[0] != pair[1]), None)
        where = f"{len(listed)} and {len(held)} arguments" if at is None else f"{listed[at]} and {held[at]}"
        raise InputError(f"{directory / RECORD} and {ARGUMENTS} do not belong together ({where}): export again")
    *shapes, _ = program.in_avals
    if [(tuple(a["shape"]), a["dtype"]) for a in held] != [(shape.shape, str(shape.dtype)) for shape in shapes]:
        raise InputError(f"{directory}: the program takes other arguments than {ARGUMENTS} holds: export again")
