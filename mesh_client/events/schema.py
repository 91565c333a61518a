"""Protobuf messages as events: their version, and whether what was received is what is understood here."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet

from mesh_client.core.events.errors import DeadReason, UnusableEventError

M = TypeVar("M", bound=Message)


class UnknownField(Protocol):
    """As protobuf shows a field that it does not know."""

    field_number: int


def schema_version(message_class: type[Message]) -> str:
    """12 hex digits that change with the definition of the message or of a message in it, comments aside."""
    return _version(_descriptor(message_class))


def _descriptor(of: type[Message] | Message) -> Descriptor:
    return cast("Descriptor", of.DESCRIPTOR)  # upb's has the same form


@functools.cache
def _version(descriptor: Descriptor) -> str:
    return hashlib.sha256("\n".join(_lines(descriptor, set())).encode()).hexdigest()[:12]


def decode(message_class: type[M], body: bytes, schema: str) -> M:
    """The message in an event's body.

    A newer definition may have more fields: they are kept. One that gives a field of ours another type is refused.

    Args:
        message_class: its generated class.
        body: as received.
        schema: version of the definition that it was made by; empty when unknown.

    Raises:
        UnusableEventError: it is not such a message, or ours and the publisher's definition contradict each other.
    """
    message = message_class()
    try:
        message.ParseFromString(body)
    except (DecodeError, ValueError) as error:
        name = message.DESCRIPTOR.full_name
        raise UnusableEventError(DeadReason.UNDECODABLE, f"the body is no {name}: {error}") from None
    if schema != schema_version(message_class) and (field := _contradiction(message)) is not None:
        raise UnusableEventError(
            DeadReason.SCHEMA,
            f"{field.full_name} has another type in the publisher's definition (version {schema or 'unknown'}, ours "
            f"is {schema_version(message_class)}): give changed messages a new package version",
        )
    return message


def _lines(descriptor: Descriptor, seen: set[str]) -> Iterator[str]:
    seen.add(descriptor.full_name)
    nested: list[Descriptor | EnumDescriptor] = []
    for field in sorted(descriptor.fields, key=lambda field: field.number):
        kind = field.message_type or field.enum_type
        shape = "repeated" if field.is_repeated else "optional" if field.has_presence else "plain"
        name = kind.full_name if kind else ""
        yield f"{descriptor.full_name} {field.number} {field.name} {field.type} {shape} {name}"
        if kind is not None and kind.full_name not in seen:
            seen.add(kind.full_name)
            nested.append(kind)
    for kind in nested:
        if isinstance(kind, EnumDescriptor):
            yield from (f"{kind.full_name} {value.number} {value.name}" for value in kind.values)
        else:
            yield from _lines(kind, seen)


def _contradiction(message: Message) -> FieldDescriptor | None:
    """A field that we know and that came with another wire type: protobuf files it with those that it does not know."""
    known = _descriptor(message).fields_by_number
    for unknown in cast("Iterable[UnknownField]", UnknownFieldSet(message)):
        if unknown.field_number in known:
            return known[unknown.field_number]
    for field, value in message.ListFields():
        if field.message_type is None:
            continue
        if field.message_type.GetOptions().map_entry:
            inner = [each for each in value.values() if isinstance(each, Message)]
        else:
            inner = list(value) if field.is_repeated else [value]
        for each in inner:
            if (found := _contradiction(each)) is not None:
                return found
    return None
