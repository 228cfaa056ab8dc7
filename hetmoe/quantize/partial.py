"""Finished layers of a quantization that goes on: an interrupted run takes them up where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
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


class PartialRun:
    """The folder `.partial` of an output directory: the settings of the run, and one file for each finished layer.

    Files appear whole or not at all. The folder holds no config.json, so nothing loads before the run is complete.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output / FOLDER

    def begin(self, settings: dict[str, Any]) -> dict[str, Any] | None:
        """Takes up an earlier run with these settings, or begins one.

        Returns:
            what `decide` kept of the earlier run, None if there is nothing.

        Raises:
            InputError: if a run with other settings was begun there, or the folder cannot be made or read.
        """
        path = self.folder / SETTINGS
        if not path.exists():
            make_directory(self.folder)
            write_text(path, json.dumps({"settings": settings}, indent=2) + "\n")
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            earlier, decided = found["settings"], found.get("decided")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read ({error}); remove {self.folder} to begin anew") from None
        changed = [name for name in settings.keys() | earlier.keys() if settings.get(name) != earlier.get(name)]
        if changed:
            name = min(changed)
            raise InputError(
                f"{self.folder}: holds layers of a run that was stopped, with other settings ({name}: "
                f"{earlier.get(name)!r} there, {settings.get(name)!r} now): repeat that command to go on, or remove "
                "the folder"
            )
        return decided

    def decide(self, settings: dict[str, Any], decided: dict[str, Any]) -> None:
        """Keeps what was decided before the first layer, so that it need not be worked out again."""
        write_text(self.folder / SETTINGS, json.dumps({"settings": settings, "decided": decided}) + "\n")

    def save(self, layer: int, result: LayerQuantized) -> None:
        """Keeps a finished layer."""
        tensors: dict[str, np.ndarray] = {}
        for (matrix, bits), pool in result.pools.items():
            names = tensor_names(f"{matrix}.{bits}", pool.grid)
            tensors |= dict(zip(names, map(np.asarray, jax.tree.leaves(pool)), strict=True))
        write_bytes(self._path(layer), save(tensors, metadata={"facts": json.dumps(result.facts)}))

    def load(
        self, layer: int, shapes: dict[str, tuple[int, int]], bits: dict[str, dict[int, int]], recipe: Recipe
    ) -> LayerQuantized | None:
        """A layer that is finished, None if it is not.

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
                for matrix, counts in bits.items():
                    for level, count in counts.items():
                        wanted = abstract_packed(count, *shapes[matrix], recipe.grid(level))
                        pools[matrix, level] = _read(file, f"{matrix}.{level}", wanted)
                facts = json.loads((file.metadata() or {})["facts"])
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
