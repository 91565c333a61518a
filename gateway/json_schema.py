"""JSON Schemas of messages, by protobuf's JSON mapping (https://protobuf.dev/programming-guides/json/)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from gateway.descriptors import Api, map_entry

Schema = dict[str, object]

_INT64 = r"^-?[0-9]{1,20}$"
_UINT64 = r"^[0-9]{1,20}$"


def _number() -> Schema:
    return {"oneOf": [{"type": "number"}, {"type": "string", "enum": ["NaN", "Infinity", "-Infinity"]}]}


def _integer(low: int, high: int) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


_SIGNED: Schema = _integer(-(2**31), 2**31 - 1)
_UNSIGNED: Schema = _integer(0, 2**32 - 1)
_SIGNED_64: Schema = {"type": "string", "format": "int64", "pattern": _INT64}
_UNSIGNED_64: Schema = {"type": "string", "format": "uint64", "pattern": _UINT64}
_BYTES: Schema = {"type": "string", "contentEncoding": "base64"}

_SCALARS: Mapping[int, Schema] = {
    FieldDescriptor.TYPE_DOUBLE: _number(),
    FieldDescriptor.TYPE_FLOAT: _number(),
    FieldDescriptor.TYPE_INT64: _SIGNED_64,
    FieldDescriptor.TYPE_SINT64: _SIGNED_64,
    FieldDescriptor.TYPE_SFIXED64: _SIGNED_64,
    FieldDescriptor.TYPE_UINT64: _UNSIGNED_64,
    FieldDescriptor.TYPE_FIXED64: _UNSIGNED_64,
    FieldDescriptor.TYPE_INT32: _SIGNED,
    FieldDescriptor.TYPE_SINT32: _SIGNED,
    FieldDescriptor.TYPE_SFIXED32: _SIGNED,
    FieldDescriptor.TYPE_UINT32: _UNSIGNED,
    FieldDescriptor.TYPE_FIXED32: _UNSIGNED,
    FieldDescriptor.TYPE_BOOL: {"type": "boolean"},
    FieldDescriptor.TYPE_STRING: {"type": "string"},
    FieldDescriptor.TYPE_BYTES: _BYTES,
}

_OBJECT: Schema = {"type": "object"}
_WELL_KNOWN: Mapping[str, Schema] = {
    "google.protobuf.Any": {"type": "object", "properties": {"@type": {"type": "string"}}, "required": ["@type"]},
    "google.protobuf.BoolValue": {"type": "boolean"},
    "google.protobuf.BytesValue": _BYTES,
    "google.protobuf.DoubleValue": _number(),
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$"},
    "google.protobuf.Empty": {"type": "object", "additionalProperties": False},
    "google.protobuf.FieldMask": {"type": "string"},
    "google.protobuf.FloatValue": _number(),
    "google.protobuf.Int32Value": _SIGNED,
    "google.protobuf.Int64Value": _SIGNED_64,
    "google.protobuf.ListValue": {"type": "array", "items": {}},
    "google.protobuf.StringValue": {"type": "string"},
    "google.protobuf.Struct": _OBJECT,
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.UInt32Value": _UNSIGNED,
    "google.protobuf.UInt64Value": _UNSIGNED_64,
    "google.protobuf.Value": {},
}


class Schemas:
    """Makes schemas, and collects those of messages and enums that they refer to."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._components: dict[str, Schema] = {}

    def components(self) -> dict[str, Schema]:
        """Everything that was referred to, by full name, in the order of names."""
        return dict(sorted(self._components.items()))

    def of_field(self, field: FieldDescriptor) -> Schema:
        """The schema of a field's value."""
        if entry := map_entry(field):
            made: Schema = {"type": "object", "additionalProperties": self._single(entry[1])}
        elif field.is_repeated:
            made = {"type": "array", "items": self._single(field)}
        else:
            made = self._single(field)
        comment = self._api.comment(field)
        deprecated: Schema = {"deprecated": True} if field.GetOptions().deprecated else {}
        return made | ({"description": comment} if comment else {}) | deprecated

    def of_message(self, message: Descriptor, without: Collection[str] = ()) -> Schema:
        """The schema of a message: a reference, but in full if fields are left out of it, which are given by name."""
        if message.full_name in _WELL_KNOWN:
            return dict(_WELL_KNOWN[message.full_name])
        if without:
            return self._object(message, without)
        if message.full_name not in self._components:
            self._components[message.full_name] = {}  # it may hold itself
            self._components[message.full_name] = self._object(message, ())
        return _reference(message.full_name)

    def _object(self, message: Descriptor, without: Collection[str]) -> Schema:
        fields = [field for field in message.fields if field.name not in without]
        made: Schema = {"type": "object"}
        if comment := self._api.comment(message):
            made["description"] = comment
        made["properties"] = {field.json_name: self.of_field(field) for field in fields}
        if required := [field.json_name for field in fields if field.is_required]:
            made["required"] = required
        return made

    def _enum(self, enum: EnumDescriptor) -> Schema:
        if enum.full_name == "google.protobuf.NullValue":
            return {"type": "null"}
        made: Schema = {"type": "string", "enum": [value.name for value in enum.values]}
        if comment := self._api.comment(enum):
            made["description"] = comment
        self._components[enum.full_name] = made
        return _reference(enum.full_name)

    def _single(self, field: FieldDescriptor) -> Schema:
        if field.message_type is not None:
            return self.of_message(field.message_type)
        return self._enum(field.enum_type) if field.enum_type is not None else dict(_SCALARS[field.type])


def _reference(full_name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{full_name}"}
