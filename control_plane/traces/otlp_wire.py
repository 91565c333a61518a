"""Takes an OTLP request apart into its spans, each as bytes of its own, before anything of it is parsed.

A message of 4 MiB can say "an empty span" two million times, for which protobuf needs 330 MiB (measured). So what is
parsed are single spans of bounded size, and what is looked at here is counted.

Source: protobuf's wire format, https://protobuf.dev/programming-guides/encoding/, and opentelemetry-proto's
``ExportTraceServiceRequest``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mesh_client.core.errors import MeshError

MAX_FIELDS = 10_000
"""Fields of a request and of the messages within it that hold spans."""

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class MalformedRequestError(MeshError, ValueError):
    """It is no OTLP request, or one that is made of too many parts."""


@dataclass(frozen=True, slots=True)
class RawSpans:
    """The spans of one process within a request.

    Attributes:
        resource: serialised ``opentelemetry.proto.resource.v1.Resource``; empty for none.
        spans: serialised ``opentelemetry.proto.trace.v1.Span`` each.
    """

    resource: bytes
    spans: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class RawRequest:
    """A request in parts.

    Attributes:
        processes: whose spans it holds.
        fields: parts that were looked at, spans included.
    """

    processes: tuple[RawSpans, ...]
    fields: int

    @property
    def spans(self) -> int:
        """How many it holds."""
        return sum(len(process.spans) for process in self.processes)


def split(request: bytes) -> RawRequest:
    """What a serialised ``ExportTraceServiceRequest`` holds, by process.

    Raises:
        MalformedRequestError: it is no such message, or has more than `MAX_FIELDS` fields.
    """
    reader = _Reader(request)
    found = []
    for start, end in reader.messages(0, len(request), 1):
        resource: list[bytes] = []
        spans: list[bytes] = []
        for number, inner, inner_end in reader.fields(start, end):
            if number == 1:
                resource.append(request[inner:inner_end])
            elif number == 2:
                spans += [request[first:last] for first, last in reader.messages(inner, inner_end, 2)]
        # One that comes in parts is merged by joining them.
        found.append(RawSpans(b"".join(resource), tuple(spans)))
    return RawRequest(tuple(found), reader.count)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.count = 0

    def messages(self, start: int, end: int, wanted: int) -> Iterator[tuple[int, int]]:
        return ((first, last) for number, first, last in self.fields(start, end) if number == wanted)

    def fields(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Number, beginning and end of each field that has a length; others are passed over."""
        position = start
        while position < end:
            self.count += 1
            if self.count > MAX_FIELDS:
                raise MalformedRequestError(f"the request has more than {MAX_FIELDS} parts; send less at once")
            tag, position = self._varint(position, end)
            number, kind = tag >> 3, tag & 7
            if kind == _VARINT:
                _, position = self._varint(position, end)
                continue
            size = {_FIXED64: 8, _FIXED32: 4}.get(kind)
            if kind == _LENGTH:
                size, position = self._varint(position, end)
            if size is None or not number or position + size > end:
                raise MalformedRequestError("the request is no ExportTraceServiceRequest")
            if kind == _LENGTH:
                yield number, position, position + size
            position += size

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = shift = 0
        while position < end and shift < 64:
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
        raise MalformedRequestError("the request is no ExportTraceServiceRequest")
