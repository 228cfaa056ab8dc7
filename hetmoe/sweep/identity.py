"""What all results of a store have in common, and whether a run may add to them."""

import json
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError

_GRID = "config.grid."
_SCORING_SCALE = f"{_GRID}scoring_scale"
_ABSENT = "(nothing)"
_OTHER_STORE = "choose another directory with -o"
_OTHER_PART = (
    "run all parts with the same CONFIG, text, model, hetmoe and jax, or remove this folder to lose what is in it"
)


def plain(identity: dict[str, Any]) -> dict[str, Any]:
    """The same as it comes back from JSON."""
    return json.loads(json.dumps(identity))


def check_identity(directory: Path, stored: dict[str, Any], given: dict[str, Any], *, extend: bool) -> None:
    """Refuses to mix results of different configs, texts, models or code.

    Args:
        directory: of the store, for messages.
        stored: `config`, `text`, `model` and `code` of the store.
        given: those of this run; what it lacks is not compared.
        extend: allow axes of the grid to have grown.

    Raises:
        InputError: naming what differs, both values, and the fix.
    """
    _check(directory, stored, given, _OTHER_STORE, extend=extend)


def check_part_identity(directory: Path, stored: dict[str, Any], given: dict[str, Any], *, extend: bool) -> None:
    """The same for the store of a part: other machines may have other files, another model or other packages.

    Args:
        directory: of the part, for messages.
        stored: as in `check_identity`.
        given: as in `check_identity`.
        extend: as in `check_identity`.

    Raises:
        InputError: naming the part, what differs, both values, and the fix.
    """
    _check(directory, stored, given, _OTHER_PART, extend=extend)


def is_same(stored: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether nothing differs that is given."""
    return not _all_differences(stored, given)


def _all_differences(stored: dict[str, Any], given: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return _differences({key: stored.get(key, _ABSENT) for key in given}, plain(given), "")


def _check(directory: Path, stored: dict[str, Any], given: dict[str, Any], fix: str, *, extend: bool) -> None:
    found = _all_differences(stored, given)
    grown = [d for d in found if _has_grown(*d)]
    if not found or (extend and len(grown) == len(found)):
        _check_keys(directory, found, stored)
        return
    listed = [d for d in found if d not in grown] if extend else found
    shown = "; ".join(f"{name} was {_short(old)}, is {_short(new)}" for name, old, new in listed[:3])
    more = f"; {len(listed) - 3} more" if len(listed) > 3 else ""
    if len(grown) == len(found):
        fix += ", or give --extend to add the new points"
    elif all(_has_grown(*d) or _could_grow(*d) for d in found):
        fix += ", or put new values of an axis behind those that were there, keep scoring_scale, and give --extend"
    raise InputError(f"{directory}: holds results of other settings ({shown}{more}): {fix}")


def _differences(old: Any, new: Any, name: str) -> list[tuple[str, Any, Any]]:
    """(dotted name, old value, new value) of every leaf that differs."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [(name, old, new)]
    found: list[tuple[str, Any, Any]] = []
    for key in dict.fromkeys([*old, *new]):
        inner = f"{name}.{key}" if name else key
        found.extend(_differences(old.get(key, _ABSENT), new.get(key, _ABSENT), inner))
    return found


def _has_grown(name: str, old: Any, new: Any) -> bool:
    """Whether an axis of the grid kept all its values. Another base seed is another meaning of every row."""
    if name == f"{_GRID}seeds":
        return new >= old
    if name == _SCORING_SCALE:
        return old is None  # no rule depended on it
    # At the end: scores of device-dependent rules are made with the first of `bits`.
    return name.startswith(_GRID) and isinstance(old, list) and new[: len(old)] == old


def _could_grow(name: str, old: Any, new: Any) -> bool:
    """Whether other words in CONFIG would make it a larger grid."""
    if name == _SCORING_SCALE:
        return new is not None
    both = isinstance(old, list) and isinstance(new, list)
    return name.startswith(_GRID) and both and all(value in new for value in old)


def _check_keys(directory: Path, grown: list[tuple[str, Any, Any]], stored: dict[str, Any]) -> None:
    """More seeds leave the first ones what they were only if keys are split by counting."""
    if any(name == f"{_GRID}seeds" for name, *_ in grown) and not stored["code"]["threefry_partitionable"]:
        raise InputError(
            f"{directory}: with jax_threefry_partitionable off, more seeds change those that are there: choose another "
            "directory with -o"
        )


def _short(value: Any) -> str:
    text = value if value == _ABSENT else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
