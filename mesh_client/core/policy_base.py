"""What every policy is made of: a frozen model with a name, a content version, and errors that name fields.

Field names equal those of the protobuf message, so the protobuf form is the model's JSON form.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, ClassVar, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from mesh_client.core.errors import FieldError, InvalidPolicyError, InvalidValueError
from mesh_client.core.model import check_service_name

MAX_DOCUMENT_BYTES = 256 * 1024
"""Largest policy document; Consul's KV takes 512 KB."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_KEY = "[key]"
"""Ends the location of an error that is about the key of a mapping, in pydantic."""


def parse_duration(value: object) -> object:
    """Seconds from ``250ms``, ``1.5s``, ``2m``, ``1h`` or a number of seconds; other values are left to pydantic."""
    if isinstance(value, str):
        match = _DURATION.fullmatch(value.strip())
        if match is None:
            raise ValueError("expected a duration such as 250ms, 1.5s, 2m or 1h")
        return float(match[1]) * _UNITS[match[2]]
    if value is True or value is False:
        raise ValueError("expected a duration such as 250ms, 1.5s, 2m or 1h")
    return value


def format_duration(seconds: float) -> str:
    """As protobuf's JSON form writes a duration: decimal seconds, at most nine fraction digits."""
    text = f"{seconds:.9f}".rstrip("0").rstrip(".")
    return f"{text}s"


def _whole_nanoseconds(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("expected a finite number")
    # What protobuf cannot carry must not be accepted: it would reach clients as 0s and be refused there.
    return round(value, 9)


def _dns_label(value: str) -> str:
    try:
        return check_service_name(value)
    except InvalidValueError as error:
        raise ValueError(f"expected {error.expected}") from None


_DURATION_SCHEMA = {
    "type": ["string", "number"],
    "pattern": r"^\d+(\.\d+)?(ms|s|m|h)$",
    "examples": ["250ms", "1.5s", "2m"],
}

Duration = Annotated[
    float,
    BeforeValidator(parse_duration),
    AfterValidator(_whole_nanoseconds),
    Field(ge=0.0, le=86_400.0),
    PlainSerializer(format_duration, return_type=str, when_used="json"),
    WithJsonSchema(_DURATION_SCHEMA),
]
"""Seconds, 0 to 86400. Written as ``250ms``, ``1.5s``, ``2m``, ``1h``."""

PositiveDuration = Annotated[Duration, Field(gt=0.0)]
Percent = Annotated[float, Field(ge=0.0, le=100.0)]
DnsLabel = Annotated[str, AfterValidator(_dns_label)]
"""The name of a service or of an edge."""


class Model(BaseModel):
    """A part of a policy."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Policy(Model):
    """What operators write and a store keeps, under a name."""

    NAMED_BY: ClassVar[str]
    """The field that holds its name."""
    STORED_AS: ClassVar[str]
    """What stores call all of its kind."""

    @property
    def name(self) -> str:
        """What it is stored under."""
        return cast("str", getattr(self, self.NAMED_BY))

    @classmethod
    def called(cls, name: str) -> str:
        """How messages call what a policy of this name is for."""
        return name

    @classmethod
    def parse(cls, document: Mapping[str, Any]) -> Self:
        """What a parsed YAML or JSON document states.

        Raises:
            InvalidPolicyError: with the path of every bad field.
        """
        try:
            return cls.model_validate(document)
        except ValidationError as error:
            raise InvalidPolicyError(
                tuple(
                    FieldError(_path(item["loc"]), item["msg"].removeprefix("Value error, "))
                    for item in error.errors(include_url=False, include_context=False, include_input=False)
                )
            ) from None

    def dump(self) -> dict[str, Any]:
        """The whole of it, defaults included, in its JSON form."""
        return self.model_dump(mode="json", exclude_none=True)

    @property
    def version(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON: equal policies have equal versions."""
        canonical = json.dumps(self.dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def at_fields(model: type[BaseModel], errors: Iterable[tuple[tuple[int | str, ...], str]]) -> ValidationError:
    """What a validator of a whole model raises so that each error is at the field that it is about.

    Args:
        model: whose validator raises it.
        errors: location within the model and message of each.
    """
    details = [
        InitErrorDetails(type=PydanticCustomError("value_error", "{text}", {"text": text}), loc=location, input=None)
        for location, text in errors
    ]
    return ValidationError.from_exception_data(model.__name__, details)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location[:-1] if location[-1:] == (_KEY,) else location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
