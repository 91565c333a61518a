"""Rows of an outbox's table, which any program may have written, as events that a broker can take."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.events.envelope import MAX_ID, Envelope, check_key, check_type
from mesh_client.events.prepared import PreparedEvent

logger = logging.getLogger(__name__)

MAX_HEADERS = 16_384
"""Bytes of all headers of an event: they travel in one frame, of which brokers take 128 KiB."""
MAX_SOURCE = 2_048
"""Characters of who published; a SPIFFE ID has no more bytes."""
_LAST = 253_402_300_799.0
"""The end of the year 9999 in seconds since 1970."""


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of the table."""

    number: int
    event: PreparedEvent


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no event, and why."""

    number: int
    why: str


def next_events(fetch: Callable[[], Sequence[Sequence[Any]]], refuse: Callable[[int, str], None]) -> list[StoredEvent]:
    """The next rows that are events; none when there are no rows.

    Args:
        fetch: the next rows, without those that were put aside.
        refuse: puts a row aside, given its number and why.
    """
    while rows := fetch():
        if events := events_of(rows, refuse):
            return events
    return []


def events_of(rows: Iterable[Sequence[Any]], refuse: Callable[[int, str], None]) -> list[StoredEvent]:
    """Rows as events; those that are none are put aside, so that they hold nobody up."""
    events = []
    for found in map(read_row, rows):
        if isinstance(found, StoredEvent):
            events.append(found)
        else:
            logger.error("row %d of the outbox is no event and is put aside: %s", found.number, found.why)
            refuse(found.number, found.why)
    return events


def read_row(row: Sequence[Any]) -> StoredEvent | BadRow:
    """A row as an event.

    Args:
        row: number, id, type, key, source, time, version of the schema, headers, whether it is mandatory, and body.
    """
    number, id, type, key, source, created, schema, headers, mandatory, body = row
    try:
        for name, value, most in (("id", id, MAX_ID), ("source", source, MAX_SOURCE), ("schema_version", schema, 64)):
            _check(isinstance(value, str) and len(value.encode()) <= most, f"{name}: a text of at most {most} bytes")
        _check(bool(id) and bool(source), "id and source: not empty")
        _check(isinstance(type, str) and isinstance(key, str), "type and event_key: texts")
        check_type(type)
        check_key(key)
        _check(
            isinstance(created, int | float) and 0 <= created <= _LAST,
            f"created: seconds since 1970, not {created!r}",
        )
        _check(isinstance(body, bytes | memoryview), "body: bytes, not a text")
        envelope = Envelope(id, source, type, float(created), schema, key)
        return StoredEvent(number, PreparedEvent(envelope, _headers(headers), bool(mandatory), bytes(body)))
    except InvalidValueError as error:
        return BadRow(number, f"{error.path}: expected {error.expected}")
    except ValueError as error:
        return BadRow(number, str(error))


def _headers(text: object) -> dict[str, str]:
    if not text:
        return {}
    _check(isinstance(text, str) and len(text.encode()) <= MAX_HEADERS, f"headers: at most {MAX_HEADERS} bytes")
    try:
        loaded = json.loads(str(text))
    except ValueError as error:
        raise ValueError(f"headers: no JSON: {error}") from None
    texts = isinstance(loaded, dict) and all(isinstance(each, str) for pair in loaded.items() for each in pair)
    _check(texts, "headers: a JSON object of texts")
    for name, value in loaded.items():
        _check(len(name.encode()) <= 255, "headers: names of at most 255 bytes")
        value.encode()
    return dict(loaded)


def _check(holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"expected {expected}")
