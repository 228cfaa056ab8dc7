"""Calibrations on disk: a safetensors file of ranges whose metadata say for which model and hardware they were made."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from hetmoe.analog.calibration import Calibration, RangeMethod
from hetmoe.errors import InputError
from hetmoe.files import write_bytes
from hetmoe.models.model import Model, model_fingerprint

FORMAT = "hetmoe-calibration-1"
_RECORD = {"adc_bound", "bound_axis", "model", "tile_rows", "method", "made_by"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedCalibration:
    """Ranges with the ADC bound (lambda) that was chosen for them, and how both came about."""

    calibration: Calibration
    adc_bound: float
    bound_axis: str  # that lambda was chosen for: "tile" or "column"
    how: RangeMethod
    made_by: dict[str, Any]


def save_calibration(path: str | Path, saved: SavedCalibration, model: Model) -> None:
    """Writes a calibration of `model`. Raises InputError if the file cannot be written."""
    parts = saved.calibration
    tensors = {f"layers.{site}": value for site, value in parts.layers.items()}
    tensors |= {f"dense_layers.{site}": value for site, value in parts.dense_layers.items()}
    tensors |= {"lm_head": parts.lm_head, "tokens_seen": parts.tokens_seen}
    record = {
        "model": {"name": model.name, "fingerprint": model_fingerprint(model)},
        "tile_rows": parts.tile_rows,
        "adc_bound": saved.adc_bound,
        "bound_axis": saved.bound_axis,
        "method": dataclasses.asdict(saved.how),
        "made_by": saved.made_by,
    }
    arrays = {name: np.asarray(value) for name, value in tensors.items()}
    write_bytes(Path(path), save(arrays, {"format": FORMAT, "record": json.dumps(record, sort_keys=True)}))


def load_calibration(path: str | Path, model: Model, bound_axis: str | None = None) -> SavedCalibration:
    """Reads a calibration made for this model, and for ADC bounds per `bound_axis` if one is given.

    Raises:
        InputError: if the file is absent or malformed, or was made for another model or bound axis.
    """
    path = Path(path)
    content, record = _read(path)
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise InputError(
            f"calibration {path}: not a calibration file ({error}); make one with 'hetmoe calibrate'"
        ) from None
    try:
        if bound_axis not in (None, record["bound_axis"]):
            raise InputError(
                f"calibration {path}: lambda was chosen per {record['bound_axis']}, not per {bound_axis}: "
                "calibrate again, or change --bound-axis"
            )
        made_for, identity = record["model"], model_fingerprint(model)
        if made_for["fingerprint"] != identity:
            raise InputError(
                f"calibration {path}: made for model {made_for['name']!r} ({made_for['fingerprint']}), not for "
                f"{model.name!r} ({identity}); make one with 'hetmoe calibrate'"
            )
        ranges = {name: _range(path, name, value) for name, value in tensors.items()}
        calibration = Calibration(
            layers={n.removeprefix("layers."): v for n, v in ranges.items() if n.startswith("layers.")},
            dense_layers={
                n.removeprefix("dense_layers."): v for n, v in ranges.items() if n.startswith("dense_layers.")
            },
            lm_head=ranges["lm_head"],
            tokens_seen=ranges["tokens_seen"],
            tile_rows=int(record["tile_rows"]),
        )
        return SavedCalibration(
            calibration=calibration,
            adc_bound=_bound(path, record),
            bound_axis=record["bound_axis"],
            how=RangeMethod(**record["method"]),
            made_by=record["made_by"],
        )
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"calibration {path}: malformed ({type(error).__name__}: {error})") from None


def _range(path: Path, name: str, value: np.ndarray) -> Any:
    if value.dtype != np.float32 or not np.isfinite(value).all() or (value < 0).any():
        raise InputError(f"calibration {path}: {name} must be float32, finite and at least 0; calibrate again")
    return jnp.asarray(value)


def stored_adc_bound(path: str | Path) -> float:
    """The ADC bound (lambda) of a calibration file; reads nothing of the model. Raises InputError as above."""
    return _bound(Path(path), _read(Path(path))[1])


def _bound(path: Path, record: dict[str, Any]) -> float:
    bound = record["adc_bound"]
    if type(bound) is not float or not 0 < bound < float("inf"):
        raise InputError(f"calibration {path}: adc_bound={bound!r} must be positive and finite; calibrate again")
    return bound


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """(content, record of the metadata)."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"calibration {path}: cannot be read ({error.strerror})") from None
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = header["__metadata__"]
        if metadata["format"] != FORMAT:
            raise InputError(f"calibration {path}: format {metadata['format']!r} is not {FORMAT!r}; calibrate again")
        record = json.loads(metadata["record"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"calibration {path}: not a calibration file; make one with 'hetmoe calibrate'") from None
    if not isinstance(record, dict) or not record.keys() >= _RECORD:
        raise InputError(f"calibration {path}: its record lacks one of {', '.join(sorted(_RECORD))}; calibrate again")
    return content, record
