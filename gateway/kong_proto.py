"""Protos that Kong's grpc-gateway reads without distorting them.

Kong 3.6 to 3.9 parse .proto files with lua-protobuf's parser, keep what they parsed per file name and worker, and merge
types globally. So a rendered file

- has its content's hash in its name, and in the name of the one message that all its types are nested in: whatever
  another file, or an earlier rendering, calls the same is another type;
- is proto2, which leaves fields that are not set out of JSON, and whose fields are named as JSON names them;
- has no ``optional`` of proto3, no field options, no imports, and no oneofs: lua-protobuf adds a key for each to JSON;
- declares one method for each route, in the order of precedence, for the first that matches wins, and repeats the
  service's block where a method comes again;
- has paths that are regular expressions but for their variables.

On the wire, messages are the original ones: names do not travel. Only `google.protobuf.Timestamp` is imported, from the
copy that Kong installs, because its conversion to and from text is bound to that name.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from gateway.descriptors import map_entry, reachable, value_field
from gateway.path_template import PathTemplate, Segment, Variable, Wildcard, escape
from gateway.routes import Route

TIMESTAMP = "google.protobuf.Timestamp"

_HASH_DIGITS = 16
_PLACEHOLDER = "@"
"""Stands for the hash while it is computed; no identifier holds it."""

_IN_VARIABLE = re.compile(r"[-_~0-9a-zA-Z]+")
"""What Kong understands within a variable's pattern, but for the dot, which it takes for any character."""

_SCALARS = {
    FieldDescriptor.TYPE_DOUBLE: "double",
    FieldDescriptor.TYPE_FLOAT: "float",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_UINT64: "uint64",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_FIXED64: "fixed64",
    FieldDescriptor.TYPE_FIXED32: "fixed32",
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_SFIXED32: "sfixed32",
    FieldDescriptor.TYPE_SFIXED64: "sfixed64",
    FieldDescriptor.TYPE_SINT32: "sint32",
    FieldDescriptor.TYPE_SINT64: "sint64",
}


@dataclass(frozen=True, slots=True)
class KongProto:
    """A rendered file."""

    file_name: str
    """``shop.v1.OrderService-0123456789abcdef.proto``."""
    text: str


def render(package: str, service: str, routes: Sequence[Route]) -> KongProto:
    """The proto of a service, given by its full name, with its routes in the order of precedence.

    The routes must have passed `gateway.lint.for_kong` without an error.
    """
    template = "".join(f"{line}\n" for line in _lines(package, service, routes))
    digest = hashlib.sha256(template.encode()).hexdigest()[:_HASH_DIGITS]
    return KongProto(f"{service}-{digest}.proto", template.replace(_PLACEHOLDER, digest))


def types_of(routes: Sequence[Route]) -> tuple[Descriptor, ...]:
    """The messages that the proto of these routes holds."""
    roots = [message for route in routes for message in (route.method.input, route.method.output)]
    return tuple(message for message in reachable(*roots) if message.full_name != TIMESTAMP)


def enums_of(messages: Sequence[Descriptor]) -> tuple[EnumDescriptor, ...]:
    """The enums that fields of these messages have, by full name; values of maps too."""
    found = {}
    for message in messages:
        for field in message.fields:
            value = value_field(field)
            if value.enum_type is not None:
                found[value.enum_type.full_name] = value.enum_type
    return tuple(found[name] for name in sorted(found))


def flat_name(full_name: str, package: str) -> str:
    """The name of a type in the rendered proto: nested and foreign types are on one level."""
    own = full_name.removeprefix(f"{package}.") if package else full_name
    return own.replace(".", "_")


def kong_paths(template: PathTemplate) -> tuple[str, ...]:
    """The template as Kong takes it; two paths where a variable's ``**`` may stand for nothing: Kong's does not."""
    variables = template.variables
    if not variables or template.segments[-1] is not Wildcard.MANY or variables[-1].end < len(template.segments):
        return (_kong_path(template),)
    last = variables[-1]
    kept = template.segments[:-1]
    rest = replace(last, end=last.end - 1)
    shorter = PathTemplate(kept, (*variables[:-1], rest) if rest.end > rest.start else variables[:-1], template.verb)
    return _kong_path(template), _kong_path(shorter)


def fits_kong(template: PathTemplate, variable: Variable) -> bool:
    """If Kong understands the variable's pattern, and means the same by it."""
    segments = template.segments[variable.start : variable.end]
    return all(isinstance(segment, Wildcard) or _IN_VARIABLE.fullmatch(segment) for segment in segments)


def _kong_path(template: PathTemplate) -> str:
    if not template.segments:
        return "/" + _verb(template)
    starts = {variable.start: variable for variable in template.variables}
    parts: list[str] = []
    index = 0
    while index < len(template.segments):
        variable = starts.get(index)
        if variable is None:
            parts.append(_raw(template.segments[index], first=index == 0))
            index += 1
        else:
            parts.append("/" + _variable(template, variable))
            index = variable.end
    return "".join(parts) + _verb(template)


def _verb(template: PathTemplate) -> str:
    return f":{escape(template.verb)}" if template.verb else ""


def _raw(segment: Segment, *, first: bool) -> str:
    if segment is Wildcard.MANY:
        return "/(?:[^/]+(?:/[^/]+)*)?" if first else "(?:/[^/]+)*"
    return "/" + ("[^/]+" if isinstance(segment, Wildcard) else escape(segment))


def _variable(template: PathTemplate, variable: Variable) -> str:
    name = ".".join(variable.field_path)
    segments = template.segments[variable.start : variable.end]
    if segments == (Wildcard.ONE,):
        return f"{{{name}}}"
    pattern = "/".join(segment.value if isinstance(segment, Wildcard) else segment for segment in segments)
    return f"{{{name}={pattern}}}"


def _with_json_names(route: Route) -> PathTemplate:
    variables = tuple(replace(variable, field_path=(field.json_name,)) for variable, field in route.path_fields())
    return replace(route.template, variables=variables)


def _body(route: Route) -> str:
    return route.method.input.fields_by_name[route.body].json_name if route.body not in {"", "*"} else route.body


def _lines(package: str, service: str, routes: Sequence[Route]) -> Iterator[str]:
    messages = types_of(routes)
    wrapper = f"Types_{_PLACEHOLDER}"
    names = _Names(package, wrapper)
    yield f"// Rendered for Kong from {service}. Its wire format is the original's; edit that, and render again."
    yield 'syntax = "proto2";'
    yield ""
    yield f"package {package};"
    if any(_holds_timestamp(message) for message in messages):
        yield ""
        yield 'import "google/protobuf/timestamp.proto";'
    yield ""
    yield f"message {wrapper} {{"
    for message in messages:
        yield from _message(message, names)
    for enum in enums_of(messages):
        yield from _enum(enum, names)
    yield "}"
    for block in _blocks(routes):
        yield ""
        yield f"service {service.rpartition('.')[2]} {{"
        for route, path in block:
            yield from _method(route, path, names)
        yield "}"


def _holds_timestamp(message: Descriptor) -> bool:
    types = [value_field(field).message_type for field in message.fields]
    return any(item is not None and item.full_name == TIMESTAMP for item in types)


def _blocks(routes: Sequence[Route]) -> list[list[tuple[Route, str]]]:
    """The routes in their order, in as few blocks as there can be without a method twice in one."""
    blocks: list[list[tuple[Route, str]]] = []
    for route in routes:
        for path in kong_paths(_with_json_names(route)):
            if not blocks or any(other.method is route.method for other, _ in blocks[-1]):
                blocks.append([])
            blocks[-1].append((route, path))
    return blocks


@dataclass(frozen=True, slots=True)
class _Names:
    package: str
    wrapper: str

    def of(self, item: Descriptor | EnumDescriptor) -> str:
        """As fields and methods refer to it."""
        if item.full_name == TIMESTAMP:
            return f".{TIMESTAMP}"
        name = f".{self.package}.{self.wrapper}.{self.flat(item)}"
        return f"{name}.Value" if isinstance(item, EnumDescriptor) else name

    def flat(self, item: Descriptor | EnumDescriptor) -> str:
        return flat_name(item.full_name, self.package)


def _message(message: Descriptor, names: _Names) -> Iterator[str]:
    yield f"  message {names.flat(message)} {{"
    for field in sorted(message.fields, key=lambda field: field.number):
        entry = map_entry(field)
        if entry is not None:
            key, value = entry
            yield f"    map<{_type(key, names)}, {_type(value, names)}> {field.json_name} = {field.number};"
        else:
            label = "repeated" if field.is_repeated else "optional"
            yield f"    {label} {_type(field, names)} {field.json_name} = {field.number};"
    yield "  }"


def _enum(enum: EnumDescriptor, names: _Names) -> Iterator[str]:
    """In a message of its own, because names of values are siblings of their enum; aliases are left out."""
    yield f"  message {names.flat(enum)} {{"
    yield "    enum Value {"
    seen = set()
    for value in enum.values:
        if value.number not in seen:
            seen.add(value.number)
            yield f"      {value.name} = {value.number};"
    yield "    }"
    yield "  }"


def _type(field: FieldDescriptor, names: _Names) -> str:
    if field.message_type is not None:
        return names.of(field.message_type)
    return names.of(field.enum_type) if field.enum_type is not None else _SCALARS[field.type]


def _method(route: Route, path: str, names: _Names) -> Iterator[str]:
    method = route.method
    stream = "stream " if method.server_streaming else ""
    yield f"  rpc {method.name}({names.of(method.input)}) returns ({stream}{names.of(method.output)}) {{"
    yield "    option (google.api.http) = {"
    yield f'      {route.verb.lower()}: "{path}"'
    if route.body:
        yield f'      body: "{_body(route)}"'
    yield "    };"
    yield "  }"
