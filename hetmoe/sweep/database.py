"""The SQLite file of a sweep: its tables, its version, and one line for whatever SQLite objects to.

`finished` has a row per finished point, with either its numbers or why it has none (`error`). Rows are only ever added,
but for failed ones that are to be tried again. `claims` is likewise a log: a claim counts while the process of its
worker lives and its point is not finished. The view `results` joins all there is to know of a row.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Generator
from pathlib import Path
from typing import Any

from hetmoe.errors import InputError

FILE = "sweep.sqlite"
SCHEMA = 1

_TABLES = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)",  # values are JSON
    "CREATE TABLE scores (rule TEXT PRIMARY KEY, scores TEXT NOT NULL)",  # JSON [layers][experts]
    """CREATE TABLE runs (
        worker TEXT PRIMARY KEY, run_started_utc TEXT NOT NULL, command TEXT NOT NULL, git_revision TEXT,
        code_digest TEXT NOT NULL, versions TEXT NOT NULL, platform TEXT NOT NULL, machine TEXT NOT NULL,
        device_platform TEXT NOT NULL, device_kind TEXT NOT NULL, device_count INTEGER NOT NULL)""",
    """CREATE TABLE claims (
        number INTEGER PRIMARY KEY, point_id TEXT NOT NULL, worker TEXT NOT NULL REFERENCES runs,
        claimed_utc TEXT NOT NULL)""",
    """CREATE TABLE finished (
        point_id TEXT PRIMARY KEY, placement TEXT NOT NULL, fraction REAL, device TEXT NOT NULL,
        noise_scale REAL NOT NULL, time_s REAL, bits INTEGER NOT NULL, seed_index INTEGER NOT NULL,
        nll REAL, correct REAL, tokens INTEGER, bytes INTEGER, questions INTEGER, perplexity REAL, bits_per_byte REAL,
        accuracy REAL, digital_parameters INTEGER, crossbar_parameters INTEGER, error TEXT,
        worker TEXT NOT NULL REFERENCES runs, started_utc TEXT NOT NULL, ended_utc TEXT NOT NULL,
        seconds REAL NOT NULL, evaluated_together INTEGER NOT NULL, key_words TEXT NOT NULL,
        CHECK (CASE WHEN error IS NULL THEN nll + correct + tokens + bytes + questions + perplexity + bits_per_byte
            + digital_parameters + crossbar_parameters IS NOT NULL
        ELSE coalesce(nll, correct, tokens, bytes, questions, perplexity, bits_per_byte, accuracy,
            digital_parameters, crossbar_parameters) IS NULL END))""",
    """CREATE VIEW results AS SELECT finished.*, run_started_utc, command, git_revision, code_digest, versions,
        platform, machine, device_platform, device_kind, device_count,
        (SELECT json_extract(value, '$.name') FROM meta WHERE key = 'model') AS model,
        (SELECT json_extract(value, '$.fingerprint') FROM meta WHERE key = 'model') AS fingerprint,
        (SELECT json_extract(value, '$.weights_sha256') FROM meta WHERE key = 'model') AS weights_sha256,
        (SELECT json_extract(value, '$') FROM meta WHERE key = 'calibration') AS calibration_sha256,
        (SELECT value FROM meta WHERE key = 'config') AS config,
        (SELECT value FROM meta WHERE key = 'text') AS text
        FROM finished JOIN runs USING (worker)""",
)


@contextlib.contextmanager
def one_line(path: Path) -> Generator[None]:
    """Turns SQLite's errors into InputErrors that name the file."""
    try:
        yield
    except sqlite3.OperationalError as error:  # a full disk, no permission, a lock that is never freed
        raise InputError(
            f"{path}: {error}; all finished points are kept: mend this, then run the same command again"
        ) from None
    except sqlite3.IntegrityError as error:
        hint = ""
        if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY:
            hint = (
                ": another process evaluated the same point; leave the folder 'workers' beside it alone while a sweep "
                "runs"
            )
        raise InputError(f"{path}: {error}{hint}") from None
    except sqlite3.DatabaseError as error:
        raise InputError(f"{path}: is damaged or no store of a sweep ({error}); choose another directory") from None


def connect(path: Path) -> sqlite3.Connection:
    """Opens the file for writing and makes it if need be. Call within `one_line`."""
    # Transactions are begun by hand; another process holds the file for milliseconds, a minute is forever.
    connection = sqlite3.connect(path, timeout=60, isolation_level=None)
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA synchronous = FULL")  # a commit outlives a loss of power
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Opens an existing file for reading. Call within `one_line`."""
    log = path.with_name(f"{path.name}-wal")
    # SQLite wants to write beside a file with a write-ahead log even to read it, unless told that nobody changes it.
    frozen = not log.exists() and not os.access(path.parent, os.W_OK, effective_ids=True)
    uri = path.absolute().as_uri() + ("?immutable=1" if frozen else "?mode=ro")
    connection = sqlite3.connect(uri, uri=True, timeout=60, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Generator[None]:
    """All or nothing, and nobody else writes meanwhile."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def is_empty(connection: sqlite3.Connection) -> bool:
    """Whether nothing was ever written: a new file, or one whose maker was killed before its first commit."""
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0


def create_tables(connection: sqlite3.Connection) -> None:
    """Makes all tables. Call within a transaction."""
    for statement in _TABLES:
        connection.execute(statement)
    write_meta(connection, "schema", SCHEMA)


def write_meta(connection: sqlite3.Connection, key: str, value: Any) -> None:
    """Sets a value of table `meta`."""
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))


def read_meta(connection: sqlite3.Connection, path: Path) -> dict[str, Any]:
    """Table `meta`, once it is certain that this version of hetmoe understands the file.

    Raises:
        InputError: for a newer schema, or a database that is no sweep.
    """
    tables = {row["name"] for row in connection.execute("SELECT name FROM sqlite_master")}
    found = dict(connection.execute("SELECT key, value FROM meta").fetchall()) if "meta" in tables else {}
    try:
        meta = {key: json.loads(value) for key, value in found.items()}
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}); choose another directory") from None
    schema = meta.get("schema")
    if not isinstance(schema, int):
        raise InputError(f"{path}: is a database, but no store of a sweep; choose another directory")
    if schema > SCHEMA:
        raise InputError(f"{path}: has schema {schema}, this hetmoe reads up to schema {SCHEMA}: upgrade hetmoe")
    return meta
