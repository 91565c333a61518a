"""What an event says about itself: CloudEvents attributes, in the headers of an AMQP message.

Binary content mode: the body is the protobuf message alone. The CloudEvents binding for AMQP prefixes attributes with
``cloudEvents:``, or ``cloudEvents_`` where a client cannot write colons; both are read, the first is written.

Source: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/amqp-protocol-binding.md.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mesh_client.core.errors import InvalidValueError
from mesh_client.core.events.errors import DeadReason, UnusableEventError

SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/protobuf"
PREFIX = "cloudEvents:"
_PREFIXES = (PREFIX, "cloudEvents_")

MAX_KEY = 255
"""Characters of an ordering key."""
MAX_ID = 128
"""Characters of an id."""

_TYPE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)+")
_SCHEMA = re.compile(r"protobuf:([A-Za-z0-9_.]+)#([0-9a-f]{12})")
MAX_TYPE = 180
"""Characters of a message type's full name: a routing key has 255 bytes, with the publisher's name in it too."""


def check_key(key: str) -> str:
    """The key, if events can be ordered by it.

    Raises:
        InvalidValueError: it is too long, or has characters that cannot be printed.
    """
    if len(key) > MAX_KEY or not (key.isprintable() or not key):
        raise InvalidValueError("key", key, f"at most {MAX_KEY} printable characters")
    return key


def check_type(name: str) -> str:
    """The name, if it can be the full name of an event's message type.

    Raises:
        InvalidValueError: it has no package, or is too long.
    """
    if len(name) > MAX_TYPE or not _TYPE.fullmatch(name):
        raise InvalidValueError("message type", name, f"a full name with a package, at most {MAX_TYPE} characters")
    return name


@dataclass(frozen=True, slots=True)
class Envelope:
    """What an event says about itself.

    Attributes:
        id: unique together with the source.
        source: who published it: a SPIFFE ID, or ``mesh:NAME`` in plaintext, where it is only claimed.
        type: full name of the protobuf message.
        time: when it happened, seconds since 1970.
        schema: version of the message's definition, 12 hex digits; empty when the publisher did not say.
        key: events with the same key are handled in the order in which they were published; empty for no order.
    """

    id: str
    source: str
    type: str
    time: float
    schema: str = ""
    key: str = ""

    def headers(self) -> dict[str, str]:
        """The attributes as headers of an AMQP message."""
        moment = dt.datetime.fromtimestamp(self.time, dt.UTC)
        found = {
            "specversion": SPEC_VERSION,
            "id": self.id,
            "source": self.source,
            "type": self.type,
            "time": moment.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        }
        if self.schema:
            found["dataschema"] = f"protobuf:{self.type}#{self.schema}"
        if self.key:
            found["partitionkey"] = self.key
        return {f"{PREFIX}{name}": value for name, value in found.items()}

    @classmethod
    def parse(cls, headers: Mapping[str, object], content_type: str | None) -> Envelope:
        """Reads the headers of an AMQP message.

        Raises:
            UnusableEventError: it is no CloudEvent with a protobuf message.
        """
        attributes = {
            name.removeprefix(prefix): value
            for prefix in _PREFIXES
            for name, value in headers.items()
            if name.startswith(prefix) and isinstance(value, str)
        }
        for name in ("specversion", "id", "source", "type"):
            if not attributes.get(name):
                raise UnusableEventError(DeadReason.NOT_AN_EVENT, f"the header {PREFIX}{name} is missing or no text")
        if not attributes["specversion"].startswith("1."):
            raise UnusableEventError(
                DeadReason.NOT_AN_EVENT, f"CloudEvents {attributes['specversion'][:20]!r}, not 1.x"
            )
        if content_type != CONTENT_TYPE:
            raise UnusableEventError(
                DeadReason.NOT_AN_EVENT, f"content type {str(content_type)[:80]!r}, not {CONTENT_TYPE}"
            )
        key = attributes.get("partitionkey", "")
        if len(attributes["id"]) > MAX_ID or len(key) > MAX_KEY:
            raise UnusableEventError(DeadReason.NOT_AN_EVENT, "its id or key is too long")
        schema = _SCHEMA.fullmatch(attributes.get("dataschema", ""))
        return cls(
            attributes["id"],
            attributes["source"],
            attributes["type"],
            _seconds(attributes.get("time", "")),
            schema[2] if schema is not None and schema[1] == attributes["type"] else "",
            key,
        )


def _seconds(text: str) -> float:
    """Seconds since 1970 of an RFC 3339 time; 0 for none."""
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        return 0.0
    return moment.timestamp() if moment.tzinfo is not None else 0.0
