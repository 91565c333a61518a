"""Spans as the store holds them: small, and with what each of them costs in memory.

Times of spans are nanoseconds since 1970 by the clock of whoever made the span, as in OTLP. Nothing here believes that
two processes have the same clock.
"""

from __future__ import annotations

import enum
import sys
from collections.abc import Collection
from dataclasses import dataclass

_PAIR, _BETWEEN = "\x1f", "\x1e"
_SEPARATORS = str.maketrans({_PAIR: " ", _BETWEEN: " "})

_REFERENCE, _TUPLE, _NUMBER = 8, 56, 32
_EVENT, _LINK, _SPAN, _PROCESS = 64, 56, 168, 80
"""Bytes of the objects themselves, with the garbage collector's headers (CPython 3.11 to 3.13, 64 bits)."""


class Kind(enum.Enum):
    """What a span is, as OTLP has it."""

    UNSPECIFIED = "unspecified"
    INTERNAL = "internal"
    SERVER = "server"
    CLIENT = "client"
    PRODUCER = "producer"
    CONSUMER = "consumer"


class Status(enum.Enum):
    """How a span ended."""

    UNSET = "unset"
    OK = "ok"
    ERROR = "error"


def pack(attributes: Collection[tuple[str, str]]) -> str:
    """Attributes as one text, which takes a fifth of the memory of one object for each key and value.

    The two characters that separate them, U+001E and U+001F, are replaced by blanks within them.
    """
    pairs = [f"{key}{_PAIR}{value}" for key, value in attributes]
    packed = _BETWEEN.join(pairs)
    if packed.count(_PAIR) == len(pairs) and packed.count(_BETWEEN) < max(len(pairs), 1):
        return packed
    return pack([(key.translate(_SEPARATORS), value.translate(_SEPARATORS)) for key, value in attributes])


def unpack(packed: str) -> dict[str, str]:
    """The attributes, in the order in which they were packed."""
    pairs = (pair.partition(_PAIR) for pair in packed.split(_BETWEEN)) if packed else ()
    return {key: value for key, _, value in pairs}


@dataclass(frozen=True, slots=True)
class Process:
    """One process that makes spans.

    Attributes:
        service: by its identity; what it calls itself where there are no identities.
        workload_id: of its identity; empty where nobody proved who they are.
        instance: what it calls itself among the processes of its service (``service.instance.id``).
        packed: its other attributes, see `pack`. ``service.name`` is among them if it calls itself something else than
            ``service``.
    """

    service: str
    workload_id: str = ""
    instance: str = ""
    packed: str = ""

    @property
    def verified(self) -> bool:
        """Whether it proved who it is."""
        return bool(self.workload_id)

    @property
    def attributes(self) -> dict[str, str]:
        """Its attributes, but for those that have fields."""
        return unpack(self.packed)

    @property
    def cost(self) -> int:
        """Bytes, some."""
        return _PROCESS + _texts(self.service, self.workload_id, self.instance, self.packed)


@dataclass(frozen=True, slots=True)
class SpanEvent:
    """Something that happened within a span.

    Attributes:
        time: nanoseconds since 1970.
        name: of the event.
        packed: its attributes, see `pack`.
    """

    time: int
    name: str
    packed: str = ""

    @property
    def attributes(self) -> dict[str, str]:
        """Its attributes."""
        return unpack(self.packed)

    @property
    def cost(self) -> int:
        """Bytes, some."""
        return _EVENT + _NUMBER + _REFERENCE + _texts(self.name, self.packed)


@dataclass(frozen=True, slots=True)
class SpanLink:
    """Another span that has to do with this one, mostly of another trace. Lower-case hex."""

    trace_id: str
    span_id: str

    @property
    def cost(self) -> int:
        """Bytes, some."""
        return _LINK + _REFERENCE + _texts(self.trace_id, self.span_id)


@dataclass(frozen=True, slots=True)
class Span:
    """One span that has ended. Its trace knows its trace id.

    Attributes:
        span_id: 16 lower-case hex digits.
        parent_id: likewise; empty for the first span of a trace.
        process: who made it.
        name: as its maker put it.
        start: nanoseconds since 1970.
        end: likewise, not before ``start``.
        method: full name of the RPC's method, such as ``shop.v1.OrderService/PlaceOrder``; the name for want of one.
        kind: what it is.
        status: how it ended.
        message: of the status, for errors.
        packed: its attributes, see `pack`.
        events: in the order in which they came.
        links: likewise.
        dropped: attributes, events and links that were too many or too large.
    """

    span_id: str
    parent_id: str
    process: Process
    name: str
    start: int
    end: int
    method: str = ""
    kind: Kind = Kind.INTERNAL
    status: Status = Status.UNSET
    message: str = ""
    packed: str = ""
    events: tuple[SpanEvent, ...] = ()
    links: tuple[SpanLink, ...] = ()
    dropped: int = 0

    @property
    def service(self) -> str:
        """Whose it is."""
        return self.process.service

    @property
    def duration(self) -> int:
        """Nanoseconds."""
        return self.end - self.start

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.status is Status.ERROR

    @property
    def attributes(self) -> dict[str, str]:
        """Its attributes."""
        return unpack(self.packed)

    @property
    def cost(self) -> int:
        """Bytes, some, without those of its process, which others share."""
        return (
            _SPAN
            + 2 * _NUMBER
            + _TUPLE * (bool(self.events) + bool(self.links))
            + _texts(self.span_id, self.parent_id, self.name, self.message, self.packed)
            + (0 if self.method is self.name else _texts(self.method))
            + sum(event.cost for event in self.events)
            + sum(link.cost for link in self.links)
        )


def _texts(*texts: str) -> int:
    return sum(sys.getsizeof(text) for text in texts)
