"""Makes a process's event bus out of arguments and environment variables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mesh_client.core.errors import ConfigError
from mesh_client.events.bus import MAX_EVENTS, MAX_OUTBOX_BYTES, EventBus, FollowPolicy
from mesh_client.events.outbox import POSTGRES, OutboxStore
from mesh_client.events.settings import OUTBOX, broker_settings

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from mesh_client.transport import Transport


def make_bus(
    service: str,
    transport: Transport,
    tracer_provider: TracerProvider | None,
    *,
    broker: str | Sequence[str] | None,
    credentials: str | Path | None,
    roots: str | Path | None,
    outbox: str | Path | OutboxStore | None,
    max_events: int | None,
    max_bytes: int | None,
    follow_policy: FollowPolicy | None = None,
) -> EventBus:
    """A bus; arguments as for `mesh_client.mesh.Mesh.events`.

    Raises:
        ConfigError, InvalidValueError: an argument or environment variable is wrong; the message says which.
    """
    if not service:
        raise ConfigError(
            "events: the client belongs to no service; give service= to mesh_client.connect, or MESH_SERVICE"
        )
    max_events = MAX_EVENTS if max_events is None else max_events
    max_bytes = MAX_OUTBOX_BYTES if max_bytes is None else max_bytes
    if max_events < 1 or max_bytes < 1:
        raise ConfigError("events: max_events and max_bytes must be 1 at least")
    settings = broker_settings(broker, credentials, roots, insecure=not transport.secure)
    if outbox is None:
        outbox = os.environ.get(OUTBOX) or _own_file(service)
    store = _store(outbox) if isinstance(outbox, str) else outbox
    return EventBus(
        service,
        transport,
        settings,
        store,
        max_events=max_events,
        max_bytes=max_bytes,
        follow_policy=follow_policy,
        tracer_provider=tracer_provider,
    )


def _store(named: str) -> OutboxStore | Path:
    """A SQLite file, or PostgreSQL."""
    if not named.startswith(POSTGRES):
        return Path(named)
    try:
        from mesh_client.events.postgres import PostgresOutbox
    except ImportError as error:
        raise ConfigError(f"outbox: {error}; install 'grpc-mesh[postgres]'") from None
    return PostgresOutbox(named)


def _own_file(service: str) -> Path:
    """Where the outbox is when nobody says: readable by this user alone, for events may hold anything."""
    home = os.environ.get("XDG_STATE_HOME")
    directory = (Path(home) if home else Path.home() / ".local" / "state") / "grpc-mesh" / "outbox"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{OUTBOX}: {directory} cannot be made: {error.strerror}; name a file") from None
    return directory / f"{service}.sqlite"
