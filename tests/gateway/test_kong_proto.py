from __future__ import annotations

import re

import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from hypothesis import given
from hypothesis import strategies as st

from gateway.descriptors import Api, is_map_entry, map_entry
from gateway.kong_proto import KongProto, flat_name, kong_paths, render
from gateway.path_template import PathTemplate, Variable, Wildcard, parse
from gateway.routes import build
from tests.gateway.compiling import compile_text, nasty, shop, with_rules
from tests.gateway.conftest import Golden
from tests.gateway.kong import to_regex
from tests.gateway.templates import PATHS, templates

# A service without a method that REST can call has no proto in Kong.
SERVICES = [name for name in shop().services if build(shop()).of(name)] + ["nasty.v1.LibraryService"]


def api_of(service: str) -> Api:
    return shop() if service in shop().services else nasty()


def rendered(api: Api, service: str) -> KongProto:
    return render(api.packages[service], service, build(api).of(service))


def compiled(proto: KongProto) -> descriptor_pool.DescriptorPool:
    """The messages of a rendered proto as protoc has them, without services: it allows each once only."""
    head, _, _ = proto.text.partition("\nservice ")
    pool = descriptor_pool.DescriptorPool()
    for file in FileDescriptorSet.FromString(compile_text({proto.file_name: head})).file:
        pool.Add(file)
    return pool


def wire(field: FieldDescriptor) -> tuple[object, ...]:
    """What is seen of a field on the wire, but for packing, which readers take either way."""
    entry = map_entry(field)
    kinds = tuple(part.type for part in entry) if entry else (field.type,)
    return field.number, kinds, field.is_repeated


@pytest.mark.parametrize("service", SERVICES)
def test_rendered_protos_compile_and_have_the_wire_format_of_the_originals(service: str) -> None:
    found = api_of(service)
    proto = rendered(found, service)
    pool = compiled(proto)
    package = found.packages[service]
    wrapper = re.search(r"message (Types_\w+)", proto.text)
    assert wrapper is not None
    seen: set[str] = set()

    def same(original: Descriptor) -> None:
        if original.full_name in seen or original.full_name == "google.protobuf.Timestamp":
            return
        seen.add(original.full_name)
        made = pool.FindMessageTypeByName(f"{package}.{wrapper[1]}.{flat_name(original.full_name, package)}")
        assert {wire(field) for field in made.fields} == {wire(field) for field in original.fields}
        names = {field.number: field.name for field in made.fields}
        assert names == {field.number: field.json_name for field in original.fields}
        for field in original.fields:
            entry = map_entry(field)
            inner = entry[1].message_type if entry else field.message_type
            if inner is not None and not is_map_entry(inner):
                same(inner)

    for route in build(found).of(service):
        same(route.method.input)
        same(route.method.output)
    assert seen


@pytest.mark.parametrize("service", SERVICES)
def test_services_of_rendered_protos_compile(service: str) -> None:
    proto = rendered(api_of(service), service)
    head, *blocks = proto.text.split("\nservice ")
    head = head.replace(";\n\n", ';\nimport "google/api/annotations.proto";\n', 1)
    for block in blocks:
        compile_text({proto.file_name: f"{head}\nservice {block}"})


@pytest.mark.parametrize("service", SERVICES)
def test_rendered_protos_are_the_golden_ones(service: str, golden: Golden) -> None:
    proto = rendered(api_of(service), service)
    golden(f"{service}.proto", f"// {proto.file_name}\n{proto.text}")


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_that_kongs_parser_refuses_or_gets_wrong_is_rendered(service: str) -> None:
    text = rendered(api_of(service), service).text
    assert text.count("import") == text.count('import "google/protobuf/timestamp.proto";')
    assert "oneof" not in text
    assert "additional_bindings" not in text
    assert "[" not in re.sub(r'^ +\w+: ".*"$', "", text, flags=re.MULTILINE), "field options"
    assert not re.search(r'"\s*"', text), "adjacent literals"
    assert 'syntax = "proto2";\n\npackage ' in text


def test_a_changed_proto_has_another_name_and_other_type_names() -> None:
    one = rendered(with_rules('get: "/a"'), "t.v1.S")
    other = rendered(with_rules('get: "/b"'), "t.v1.S")
    again = rendered(with_rules('get: "/a"'), "t.v1.S")
    assert one == again
    assert one.file_name != other.file_name
    types = [re.search(r"message (Types_(\w+))", proto.text) for proto in (one, other)]
    assert types[0] is not None
    assert types[1] is not None
    assert types[0][1] != types[1][1]
    assert types[0][2] in one.file_name


@given(templates(plain_variables=True), PATHS)
def test_kongs_expressions_match_what_the_template_matches(template: PathTemplate, path: str) -> None:
    expected = template.match(path)
    found = None
    for kong_path in kong_paths(template):
        regex, names = to_regex(kong_path)
        match = re.fullmatch(regex, path)
        if match is not None and found is None:
            found = dict(zip(names, match.groups(), strict=True))
    if expected is not None:
        assert found is not None
        # What matches nothing is left out of the message, which is an empty string on the other side.
        assert {name: found.get(name, "") for name in expected} == expected
    elif found is not None:
        # Kong's ** takes empty segments too; its route, by the template's own expression, does not let them pass.
        assert "//" in path or path.endswith("/") or template.segments[-1] is Wildcard.MANY


@given(st.lists(st.sampled_from(["a", "b"]), max_size=3))
def test_what_many_may_stand_for_is_routed_in_full(parts: list[str]) -> None:
    path = "/v1/files" + "".join(f"/{part}" for part in parts)
    matches = [re.fullmatch(to_regex(item)[0], path) for item in kong_paths(parse("/v1/files/{path=**}"))]
    assert [match is not None for match in matches].count(True) == 1


def test_a_variable_that_is_all_of_the_path() -> None:
    assert kong_paths(parse("/{path=**}")) == ("/{path=**}", "/")
    assert kong_paths(parse("/{path=a/**}:go")) == ("/{path=a/**}:go", "/{path=a}:go")
    assert kong_paths(PathTemplate((Wildcard.MANY,), (Variable(("a",), 0, 1),), "b.c")) == ("/{a=**}:b[.]c", "/:b[.]c")
