"""OpenAPI 3.1 of exactly the routes that are given.

Shapes are those of protobuf's JSON mapping, errors are google.rpc.Status. OpenAPI has no variables of several segments:
each wildcard becomes a parameter, and the annotation itself is kept in ``x-google-path``. Of paths that differ in the
names of variables only, which OpenAPI takes for one, the first in the order of precedence names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.descriptor import FieldDescriptor

from gateway.errors import SettingsError
from gateway.json_schema import Schema, Schemas
from gateway.path_template import PathTemplate, Wildcard
from gateway.routes import Route, RouteTable
from mesh_client.core.edge_policy import Authentication, EdgePolicy

_STATUS = "google.rpc.Status"
_OPERATIONS = frozenset({"GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"})
_SENTENCE = re.compile(r"(.*?[.!?])(?:\s|$)", re.DOTALL)

_SCHEMES: Mapping[Authentication, Schema] = {
    Authentication.JWT: {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    Authentication.API_KEY: {"type": "apiKey", "in": "header", "name": "x-api-key"},
}


def render(
    table: RouteTable, *, title: str, version: str, policy: EdgePolicy | None = None, server: str | None = None
) -> dict[str, object]:
    """The document, ready for JSON.

    Args:
        table: what it describes, completely.
        title: of the API.
        version: of the API.
        policy: says which security schemes apply; without one the document names none.
        server: URL at which the edge serves it, if known.

    Raises:
        SettingsError: OpenAPI 3.1 cannot describe the HTTP method of a route, or tell two routes apart.
    """
    schemas = Schemas(table.api)
    paths: dict[str, dict[str, object]] = {}
    known: dict[str, tuple[str, ...]] = {}
    used: set[Authentication] = set()
    for route in table.routes:
        if route.verb not in _OPERATIONS:
            raise SettingsError(f"{route.method.full_name}: OpenAPI 3.1 cannot describe the HTTP method {route.verb}")
        parameters = _parameters(route)
        names = known.setdefault(_path(route.template, len(parameters) * ("",)), tuple(parameters))
        path, verb = _path(route.template, names), route.verb.lower()
        operation = _operation(route, dict(zip(names, parameters.values(), strict=True)), schemas)
        service = policy.services.get(route.method.service) if policy else None
        ways = service.settings(route.method.name, streams=route.method.streams).authentication if service else ()
        if ways:
            operation["security"] = [{way.value: [] for way in ways}]
            used.update(ways)
        operations = paths.setdefault(path, {})
        if verb in operations:
            raise SettingsError(
                f"{route.method.full_name}: OpenAPI 3.1 cannot tell {route} from another route; "
                "change the path so that they differ in more than * and **"
            )
        operations[verb] = operation
    components: dict[str, object] = {"schemas": schemas.components() | {_STATUS: _status_schema()}}
    if used:
        components["securitySchemes"] = {item.value: dict(_SCHEMES[item]) for item in sorted(used)}
    document: dict[str, object] = {"openapi": "3.1.0", "info": {"title": title, "version": version}}
    if server is not None:
        document["servers"] = [{"url": server}]
    services = sorted({route.method.service for route in table.routes})
    document["tags"] = [
        {"name": name} | ({"description": comment} if (comment := table.api.comment(name)) else {}) for name in services
    ]
    return document | {"paths": dict(sorted(paths.items())), "components": components}


@dataclass(frozen=True, slots=True)
class _Parameter:
    """What stands for one wildcard of a path."""

    field: FieldDescriptor | None
    """The field that it is the whole of, if there is one."""
    description: str = ""


def _parameters(route: Route) -> dict[str, _Parameter]:
    """A parameter for each wildcard of the path, in its order, by name."""
    segments = route.template.segments
    made: dict[int, tuple[str, _Parameter]] = {}
    for variable, field in route.path_fields():
        inside = [i for i in range(variable.start, variable.end) if isinstance(segments[i], Wildcard)]
        whole = variable.end == variable.start + 1
        for number, index in enumerate(inside, start=1):
            name = f"{variable.name}.{number}" if len(inside) > 1 else variable.name
            parameter = _Parameter(field) if whole else _Parameter(None, f"Part of {field.json_name}.")
            made[index] = name, parameter
    for index, segment in enumerate(segments):
        if isinstance(segment, Wildcard) and index not in made:
            made[index] = f"segment{index + 1}", _Parameter(None, "Any value; it is not used.")
    return dict(made[index] for index in sorted(made))


def _path(template: PathTemplate, names: Sequence[str]) -> str:
    """The path as OpenAPI has it, with these names of its wildcards."""
    left = iter(names)
    parts = [f"{{{next(left)}}}" if isinstance(segment, Wildcard) else segment for segment in template.segments]
    return "/" + "/".join(parts) + (f":{template.verb}" if template.verb else "")


def _operation(route: Route, path: Mapping[str, _Parameter], schemas: Schemas) -> dict[str, object]:
    method = route.method
    operation: dict[str, object] = {"operationId": route.name, "tags": [method.service]}
    if method.comment:
        summary = _SENTENCE.match(method.comment)
        operation["summary"] = " ".join((summary[1] if summary else method.comment).split())
        operation["description"] = method.comment
    if method.deprecated:
        operation["deprecated"] = True
    if parameters := [*_path_parameters(path, schemas), *_query_parameters(route, schemas)]:
        operation["parameters"] = parameters
    if route.body:
        operation["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": _body(route, schemas)}},
        }
    operation["responses"] = {
        "200": {
            "description": "A stream of JSON objects, one after the other." if method.server_streaming else "OK.",
            "content": {"application/json": {"schema": _response(route, schemas)}},
        },
        "default": {
            "description": "An error.",
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{_STATUS}"}}},
        },
    }
    operation["x-google-path"] = str(route.template)
    return operation


def _path_parameters(path: Mapping[str, _Parameter], schemas: Schemas) -> Iterator[dict[str, object]]:
    for name, parameter in path.items():
        schema = schemas.of_field(parameter.field) if parameter.field is not None else {"type": "string"}
        description = schema.pop("description", parameter.description)
        made: dict[str, object] = {"name": name, "in": "path", "required": True, "schema": schema}
        yield made | ({"description": description} if description else {})


def _query_parameters(route: Route, schemas: Schemas) -> Iterator[dict[str, object]]:
    for name, field in route.query_fields():
        schema = schemas.of_field(field)
        description = schema.pop("description", None)
        made: dict[str, object] = {"name": name, "in": "query", "schema": schema}
        yield made | ({"description": description} if description else {})


def _body(route: Route, schemas: Schemas) -> Schema:
    message = route.method.input
    if route.body != "*":
        return schemas.of_field(message.fields_by_name[route.body])
    bound = {variable.field_path[0] for variable in route.template.variables if len(variable.field_path) == 1}
    return schemas.of_message(message, bound)


def _response(route: Route, schemas: Schemas) -> Schema:
    message = route.method.output
    if route.response_body:
        return schemas.of_field(message.fields_by_name[route.response_body])
    return schemas.of_message(message)


def _status_schema() -> Schema:
    return {
        "type": "object",
        "description": "google.rpc.Status, without details: why a request failed.",
        "properties": {
            "code": {"type": "integer", "description": "google.rpc.Code.", "minimum": 0},
            "message": {"type": "string", "description": "For developers, in English."},
        },
        "required": ["code", "message"],
    }
