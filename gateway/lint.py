"""What Kong would silently distort, and what is a risk with it, before it happens.

Kong accepts configuration that fails each request, or answers with other values than the service gave. Each finding
names the method, the field, and what to do. Errors keep the configuration from being rendered; those that are about how
a value looks in JSON can be accepted by name, for an API whose clients were written against it: then they are warnings.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gateway.descriptors import map_entry, reachable, value_field
from gateway.errors import GatewayError, SettingsError
from gateway.kong_proto import TIMESTAMP, enums_of, fits_kong, flat_name, types_of
from gateway.routes import Route, RouteTable

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KONG_VERBS = frozenset({"GET", "PUT", "POST", "DELETE", "PATCH"})


class Severity(enum.StrEnum):
    """How bad a finding is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True, order=True)
class Finding:
    """One thing that Kong does otherwise than the annotations say. Sorted, errors come first."""

    severity: Severity
    rule: str
    method: str
    """Full name of the method, or of the service."""
    field: str
    """Full name of the field or type that it is about; empty when it is about the method as a whole."""
    message: str
    remedy: str

    def __str__(self) -> str:
        where = f"{self.method}, {self.field}" if self.field else self.method
        return f"{self.severity} {self.rule}: {where}: {self.message}; {self.remedy}"


class RefusedError(GatewayError, ValueError):
    """Kong would distort what these routes carry.

    Attributes:
        findings: the errors; never empty.
    """

    def __init__(self, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        super().__init__(f"Kong cannot serve these routes as annotated: {'; '.join(map(str, findings))}")


_NUMBER_64 = {
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_SINT64,
    FieldDescriptor.TYPE_FIXED64,
    FieldDescriptor.TYPE_SFIXED64,
}

_WRAPPERS = ("Double", "Float", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
_ACCEPT = "or accept it by name if clients expect it"

_SHAPES: dict[str, tuple[str, str, str]] = {
    "google.protobuf.Duration": (
        "duration",
        'Kong takes and gives {"seconds": 3} in place of "3s"',
        f"use a number with its unit in the name, {_ACCEPT}",
    ),
    "google.protobuf.FieldMask": (
        "field-mask",
        'Kong takes and gives {"paths": ["a_b"]} in place of "aB"',
        f"use a repeated string, {_ACCEPT}",
    ),
    "google.protobuf.Any": ("any", "Kong empties it", f"use a oneof of the types that it may hold, {_ACCEPT}"),
    **{
        f"google.protobuf.{name}": ("struct", "Kong empties it", f"use a message or a string with JSON, {_ACCEPT}")
        for name in ("Struct", "Value", "ListValue")
    },
    **{
        f"google.protobuf.{name}Value": (
            "wrapper",
            'Kong takes and gives {"value": 1} in place of 1',
            f"use an `optional` field, {_ACCEPT}",
        )
        for name in _WRAPPERS
    },
}

ACCEPTABLE = frozenset({"int64", "bytes", *(rule for rule, _, _ in _SHAPES.values())})
"""Rules whose errors can be accepted: the value arrives, but looks otherwise than protobuf's JSON mapping has it."""

_INSIDES = frozenset(_SHAPES) | {TIMESTAMP}
"""Types whose own fields are not looked at: what is said of the field that has the type says it all."""


def for_kong(table: RouteTable, accepted: Collection[str] = ()) -> tuple[Finding, ...]:
    """Everything about these routes that Kong does otherwise, errors first.

    Args:
        table: what would be exposed.
        accepted: errors to be taken for warnings: ``RULE`` for all of a rule in `ACCEPTABLE`, ``RULE:FIELD`` for one.

    Raises:
        SettingsError: an accepted rule is unknown, or cannot be accepted.
    """
    for item in accepted:
        rule = item.partition(":")[0]
        if rule not in ACCEPTABLE:
            raise SettingsError(f"{item!r} cannot be accepted; what can is {', '.join(sorted(ACCEPTABLE))}")
    found: set[Finding] = set()
    for service in table.api.services:
        routes = table.of(service)
        if routes:
            found.update(_of_service(table.api.packages[service], service, routes))
    for route in table.routes:
        found.update(_of_route(route))
        found.update(_of_values(route))
    return tuple(sorted(_accept(finding, accepted) for finding in found))


def refuse_errors(findings: Sequence[Finding]) -> None:
    """Raises if any finding is an error.

    Raises:
        RefusedError: with the errors.
    """
    if errors := [finding for finding in findings if finding.severity is Severity.ERROR]:
        raise RefusedError(errors)


def _accept(finding: Finding, accepted: Collection[str]) -> Finding:
    if finding.severity is Severity.ERROR and not {finding.rule, f"{finding.rule}:{finding.field}"}.isdisjoint(
        accepted
    ):
        return Finding(
            Severity.WARNING, finding.rule, finding.method, finding.field, finding.message, "accepted by name"
        )
    return finding


def _error(rule: str, method: str, field: str, message: str, remedy: str) -> Finding:
    return Finding(Severity.ERROR, rule, method, field, message, remedy)


def _warning(rule: str, method: str, field: str, message: str, remedy: str) -> Finding:
    return Finding(Severity.WARNING, rule, method, field, message, remedy)


def _of_service(package: str, service: str, routes: Sequence[Route]) -> Iterator[Finding]:
    if not package:
        yield _error("package", service, "", "Kong's parser needs a package", "put the service into one")
    messages = types_of(routes)
    first: dict[str, str] = {}
    for full_name in [item.full_name for item in (*messages, *enums_of(messages))]:
        other = first.setdefault(flat_name(full_name, package), full_name)
        if other != full_name:
            yield _error(
                "type-name",
                service,
                full_name,
                f"Kong merges types of one name, and {other} is rendered by the same one",
                "rename one of them",
            )


def _of_route(route: Route) -> Iterator[Finding]:
    method, fields = route.method.full_name, route.path_fields()
    if route.method.client_streaming:
        yield _error(
            "client-streaming",
            method,
            "",
            "Kong sends one message only",
            "leave its annotation out; it is there by gRPC",
        )
    if route.method.server_streaming:
        yield _warning(
            "server-streaming",
            method,
            "",
            "Kong writes the messages as JSON without anything between them, and an error after the first is lost",
            "read them with an incremental JSON parser, or by gRPC",
        )
    if route.verb not in _KONG_VERBS:
        yield _error("verb", method, "", f"Kong knows no {route.verb}", f"use one of {', '.join(sorted(_KONG_VERBS))}")
    if route.response_body:
        yield _error(
            "response-body",
            method,
            route.method.output.fields_by_name[route.response_body].full_name,
            "Kong ignores response_body and gives the whole message",
            "remove response_body",
        )
    for variable, field in fields:
        if len(variable.field_path) > 1:
            yield _error(
                "nested-path",
                method,
                field.full_name,
                f"Kong loses {{{variable.name}}}",
                "put the field into the request message itself",
            )
        if not fits_kong(route.template, variable):
            yield _error(
                "path-pattern",
                method,
                field.full_name,
                f"Kong does not understand the literals in {{{variable.name}=...}}",
                "use letters, digits, - _ and ~ there, or move them out of the variable",
            )
        if route.body in {"", "*"}:
            yield _warning(
                "path-override",
                method,
                field.full_name,
                f"Kong lets {'the body' if route.body else 'a query parameter'} override what the path says",
                "the rendered configuration refuses such requests with 400; authorize by the message, not by the path",
            )
        yield _warning(
            "path-encoding",
            method,
            field.full_name,
            "Kong hands the path's percent-encoding on undecoded",
            "use ids of letters, digits, - . _ and ~, or decode in the service",
        )
    yield from _of_query(route)


def _of_query(route: Route) -> Iterator[Finding]:
    method = route.method.full_name
    for name, field in route.query_fields():
        if route.body:
            yield _warning(
                "query-with-body",
                method,
                field.full_name,
                f"Kong ignores the query of a method with a body, so {name} cannot be set",
                'use body: "*", or put the field into the body',
            )
        elif field.is_repeated:
            yield _warning(
                "repeated-query",
                method,
                field.full_name,
                f"Kong answers 400 when {name} comes once in the query; twice or more works",
                "send it twice or not at all, or use a body",
            )
        elif field.type == FieldDescriptor.TYPE_BOOL:
            yield _warning(
                "bool-query",
                method,
                field.full_name,
                f"Kong may take any value of {name} in the query for true, false too",
                "leave the parameter out for false, or use an enum",
            )


def _of_values(route: Route) -> Iterator[Finding]:
    """What the values of the request and the response look like."""
    method = route.method.full_name
    for message in reachable(route.method.input, route.method.output):
        if message.full_name not in _INSIDES:
            for field in message.fields:
                yield from _of_field(method, field)
    for message in reachable(route.method.input):
        for field in message.fields:
            if _is_timestamp(value_field(field)):
                yield _warning(
                    "timestamp-input",
                    method,
                    field.full_name,
                    'Kong\'s code converts timestamps in answers only, and takes {"seconds": 1} in requests',
                    "try it with your Kong, or use a string",
                )
    for root in (route.method.input, route.method.output):
        if shape := _SHAPES.get(root.full_name):
            yield _error(shape[0], method, root.full_name, *shape[1:])
    for enum_type in enums_of(types_of([route])):
        numbers = [value.number for value in enum_type.values]
        if len(set(numbers)) < len(numbers):
            yield _warning(
                "enum-alias",
                method,
                enum_type.full_name,
                "Kong knows the first name of each number only",
                "send the first one, or remove the aliases",
            )
    implicit = [field.name for field in route.method.output.fields if not field.has_presence]
    if implicit:
        yield _warning(
            "unset-fields",
            method,
            route.method.output.full_name,
            f"fields with their default value are left out of the JSON ({', '.join(implicit)}), and null in a request "
            "is answered with 400",
            "let clients take what is missing for the default, and leave out in place of null",
        )


def _of_field(method: str, field: FieldDescriptor) -> Iterator[Finding]:
    if _IDENTIFIER.fullmatch(field.json_name) is None:
        yield _error(
            "json-name",
            method,
            field.full_name,
            f"Kong names fields as protos can, and {field.json_name!r} is no identifier",
            "choose another json_name",
        )
    if field.type == FieldDescriptor.TYPE_GROUP:
        yield _error("group", method, field.full_name, "Kong reads no groups", "use a message")
    entry = map_entry(field)
    if entry is not None and entry[0].type != FieldDescriptor.TYPE_STRING:
        yield _error(
            "map-key",
            method,
            field.full_name,
            "Kong writes a map whose keys are no strings as an array, or fails",
            "use strings for keys",
        )
    for value in entry or (field,):
        if value.type in _NUMBER_64:
            yield _error(
                "int64",
                method,
                field.full_name,
                "Kong gives a JSON number in place of a string, and loses digits beyond 2^53",
                f"use int32 or string, {_ACCEPT}",
            )
        elif value.type == FieldDescriptor.TYPE_BYTES:
            yield _error(
                "bytes",
                method,
                field.full_name,
                "Kong takes and gives the bytes as they are in place of base64",
                f"use a string, {_ACCEPT}",
            )
        elif value.message_type is not None:
            yield from _of_type(method, field, value.message_type)


def _is_timestamp(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.full_name == TIMESTAMP


def _of_type(method: str, field: FieldDescriptor, type_: Descriptor) -> Iterator[Finding]:
    if shape := _SHAPES.get(type_.full_name):
        yield _error(shape[0], method, field.full_name, *shape[1:])
    elif type_.full_name == TIMESTAMP:
        yield _warning(
            "timestamp",
            method,
            field.full_name,
            "Kong writes it without Z and without fractions of a second",
            "let clients take it for UTC; the rendered proto imports the copy of timestamp.proto that Kong installs",
        )
