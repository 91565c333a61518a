from __future__ import annotations

import json
from typing import Any

import hypothesis
import pytest
from google.protobuf import json_format, message_factory
from hypothesis import given
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from gateway.descriptors import Api, read
from gateway.errors import SettingsError
from gateway.openapi import render
from gateway.path_template import PathTemplate
from gateway.routes import build
from mesh_client.core.edge_policy import EdgePolicy
from tests.gateway.compiling import HEADER, compile_text, nasty, shop, with_paths, with_rules
from tests.gateway.conftest import Golden
from tests.gateway.templates import templates
from tests.gateway.test_kong import EVERYTHING, with_string_paths


def document(api: Api, *services: str, **more: Any) -> Any:
    return checked(render(build(api, services or None), title="Shop", version="1", **more))


def checked(made: Any) -> Any:
    """The document, which JSON can hold and the specification's validator accepts."""
    validate(made)
    assert json.loads(json.dumps(made)) == made
    return made


def test_the_document_of_the_shop_is_the_golden_one(golden: Golden) -> None:
    policy = EdgePolicy.parse(EVERYTHING)
    made = document(shop(), policy=policy, server="https://api.shop.example")
    golden("openapi_shop.json", json.dumps(made, indent=2) + "\n")


def test_the_document_of_the_nasty_protos_is_the_golden_one(golden: Golden) -> None:
    golden("openapi_nasty.json", json.dumps(document(nasty()), indent=2) + "\n")


def test_exactly_the_given_routes_are_described() -> None:
    table = build(shop(), ["shop.v1.OrderService"])
    made = document(shop(), "shop.v1.OrderService")
    found = {operation["operationId"] for path in made["paths"].values() for operation in path.values()}
    assert found == {route.name for route in table.routes}
    assert "shop.v1.GetStockRequest" not in made["components"]["schemas"]


def test_security_is_what_the_settings_say() -> None:
    made = document(shop(), policy=EdgePolicy.parse(EVERYTHING))
    assert made["paths"]["/v1/orders"]["post"]["security"] == [{"jwt": [], "api_key": []}]
    assert "security" not in made["paths"]["/v1/stock/{sku}"]["get"]
    assert made["components"]["securitySchemes"] == {
        "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        "jwt": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    }
    assert "securitySchemes" not in document(shop())["components"]


def test_errors_are_google_rpc_status() -> None:
    made = document(shop())
    for path in made["paths"].values():
        for operation in path.values():
            schema = operation["responses"]["default"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/google.rpc.Status"}


def test_paths_that_differ_in_names_only_are_one_path() -> None:
    api = with_rules('get: "/v1/{id}/*"', 'delete: "/v1/{n.id}/*"', 'post: "/v1/{id=a/*}"')
    made = document(api)
    assert sorted(made["paths"]) == ["/v1/a/{id}", "/v1/{id}/{segment3}"]
    assert set(made["paths"]["/v1/{id}/{segment3}"]) == {"get", "delete"}
    assert made["paths"]["/v1/{id}/{segment3}"]["delete"]["x-google-path"] == "/v1/{n.id}/*"


def test_a_variable_of_several_wildcards_is_several_parameters() -> None:
    made = document(with_rules('get: "/{id=a/*/b/**}:go"'))
    (path,) = made["paths"]
    assert path == "/a/{id.1}/b/{id.2}:go"
    assert [item["description"] for item in made["paths"][path]["get"]["parameters"][:2]] == 2 * ["Part of id."]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (('custom: {kind: "QUERY" path: "/a"}',), "t.v1.S.A: OpenAPI 3.1 cannot describe the HTTP method QUERY"),
        (('get: "/{id}"', 'get: "/{id=**}"'), "t.v1.S.B: OpenAPI 3.1 cannot tell GET /{id=**} from another route"),
    ],
)
def test_what_openapi_cannot_say_is_an_error(rules: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        document(with_rules(*rules))
    assert message in str(caught.value)


def test_the_body_is_what_the_path_does_not_bind() -> None:
    made = document(nasty())
    content = made["paths"]["/v1/books/{isbn}:checkOut"]["post"]["requestBody"]["content"]
    assert list(content["application/json"]["schema"]["properties"]) == ["name"]
    content = made["paths"]["/v1/books/{isbn}"]["put"]["requestBody"]["content"]
    assert content["application/json"]["schema"] == {"$ref": "#/components/schemas/nasty.v1.Book"}
    part = made["paths"]["/v1/parts"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert part == {"type": "string"}


def test_required_fields_of_proto2_are_required() -> None:
    text = """syntax = "proto2"; import "google/api/annotations.proto"; package t.v1;
    message M { required string a = 1; optional int32 b = 2; }
    service S { rpc A(M) returns (M) { option (google.api.http) = {get: "/a"}; } }"""
    made = document(read([compile_text({"t.proto": text})]))
    assert made["components"]["schemas"]["t.v1.M"]["required"] == ["a"]


def test_a_field_that_can_only_be_null_is_null() -> None:
    text = f"""{HEADER} import "google/protobuf/struct.proto"; message M {{ google.protobuf.NullValue none = 1; }}
    service S {{ rpc A(M) returns (M) {{ option (google.api.http) = {{post: "/a" body: "*"}}; }} }}"""
    made = document(read([compile_text({"t.proto": text})]))
    assert made["components"]["schemas"]["t.v1.M"]["properties"] == {"none": {"type": "null"}}


def test_comments_summaries_and_deprecation_are_passed_on() -> None:
    text = f"""{HEADER} message M {{}}
    service S {{
      // No full stop
      rpc A(M) returns (M) {{ option (google.api.http) = {{get: "/a"}}; option deprecated = true; }}
    }}"""
    operation = document(read([compile_text({"t.proto": text})]))["paths"]["/a"]["get"]
    assert (operation["summary"], operation["deprecated"]) == ("No full stop", True)


VALUES: dict[str, dict[str, object]] = {
    "Distorted": {
        "text": "a",
        "big": "-9223372036854775808",
        "bigs": ["18446744073709551615"],
        "data": "AAE=",
        "counts": {"a": "1"},
        "wrapped": "b",
        "structure": {"a": [1, None]},
        "value": [True],
        "any": {"@type": "type.googleapis.com/nasty.v1.GetBookRequest", "isbn": "1"},
        "duration": "1.5s",
        "mask": "aB,c",
        "at": "2026-01-01T00:00:00.5Z",
        "@odd": "c",
        "inner": {"text": "d"},
        "genres": {"1": "GENRE_NOVEL"},
        "answers": {"true": "a"},
    },
    "Book": {
        "title": "a",
        "pages": 1,
        "genre": "GENRE_NOVEL",
        "binding": "HARD",
        "pageOffsets": [-1, 2],
        "price": {"currency": "EUR", "units": 3, "kind": "CASH"},
        "weight": "NaN",
        "otherName": "b",
        "first": {"title": "c", "next": {"title": "d"}},
    },
    "FindBooksResponse": {"byIsbn": {"1": {"title": "a"}}, "genres": {"1": "GENRE_NOVEL"}},
}


@pytest.mark.parametrize("name", VALUES)
def test_what_protobuf_writes_is_what_the_schema_says(name: str) -> None:
    methods = [method for service in nasty().services.values() for method in service]
    descriptor = next(m.output for m in methods if m.output.name == name)
    message = message_factory.GetMessageClass(descriptor)()
    json_format.ParseDict(VALUES[name], message, descriptor_pool=descriptor.file.pool)
    written = json_format.MessageToDict(message, descriptor_pool=descriptor.file.pool)
    assert set(written) == set(VALUES[name]), "the sample has every field that it names"
    schemas = document(nasty())["components"]["schemas"]
    OAS31Validator({"$ref": f"#/components/schemas/nasty.v1.{name}", "components": {"schemas": schemas}}).validate(
        written
    )
    for field in written:
        assert field in schemas[f"nasty.v1.{name}"]["properties"]


@hypothesis.settings(max_examples=40)
@given(templates(plain_variables=True))
def test_any_path_is_described_validly(template: PathTemplate) -> None:
    table = with_string_paths(str(template).replace("f0", "id").replace("f1", "id2"))
    checked(render(table, title="t", version="1"))


def test_literals_are_kept() -> None:
    made = checked(render(with_paths("/v1.0/a+b/*:go"), title="t", version="1", server="http://a"))
    assert (list(made["paths"]), made["servers"]) == (["/v1.0/a+b/{segment3}:go"], [{"url": "http://a"}])
