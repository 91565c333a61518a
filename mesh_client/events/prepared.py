"""An event that is ready to be stored in an outbox."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import dataclass

from mesh_client.core.events.envelope import Envelope
from mesh_client.core.events.errors import OutboxFullError

INSERT = (
    "INSERT INTO mesh_outbox (id, type, event_key, source, created, schema_version, headers, mandatory, body)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_FULL = "mesh outbox is full"


@dataclass(frozen=True, slots=True)
class PreparedEvent:
    """An event that is ready to be stored: by `store`, in a transaction of the service's own SQLite database.

    Attributes:
        parameters: for the columns of the table ``mesh_outbox``, in the order of `INSERT`.
    """

    envelope: Envelope
    headers: dict[str, str]
    mandatory: bool
    body: bytes

    @property
    def parameters(self) -> tuple[str, str, str, str, float, str, str, int, bytes]:
        """Values of the columns, in the order of `INSERT`."""
        at = self.envelope
        headers = json.dumps(self.headers, separators=(",", ":")) if self.headers else ""
        return at.id, at.type, at.key, at.source, at.time, at.schema, headers, int(self.mandatory), self.body

    def store(self, connection: sqlite3.Connection) -> None:
        """Stores it within the transaction that the connection is in: with everything else in it, or not at all.

        Raises:
            OutboxFullError: the outbox is full.
            sqlite3.Error: anything else that SQLite says.
        """
        try:
            connection.execute(INSERT, self.parameters)
        except sqlite3.IntegrityError as error:
            if _FULL not in str(error):
                raise
            raise OutboxFullError(
                "the outbox is full: the broker takes no events, or nobody is subscribed to them; nothing was stored"
            ) from None
