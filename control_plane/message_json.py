"""Messages in the JSON form of the `mesh` command and of the dashboard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None

_POLICIES = frozenset({"mesh.v1.ServicePolicy", "mesh.v1.EdgePolicy"})


def seconds(duration: Duration) -> float:
    """A protobuf duration in seconds."""
    return duration.seconds + duration.nanos / 1e9


def moment(value: Timestamp) -> str:
    """A protobuf timestamp as RFC 3339 has it, to the second, UTC; a dash for none."""
    return f"{value.ToDatetime():%Y-%m-%dT%H:%M:%SZ}" if value.seconds else "-"


def to_json(message: Message, *, sparse: bool = False) -> dict[str, Json]:
    """A message in JSON: protobuf's field names, durations in seconds, timestamps as in RFC 3339.

    Fields without presence are always there. A message field that is not set is null.

    Args:
        message: what to convert.
        sparse: leave out what is not set or empty, as in a policy, where that means the default.
    """
    made: dict[str, Json] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        choices = {} if field.enum_type is None else {choice.number: choice.name for choice in field.enum_type.values}
        if field.has_presence and not message.HasField(field.name):
            if not sparse:
                made[field.name] = None
        elif not field.is_repeated:
            made[field.name] = _value(value, choices, sparse)
        elif value or not sparse:
            is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
            made[field.name] = (
                {key: _value(value[key], choices, sparse) for key in sorted(value)}
                if is_map
                else [_value(item, choices, sparse) for item in value]
            )
    return made


def _value(value: object, choices: Mapping[int, str], sparse: bool) -> Json:
    if isinstance(value, Duration):
        return round(seconds(value), 9)
    if isinstance(value, Timestamp):
        fraction = f"{value.nanos / 1e9:.9f}".rstrip("0").lstrip("0") if value.nanos else ""
        return moment(value).replace("Z", f"{fraction}Z")
    if isinstance(value, Message):
        return to_json(value, sparse=sparse or value.DESCRIPTOR.full_name in _POLICIES)
    if isinstance(value, int) and value in choices:
        return choices[value]
    return cast("Json", value)
