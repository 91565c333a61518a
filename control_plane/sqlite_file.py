"""Opens SQLite files of the control plane, all in the same way."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from mesh_client.core.errors import ConfigError


def connect(path: Path | None, schema: Sequence[str]) -> sqlite3.Connection:
    """A connection for one thread, whose transactions are begun by hand. It goes on after the death of the process.

    Args:
        path: the file; None for memory.
        schema: SQL that leads from each version of the tables to the next one, the first from nothing.

    Raises:
        ConfigError: a newer version of the control plane wrote the file.
        sqlite3.DatabaseError: it is damaged, or cannot be used.
    """
    connection = sqlite3.connect(path or ":memory:", timeout=2.0, isolation_level=None)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        # In WAL mode NORMAL survives the death of the process; a power cut may lose the last transactions.
        connection.execute("PRAGMA synchronous = NORMAL")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found > len(schema):
            raise ConfigError(f"{path} was written by a newer version of the control plane; upgrade this one")
        for number, step in enumerate(schema[found:], found + 1):
            connection.executescript(f"BEGIN; {step} PRAGMA user_version = {number}; COMMIT;")
    except BaseException:
        connection.close()
        raise
    return connection
