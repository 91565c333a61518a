"""A descriptor set as an API: linked descriptors, methods with their annotations, comments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from google.api import annotations_pb2
from google.api.http_pb2 import HttpRule
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    MethodDescriptorProto,
    ServiceDescriptorProto,
)
from google.protobuf.message import DecodeError

from gateway.errors import DescriptorError


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One RPC. Compared by identity: there is one object for each method of an `Api`."""

    service: str
    """Full name of its service."""
    name: str
    input: Descriptor
    output: Descriptor
    client_streaming: bool
    server_streaming: bool
    deprecated: bool
    rule: HttpRule | None
    """Its annotation, if it has one."""
    comment: str

    @property
    def full_name(self) -> str:
        """As in ``shop.v1.OrderService.GetOrder``."""
        return f"{self.service}.{self.name}"

    @property
    def streams(self) -> bool:
        """Whether it has more than one request or more than one response."""
        return self.client_streaming or self.server_streaming


@dataclass(frozen=True, slots=True)
class Api:
    """All that a descriptor set says that an edge needs."""

    services: Mapping[str, tuple[Method, ...]]
    """Methods of each service in the order of declaration, by the service's full name, in the order of names."""
    packages: Mapping[str, str]
    """Package of each service."""
    comments: Mapping[str, str]
    """Comments by the full names of what they describe; only of what has one."""

    def comment(self, of: Descriptor | EnumDescriptor | FieldDescriptor | str) -> str:
        """The comment, or nothing."""
        return self.comments.get(of if isinstance(of, str) else of.full_name, "")


def read(contents: Iterable[bytes]) -> Api:
    """Makes one API of serialised ``FileDescriptorSet`` messages.

    Raises:
        DescriptorError: one is damaged, a file that another imports is missing, or two of them contradict each other.
    """
    files: dict[str, FileDescriptorProto] = {}
    for content in contents:
        try:
            parsed = FileDescriptorSet.FromString(content)
        except DecodeError:
            raise DescriptorError("not a descriptor set; write one with protoc --descriptor_set_out") from None
        for file in parsed.file:
            known = files.setdefault(file.name, file)
            if _without_comments(known) != _without_comments(file):
                raise DescriptorError(
                    f"{file.name} is there twice, with different contents; build all sets from the same protos"
                )
    return _link(files)


def _without_comments(file: FileDescriptorProto) -> FileDescriptorProto:
    copy = FileDescriptorProto()
    copy.CopyFrom(file)
    copy.ClearField("source_code_info")
    return copy


def _link(files: Mapping[str, FileDescriptorProto]) -> Api:
    pool = descriptor_pool.DescriptorPool()
    for file in _in_order(files):
        try:
            pool.Add(file)
        except TypeError as error:
            reason = " ".join(str(error).split())
            raise DescriptorError(f"{file.name} cannot be used with the other files: {reason}") from None
    comments: dict[str, str] = {}
    services: dict[str, tuple[Method, ...]] = {}
    packages: dict[str, str] = {}
    for file in files.values():
        comments |= _comments(file)
    for file in files.values():
        for service in file.service:
            full_name = f"{file.package}.{service.name}" if file.package else service.name
            packages[full_name] = file.package
            services[full_name] = tuple(
                _method(full_name, method, pool, comments.get(f"{full_name}.{method.name}", ""))
                for method in service.method
            )
    return Api(dict(sorted(services.items())), packages, comments)


def _in_order(files: Mapping[str, FileDescriptorProto]) -> Iterator[FileDescriptorProto]:
    """The files, each after what it imports."""
    done: set[str] = set()

    def visit(name: str, importer: str) -> Iterator[FileDescriptorProto]:
        if name in done:
            return
        done.add(name)
        if name not in files:
            raise DescriptorError(
                f"{importer} imports {name}, which is not there; write the descriptor set with --include_imports"
            )
        for dependency in files[name].dependency:
            yield from visit(dependency, name)
        yield files[name]

    for name in sorted(files):
        yield from visit(name, name)


def _method(service: str, method: MethodDescriptorProto, pool: descriptor_pool.DescriptorPool, comment: str) -> Method:
    extensions = method.options.Extensions
    return Method(
        service=service,
        name=method.name,
        input=pool.FindMessageTypeByName(method.input_type.removeprefix(".")),
        output=pool.FindMessageTypeByName(method.output_type.removeprefix(".")),
        client_streaming=method.client_streaming,
        server_streaming=method.server_streaming,
        deprecated=method.options.deprecated,
        rule=extensions[annotations_pb2.http] if method.options.HasExtension(annotations_pb2.http) else None,
        comment=comment,
    )


def _comments(file: FileDescriptorProto) -> dict[str, str]:
    """Leading comments by full name, as far as the set was written with ``--include_source_info``."""
    names = dict(_names(file))
    found = {}
    for location in file.source_code_info.location:
        name = names.get(tuple(location.path))
        text = "\n".join(line.strip() for line in location.leading_comments.strip().splitlines())
        if name is not None and text:
            found[name] = text
    return found


def _names(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """Full names by the paths that source info uses: pairs of a field's number and an index."""
    prefix = f"{file.package}." if file.package else ""
    for index, message in enumerate(file.message_type):
        yield from _message_names(message, prefix, (FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, index))
    for index, item in enumerate(file.enum_type):
        yield (FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, index), prefix + item.name
    for index, service in enumerate(file.service):
        path = (FileDescriptorProto.SERVICE_FIELD_NUMBER, index)
        yield path, prefix + service.name
        for number, method in enumerate(service.method):
            name = f"{prefix}{service.name}.{method.name}"
            yield (*path, ServiceDescriptorProto.METHOD_FIELD_NUMBER, number), name


def _message_names(message: DescriptorProto, prefix: str, path: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
    name = prefix + message.name
    yield tuple(path), name
    for index, field in enumerate(message.field):
        yield (*path, DescriptorProto.FIELD_FIELD_NUMBER, index), f"{name}.{field.name}"
    for index, item in enumerate(message.enum_type):
        yield (*path, DescriptorProto.ENUM_TYPE_FIELD_NUMBER, index), f"{name}.{item.name}"
    for index, nested in enumerate(message.nested_type):
        yield from _message_names(nested, f"{name}.", (*path, DescriptorProto.NESTED_TYPE_FIELD_NUMBER, index))


def reachable(*roots: Descriptor) -> tuple[Descriptor, ...]:
    """The messages that values of these types can hold, themselves included, each once, by full name.

    Map entries are not among them, what they hold is.
    """
    found: dict[str, Descriptor] = {}
    todo = list(roots)
    while todo:
        message = todo.pop()
        if message.full_name not in found:
            found[message.full_name] = message
            todo += [field.message_type for field in message.fields if field.message_type is not None]
    return tuple(found[name] for name in sorted(found) if not is_map_entry(found[name]))


def is_map_entry(message: Descriptor) -> bool:
    """If the compiler made it for a map."""
    return bool(message.GetOptions().map_entry)


def map_entry(field: FieldDescriptor) -> tuple[FieldDescriptor, FieldDescriptor] | None:
    """Key and value of a map; None of any other field."""
    entry = field.message_type
    if entry is None or not is_map_entry(entry):
        return None
    return entry.fields_by_name["key"], entry.fields_by_name["value"]


def value_field(field: FieldDescriptor) -> FieldDescriptor:
    """What says the type of the field's values: of a map that of its values, else the field itself."""
    entry = map_entry(field)
    return entry[1] if entry else field
