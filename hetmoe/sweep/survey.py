"""What all stores of a sweep's directory have finished: the main one, and those of parts.

Without parts the directory belongs to one machine, and the main store is read in place. With parts any machine may ask.
"""

import contextlib
import dataclasses
import sqlite3
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError
from hetmoe.sweep.database import FILE, connect_to_read, is_empty, one_line, read_meta
from hetmoe.sweep.identity import check_identity, check_part_identity, is_same
from hetmoe.sweep.parts import Part, found_parts, part_directory
from hetmoe.sweep.points import SweepPoint, point_id
from hetmoe.sweep.snapshot import read_snapshot
from hetmoe.sweep.store import claimed_points, failed_points, finished_points


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreView:
    """One store at one moment."""

    meta: dict[str, Any]
    finished: set[str]  # with a result
    failed: set[str]
    claimed: set[str]  # by processes that run, on this machine
    last_utc: str | None  # end of the last evaluation


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """Counts of points."""

    points: int
    finished: int  # with a result
    failed: int
    claimed: int  # by processes that run; those of parts are not known
    uncollected: int  # finished or failed, but in parts only

    @property
    def open(self) -> int:
        """Points that nobody works on."""
        return self.points - self.finished - self.failed - self.claimed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """All stores of a directory."""

    directory: Path
    main: StoreView | None
    parts: dict[Part, StoreView]

    def count(self, points: Sequence[SweepPoint]) -> SweepStatus:
        """Counts of the points of a grid."""
        ids, stores = {point_id(point) for point in points}, self._stores()
        finished = ids & _union(store.finished for store in stores)
        failed = ids & _union(store.failed for store in stores) - finished
        claimed = ids & _union(store.claimed for store in stores) - finished - failed
        collected = set[str]() if self.main is None else self.main.finished | self.main.failed
        return SweepStatus(
            points=len(ids), finished=len(finished), failed=len(failed), claimed=len(claimed),
            uncollected=len((finished | failed) - collected),
        )  # fmt: skip

    def share(self, part: Part, groups: Sequence[list[SweepPoint]], *, retry_failed: bool) -> list[list[SweepPoint]]:
        """The groups of a part, without the points that other stores have; what it has finished itself is there."""
        elsewhere = self._elsewhere(part, retry_failed=retry_failed)
        left = ([point for point in group if point_id(point) not in elsewhere] for group in part.share(groups))
        return [group for group in left if group]

    def of_part(self, part: Part, *, retry_failed: bool) -> set[str]:
        """What a part has finished itself; with `retry_failed`, what gave a number."""
        store = self.parts.get(part)
        if store is None:
            return set()
        return store.finished if retry_failed else store.finished | store.failed

    def check(self, identity: dict[str, Any], *, extend: bool) -> None:
        """Refuses stores that a run of this identity may not add to, or add up.

        A part that is older than the grid of the main store needs no --extend: that was given once.

        Raises:
            InputError: for a store of other settings.
        """
        if self.main is not None:
            check_identity(self.directory, self.main.meta, identity, extend=extend)
        identity = self.with_model(identity)  # what is not known must be one thing at least
        grown = self.main is not None and is_same(self.main.meta, identity)
        for part, store in self.parts.items():
            check_part_identity(part_directory(self.directory, part), store.meta, identity, extend=extend or grown)

    def with_model(self, identity: dict[str, Any]) -> dict[str, Any]:
        """The identity, and the model of the first store where it has none."""
        stores = self._stores()
        return ({"model": stores[0].meta.get("model")} if stores else {}) | identity

    def _elsewhere(self, part: Part, *, retry_failed: bool) -> set[str]:
        others = [store for other, store in self.parts.items() if other != part]
        others += [] if self.main is None else [self.main]
        finished = _union(store.finished for store in others)
        return finished if retry_failed else finished | _union(store.failed for store in others)

    def _stores(self) -> list[StoreView]:
        return [*([] if self.main is None else [self.main]), *self.parts.values()]


def make_survey(directory: Path) -> Survey:
    """Looks at the stores of a directory; one that is not there has none.

    Raises:
        InputError: for a directory that is none, or a file that is damaged or no store.
    """
    if directory.exists() and not directory.is_dir():
        raise InputError(f"{directory}: is a file; name a directory with -o")
    names, path, main = found_parts(directory), directory / FILE, None
    if path.exists():
        with one_line(path), contextlib.closing(read_snapshot(path) if names else connect_to_read(path)) as connection:
            if not is_empty(connection):
                main = _view(connection, directory)
    parts: dict[Part, StoreView] = {}
    for part in names:
        folder = part_directory(directory, part)
        with one_line(folder / FILE), contextlib.closing(read_snapshot(folder / FILE)) as connection:
            parts[part] = _view(connection, folder)
    return Survey(directory=directory, main=main, parts=parts)


def read_status(
    directory: Path, identity: dict[str, Any], points: Sequence[SweepPoint], *, extend: bool
) -> SweepStatus:
    """Counts of the points of a grid, and whether this run may add to the stores: also what is checked early.

    Args:
        directory: of the stores.
        identity: what is known of `config`, `text`, `model` and `code`.
        points: of the grid.
        extend: see `check_identity`.

    Raises:
        InputError: for a directory that is none, another store, or one of other settings.
    """
    survey = make_survey(directory)
    survey.check(identity, extend=extend)
    return survey.count(points)


def _view(connection: sqlite3.Connection, directory: Path) -> StoreView:
    meta = read_meta(connection, directory / FILE)
    failed = failed_points(connection)
    return StoreView(
        meta=meta,
        finished=finished_points(connection) - failed,
        failed=failed,
        claimed=claimed_points(connection, directory),
        last_utc=connection.execute("SELECT max(ended_utc) FROM finished").fetchone()[0],
    )


def _union(sets: Iterable[set[str]]) -> set[str]:
    return set[str]().union(*sets)
