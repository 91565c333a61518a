"""Envoy's gRPC-JSON transcoder, one for each route.

A transcoder that knows all methods would match the path a second time, by its own rules: a verb that any template has
ends every path, whoever has it. Then the method that is called need not be the one whose authentication was asked for.
So each route has a transcoder that knows the route's own method and binding, and nothing else.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator

from google.api import annotations_pb2
from google.api.http_pb2 import HttpRule
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FileDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from gateway.descriptors import Method
from gateway.envoy_xds import Json, typed
from gateway.routes import Route

FILTER = "envoy.filters.http.grpc_json_transcoder"
_TYPE = "extensions.filters.http.grpc_json_transcoder.v3.GrpcJsonTranscoder"

MAX_BODY_BYTES = 1 << 20
"""Largest body of a REST request, unless the policy says otherwise."""
MAX_RESPONSE_BYTES = 64 << 20
"""Largest JSON of one response. Python's gRPC refuses messages of more than 4 MiB unless told otherwise."""

_METHODS = frozenset({"GET", "PUT", "POST", "DELETE", "PATCH"})


def nothing() -> Json:
    """The transcoder of requests whose route has none: they pass it."""
    return typed(_TYPE, proto_descriptor_bin="")


def transcoder(route: Route, max_body_bytes: int | None) -> Json:
    """The transcoder of one route.

    Args:
        route: whose.
        max_body_bytes: largest body; None for `MAX_BODY_BYTES`.
    """
    descriptors = base64.b64encode(descriptor_set(route).SerializeToString(deterministic=True))
    return typed(
        _TYPE,
        proto_descriptor_bin=descriptors.decode(),
        services=[route.method.service],
        # The route that was found for the path stays, with its limits.
        match_incoming_request_route=True,
        convert_grpc_status=True,
        print_options={"stream_newline_delimited": True},
        request_validation_options={
            "reject_unknown_method": True,
            "reject_unknown_query_parameters": True,
        },
        max_request_body_size=max_body(route, max_body_bytes),
        max_response_body_size=MAX_RESPONSE_BYTES,
    )


def max_body(route: Route, max_body_bytes: int | None) -> int:
    """The largest body that a route takes.

    A body of a binding without one would be read all the same, and its word be the last. Envoy knows no limit of 0, and
    one byte of JSON sets no field.

    Args:
        route: whose.
        max_body_bytes: largest body of those that have one; None for `MAX_BODY_BYTES`.
    """
    if not route.body:
        return 1
    return max_body_bytes if max_body_bytes is not None else MAX_BODY_BYTES


def descriptor_set(route: Route) -> FileDescriptorSet:
    """The method with its types, and the binding of this route as its only annotation."""
    method = route.method
    needed = set(_types(method.input, method.output))
    files = {item.file.name: item.file for item in needed}
    service = FileDescriptorProto(
        name=f"edge/{method.full_name}.proto",
        package=_package(method),
        dependency=sorted({method.input.file.name, method.output.file.name}),
        syntax="proto3",
    )
    declared = service.service.add(name=method.service.rpartition(".")[2]).method.add(
        name=method.name,
        input_type=f".{method.input.full_name}",
        output_type=f".{method.output.full_name}",
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
    )
    declared.options.Extensions[annotations_pb2.http].CopyFrom(_rule(route))
    names = {item.full_name for item in needed}
    return FileDescriptorSet(file=[*(_trimmed(file, names, files) for file in _in_order(files)), service])


def _package(method: Method) -> str:
    return method.service.rpartition(".")[0]


def _rule(route: Route) -> HttpRule:
    rule = HttpRule(body=route.body, response_body=route.response_body)
    if route.verb in _METHODS:
        setattr(rule, route.verb.lower(), str(route.template))
    else:
        rule.custom.kind, rule.custom.path = route.verb, str(route.template)
    return rule


def _types(*roots: Descriptor) -> Iterator[Descriptor | EnumDescriptor]:
    """The top-level types that values of these can hold, with all that is declared within these."""
    seen: set[str] = set()
    todo: list[Descriptor | EnumDescriptor] = list(roots)
    while todo:
        item = todo.pop()
        while item.containing_type is not None:
            item = item.containing_type
        if item.full_name in seen:
            continue
        seen.add(item.full_name)
        yield item
        todo += _mentioned(item) if isinstance(item, Descriptor) else []


def _mentioned(message: Descriptor) -> Iterator[Descriptor | EnumDescriptor]:
    for field in message.fields:
        if found := field.message_type or field.enum_type:
            yield found
    for nested in message.nested_types:
        yield from _mentioned(nested)


def _in_order(files: dict[str, FileDescriptor]) -> Iterator[FileDescriptor]:
    """The files, each after those of them that it imports."""
    done: set[str] = set()

    def visit(file: FileDescriptor) -> Iterator[FileDescriptor]:
        if file.name in done:
            return
        done.add(file.name)
        for dependency in _imports(file, files):
            yield from visit(files[dependency])
        yield file

    for name in sorted(files):
        yield from visit(files[name])


def _imports(file: FileDescriptor, files: dict[str, FileDescriptor]) -> list[str]:
    """What it imports, publicly by others too, as far as it is among these files."""
    found, todo = set(), list(file.dependencies)
    while todo:
        dependency = todo.pop()
        if dependency.name in found:
            continue
        found.add(dependency.name)
        todo += dependency.public_dependencies
    return sorted(found & files.keys())


def _trimmed(file: FileDescriptor, names: set[str], files: dict[str, FileDescriptor]) -> FileDescriptorProto:
    """The file with these of its types alone."""
    whole = FileDescriptorProto()
    file.CopyToProto(whole)
    prefix = f"{whole.package}." if whole.package else ""
    trimmed = FileDescriptorProto(
        name=whole.name,
        package=whole.package,
        dependency=_imports(file, files),
        message_type=[item for item in whole.message_type if prefix + item.name in names],
        enum_type=[item for item in whole.enum_type if prefix + item.name in names],
        syntax=whole.syntax,
    )
    if whole.HasField("edition"):
        trimmed.edition = whole.edition
        trimmed.options.features.CopyFrom(whole.options.features)
    return trimmed
