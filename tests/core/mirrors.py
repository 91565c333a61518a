"""Holds a model of pydantic and the protobuf message that mirrors it to have the same fields."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from pydantic import BaseModel


def models_within(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_within(part)


def assert_same_fields(model: type[BaseModel], message: Descriptor, seen: set[str]) -> None:
    assert model.__name__ == message.name
    seen.add(message.name)
    assert list(model.model_fields) == [field.name for field in message.fields]
    for field in message.fields:
        info = model.model_fields[field.name]
        nested = list(models_within(info.annotation))
        if nested:
            assert field.message_type is not None
            value = field.message_type.fields_by_name["value"].message_type if is_map(field) else field.message_type
            assert value is not None
            assert_same_fields(nested[0], value, seen)
        elif field.message_type is not None:
            assert field.message_type.full_name == "google.protobuf.Duration" or is_map(field)
        elif not info.is_required() and not field.is_repeated and not field.has_presence:
            # Unset arrives as protobuf's zero: harmless where that is the default too, or is no value at all.
            assert info.default == field.default_value or (field.name == "method" and info.default == "*")


def is_map(field: FieldDescriptor) -> bool:
    assert field.message_type is not None
    return field.message_type.GetOptions().map_entry
