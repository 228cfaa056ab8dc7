"""Finished layers of a quantization that goes on: an interrupted run takes them up where it stopped."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from hetmoe.checkpoint.packed_tensors import tensor_names
from hetmoe.errors import InputError
from hetmoe.files import make_directory, write_bytes, write_text
from hetmoe.quantize.layer import LayerQuantized, Pools
from hetmoe.quantize.layout import abstract_packed
from hetmoe.quantize.packed import Packed
from hetmoe.quantize.recipe import Recipe

FOLDER, SETTINGS = ".partial", "settings.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decided:
    """Bits of every expert matrix, and what a report says of them."""

    bits: Int[np.ndarray, "layers experts matrices"]
    notes: tuple[str, ...]


class PartialRun:
    """The folder `.partial` of an output directory: the settings of the run, and one file for each finished layer.

    Files appear whole or not at all. The folder holds no config.json, so nothing loads before the run is complete.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER
        self._settings = ""  # digest of those of the run; layers of any other are not taken up

    def begin(self, settings: dict[str, Any]) -> Decided | None:
        """Takes up an earlier run with these settings (JSON).

        Returns:
            what `decide` kept of it, None if there is no such run (and nothing is written yet).

        Raises:
            InputError: if a run with other settings was begun there, or the folder cannot be read.
        """
        self._settings = _digest(settings)
        path = self.folder / SETTINGS
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            earlier = dict(found["settings"])
            bits, notes = np.array(found["bits"], np.int64), tuple(map(str, found["notes"]))
        except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove {self.folder} to begin anew") from None
        if bits.ndim != 3:
            raise InputError(f"{path}: bits have the shape {list(bits.shape)}; remove {self.folder} to begin anew")
        changed = sorted(name for name in settings.keys() | earlier.keys() if settings.get(name) != earlier.get(name))
        if changed:
            listed = ", ".join(f"{name} {earlier.get(name)!r} there, {settings.get(name)!r} now" for name in changed)
            raise InputError(
                f"{self.folder}: is of a run with other settings that was stopped ({listed}): repeat that command to "
                "go on, or remove the folder"
            )
        return Decided(bits=bits, notes=notes)

    def decide(self, settings: dict[str, Any], decided: Decided) -> None:
        """Begins a run: keeps its settings, and what was decided before the first layer."""
        self._settings = _digest(settings)
        make_directory(self.folder)
        content = {"settings": settings, "bits": decided.bits.tolist(), "notes": list(decided.notes)}
        write_text(self.folder / SETTINGS, json.dumps(content) + "\n")

    def save(self, layer: int, result: LayerQuantized) -> None:
        """Keeps a finished layer."""
        tensors: dict[str, np.ndarray] = {}
        for (matrix, bits), pool in result.pools.items():
            names = tensor_names(f"{matrix}.{bits}", pool.grid)
            tensors |= dict(zip(names, map(np.asarray, jax.tree.leaves(pool)), strict=True))
        metadata = {"facts": json.dumps(result.facts), "settings": self._settings}
        write_bytes(self._path(layer), save(tensors, metadata=metadata))

    def load(
        self, layer: int, shapes: dict[str, tuple[int, int]], bits: dict[str, dict[int, int]], recipe: Recipe
    ) -> LayerQuantized | None:
        """A layer that is finished, None if it is not, or is of a run with other settings.

        Args:
            layer: its number among those with experts.
            shapes: rows and columns of each matrix.
            bits: for each matrix how many experts have which bits.
            recipe: of the run.

        Raises:
            InputError: if the file is damaged.
        """
        path = self._path(layer)
        if not path.exists():
            return None
        pools: Pools = {}
        try:
            with safe_open(path, "numpy") as file:
                metadata = file.metadata() or {}
                if metadata["settings"] != self._settings:
                    return None
                for matrix, counts in bits.items():
                    for level, count in counts.items():
                        wanted = abstract_packed(count, *shapes[matrix], recipe.grid(level))
                        pools[matrix, level] = _read(file, f"{matrix}.{level}", wanted)
                facts = json.loads(metadata["facts"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: damaged ({error}); remove it, and this layer is quantized again") from None
        return LayerQuantized(pools=pools, facts=facts)

    def remove(self) -> None:
        """Once the model is written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer-{layer:05}.safetensors"


def _read(file: Any, name: str, wanted: Packed) -> Packed:
    leaves: list[Any] = []
    for key, leaf in zip(tensor_names(name, wanted.grid), jax.tree.leaves(wanted), strict=True):
        array = file.get_tensor(key)
        if array.shape != leaf.shape or array.dtype != leaf.dtype:
            raise ValueError(f"{key} is {array.dtype}{list(array.shape)}, not {leaf.dtype}{list(leaf.shape)}")
        leaves.append(jax.device_put(array))
    return jax.tree.unflatten(jax.tree.structure(wanted), leaves)


def _digest(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
