"""From the annotations of an API to the table of its REST routes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gateway.descriptors import Api, Method, map_entry
from gateway.errors import InvalidRoutesError, Problem
from gateway.path_template import PathTemplate, TemplateError, Variable, Wildcard, parse

_TOKEN = re.compile(r"[A-Z]+")


@dataclass(frozen=True, slots=True, eq=False)
class Route:
    """One way to call a method by HTTP. Compared by identity."""

    method: Method
    binding: int
    """0 for the annotation itself, then its additional bindings from 1."""
    verb: str
    """GET, PUT, POST, DELETE, PATCH, or what a custom pattern says."""
    template: PathTemplate
    body: str
    """Field that the HTTP body is, ``*`` for all that the path does not bind, empty for none."""
    response_body: str
    """Field that the HTTP response is; empty for the whole message."""

    def __str__(self) -> str:
        return f"{self.verb} {self.template}"

    @property
    def name(self) -> str:
        """Unique among routes: the method's full name, and the binding from the second on."""
        return self.method.full_name + (f".{self.binding + 1}" if self.binding else "")

    def path_fields(self) -> tuple[tuple[Variable, FieldDescriptor], ...]:
        """Each variable with the field that it ends at."""
        return tuple(
            (variable, _walk(self.method.input, variable.field_path)[-1]) for variable in self.template.variables
        )

    def fields_along(self, variable: Variable) -> tuple[FieldDescriptor, ...]:
        """The fields on the way to the one that a variable of the template ends at, and that one."""
        return tuple(_walk(self.method.input, variable.field_path))

    def query_fields(self) -> tuple[tuple[str, FieldDescriptor], ...]:
        """What query parameters can set: dotted JSON names with their fields, in the order of declaration.

        A message within itself is left out.
        """
        if self.body == "*":
            return ()
        bound = {variable.name for variable in self.template.variables}
        return tuple(_query_fields(self.method.input, "", "", {*bound, self.body}, (self.method.input.full_name,)))


@dataclass(frozen=True, slots=True)
class RouteTable:
    """Routes in the order of precedence: of those that match a request, the first is meant."""

    api: Api
    routes: tuple[Route, ...]

    def match(self, verb: str, path: str) -> tuple[Route, dict[str, str]] | None:
        """The route of a request with the values of its path variables, as they stand in the path."""
        for route in self.routes:
            if route.verb == verb and (values := route.template.match(path)) is not None:
                return route, values
        return None

    def of(self, service: str) -> tuple[Route, ...]:
        """The routes of one service, in the same order."""
        return tuple(route for route in self.routes if route.method.service == service)


def build(api: Api, services: Collection[str] | None = None) -> RouteTable:
    """The routes of these services, or of all.

    Raises:
        InvalidRoutesError: with everything that is wrong with any annotation of them.
    """
    wanted = api.services if services is None else [service for service in api.services if service in services]
    problems: list[Problem] = []
    if services is not None:
        problems += [
            Problem(service, f"no such service; there are {', '.join(api.services) or 'none'}")
            for service in sorted(set(services) - set(api.services))
        ]
    routes: list[Route] = []
    for service in wanted:
        for method in api.services[service]:
            routes += _routes(method, _Report(problems, method))
    routes.sort(key=lambda route: (route.template.precedence, route.verb, route.name))
    problems += _duplicates(routes)
    if problems:
        raise InvalidRoutesError(problems)
    return RouteTable(api, tuple(routes))


@dataclass(frozen=True, slots=True)
class _Report:
    """Takes what is wrong with one annotation of a method."""

    problems: list[Problem]
    method: Method
    binding: int = 0

    def __call__(self, message: str) -> None:
        where = f"additional binding {self.binding}: " if self.binding else ""
        self.problems.append(Problem(self.method.full_name, where + message))


def _routes(method: Method, report: _Report) -> Iterator[Route]:
    if method.rule is None:
        return
    rules = [method.rule, *method.rule.additional_bindings]
    for binding, rule in enumerate(rules):
        here = replace(report, binding=binding)
        if binding and rule.additional_bindings:
            here("holds additional bindings itself; put all of them into the annotation of the method")
        route = _route(method, binding, rule, here)
        if route is not None:
            yield route


def _route(method: Method, binding: int, rule: HttpRule, report: _Report) -> Route | None:
    kind = rule.WhichOneof("pattern")
    if kind is None:
        report('the annotation has no path; write one such as get: "/v1/things/{id}", or remove it')
        return None
    verb = rule.custom.kind if kind == "custom" else kind.upper()
    path = rule.custom.path if kind == "custom" else getattr(rule, kind)
    if _TOKEN.fullmatch(verb) is None:
        report(f"{verb!r} is not an HTTP method; write it in capital letters, such as HEAD")
    try:
        template = parse(path)
    except TemplateError as error:
        report(f"bad path {error}")
        return None
    for variable in template.variables:
        _check_variable(method.input, template, variable, report)
    _check_body(method.input, verb, template, rule.body, report)
    if rule.response_body and rule.response_body not in method.output.fields_by_name:
        report(
            f"response_body names {rule.response_body!r}, which is no field of {method.output.full_name}; "
            f"{_choice(method.output)}"
        )
    return Route(method, binding, verb, template, rule.body, rule.response_body)


def _check_variable(message: Descriptor, template: PathTemplate, variable: Variable, report: _Report) -> None:
    found = _walk(message, variable.field_path)
    shown = f"{{{variable.name}}} in the path"
    for name, field in zip(variable.field_path, found, strict=False):
        if field.is_repeated:
            report(f"{shown}: {name} is repeated; a path variable is a single value, so make it a query parameter")
            return
    if len(found) < len(variable.field_path):
        missing = variable.field_path[len(found)]
        parent = found[-1].message_type if found else message
        if parent is None:
            report(f"{shown}: {found[-1].full_name} is not a message, so it has no field {missing!r}")
        else:
            report(f"{shown}: {parent.full_name} has no field {missing!r}; {_choice(parent)}")
        return
    last = found[-1]
    if last.message_type is not None:
        report(f"{shown}: {last.full_name} is a message; name a field of it, such as {{{variable.name}.id}}")
    segments = template.segments[variable.start : variable.end]
    if segments != (Wildcard.ONE,) and last.type != FieldDescriptor.TYPE_STRING and last.message_type is None:
        report(f"{shown}: its pattern holds a path, and {last.full_name} is not a string; write {{{variable.name}}}")


def _check_body(message: Descriptor, verb: str, template: PathTemplate, body: str, report: _Report) -> None:
    if not body:
        return
    if verb == "GET":
        report("GET has no body; remove `body`, and the fields become query parameters")
    if body == "*":
        return
    if body not in message.fields_by_name:
        report(f'body names {body!r}, which is no field of {message.full_name}; {_choice(message)}, or "*"')
    elif any(variable.field_path[0] == body for variable in template.variables):
        report(f"{body!r} is both in the path and the body; bind it once")


def _choice(message: Descriptor) -> str:
    return f"its fields are {', '.join(field.name for field in message.fields)}" if message.fields else "it has none"


def _walk(message: Descriptor, field_path: tuple[str, ...]) -> list[FieldDescriptor]:
    """The fields along a path, as far as there are any."""
    found: list[FieldDescriptor] = []
    inside: Descriptor | None = message
    for name in field_path:
        field = inside.fields_by_name.get(name) if inside is not None else None
        if field is None:
            break
        found.append(field)
        inside = field.message_type
    return found


def _query_fields(
    message: Descriptor, names: str, json_names: str, bound: Collection[str], above: tuple[str, ...]
) -> Iterator[tuple[str, FieldDescriptor]]:
    for field in message.fields:
        name, json_name = names + field.name, json_names + field.json_name
        if name in bound or map_entry(field):
            continue
        inner = field.message_type
        if inner is None or inner.full_name in SCALAR_MESSAGES:
            yield json_name, field
        elif not field.is_repeated and inner.full_name not in above and not inner.full_name.startswith(_WELL_KNOWN):
            yield from _query_fields(inner, f"{name}.", f"{json_name}.", bound, (*above, inner.full_name))


_WELL_KNOWN = "google.protobuf."
SCALAR_MESSAGES = frozenset(
    _WELL_KNOWN + name
    for name in (
        *("Timestamp", "Duration", "FieldMask", "DoubleValue", "FloatValue", "Int64Value", "UInt64Value"),
        *("Int32Value", "UInt32Value", "BoolValue", "StringValue", "BytesValue"),
    )
)
"""Messages that protobuf's JSON mapping writes as one string, number or boolean."""


def _duplicates(routes: list[Route]) -> Iterator[Problem]:
    first: dict[object, Route] = {}
    for route in routes:
        other = first.setdefault((route.verb, route.template.shape), route)
        if other is not route:
            yield Problem(
                route.method.full_name,
                f"{route} is {other.method.full_name}'s already, as {other}; one of them needs another path or verb",
            )
