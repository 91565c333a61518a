from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pool, text_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from gateway.descriptors import Api, read
from gateway.envoy import BOOTSTRAP, EnvoyConfiguration, EnvoyRenderer, render
from gateway.envoy_routes import query_names
from gateway.envoy_settings import EnvoySettings
from gateway.errors import SettingsError
from gateway.routes import RouteTable, build
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.model import Endpoint, Health
from tests.edge_policies import P256, P384, RSA
from tests.gateway.compiling import HEADER, compile_text, nasty, shop, with_rules
from tests.gateway.conftest import Golden

EVERYTHING: dict[str, object] = {
    "services": {
        "shop.v1.InventoryService": {
            "upstream": "inventory",
            "rate_limit": {"requests": 100, "per": "second"},
            "methods": {"GetStock": {"rate_limit": {"requests": 5, "per": "minute"}}, "WatchStock": {"retries": 0}},
            "connect_timeout": "250ms",
        },
        "shop.v1.OrderService": {
            "upstream": "orders",
            "authentication": ["jwt", "api_key"],
            "rate_limit": {"requests": 10, "by": "consumer"},
            "max_body_bytes": 65536,
            "timeout": "2.5s",
            "retries": 2,
            "methods": {"GetOrder": {"authentication": ["none"], "rate_limit": {"requests": 1, "by": "ip"}}},
        },
        "shop.v1.PaymentService": {"upstream": "payments", "native_grpc": False},
    },
    "consumers": {
        "web": {
            "jwt_issuers": [
                {"issuer": "https://login.example", "algorithm": "ES256", "public_key": P256, "audiences": ["shop"]},
                {"issuer": "https://old.example", "algorithm": "RS256", "public_key": RSA},
            ]
        },
        "batch": {"api_keys": ["batch-key"]},
    },
    "cors": {"origins": ["https://shop.example"], "credentials": True},
    "tracing": {"endpoint": "http://collector:4318/v1/traces", "sampled_percent": 5},
    "access_log": True,
}
PLAIN = EnvoySettings(directory="/var/lib/edge")
SECURE = EnvoySettings.model_validate(
    {
        "directory": "/var/lib/edge",
        "listen": "[::]:443",
        "admin": "unix:/run/edge/admin",
        "upstream_tls": {
            "certificate": "/etc/edge/mesh/certificate.pem",
            "key": "/etc/edge/mesh/key.pem",
            "roots": "/etc/edge/roots/roots.pem",
        },
        "downstream_tls": {"certificate": "/etc/edge/web/certificate.pem", "key": "/etc/edge/web/key.pem"},
        "trusted_hops": 1,
    }
)
ENDPOINTS = {
    "inventory": [
        Endpoint("inventory-2", "10.0.0.2", 50051, weight=3),
        Endpoint("inventory-1", "::1", 50051, health=Health.DRAINING),
    ],
    "orders": [Endpoint("orders-1", "orders-1.internal", 50051), Endpoint("orders-2", "10.0.0.3", 50051)],
}


def made(
    api: Api,
    document: Mapping[str, object],
    settings: EnvoySettings = PLAIN,
    api_keys: Mapping[str, str] = {"batch-key": "b"},  # nobody writes to it
) -> EnvoyConfiguration:
    policy = EdgePolicy.parse(document)
    table = build(api, policy.services)
    return render(table, policy, ENDPOINTS, settings, api_keys=api_keys, openapi='{"openapi": "3.1.0"}')


def one(service: str, settings: Mapping[str, object] | None = None, **more: object) -> dict[str, object]:
    return {"services": {service: {"upstream": "inventory", **(settings or {})}}, **more}


def everything() -> EnvoyConfiguration:
    return made(shop(), EVERYTHING, SECURE)


def resources(configuration: EnvoyConfiguration, name: str) -> list[dict[str, Any]]:
    found = json.loads(configuration.files[name])["resources"]
    assert isinstance(found, list)
    return found


def routes(configuration: EnvoyConfiguration) -> list[dict[str, Any]]:
    (configured,) = resources(configuration, "rds.json")
    found = configured["virtual_hosts"][0]["routes"]
    assert isinstance(found, list)
    return found


def readable(value: object) -> object:
    """The value with descriptors as they read in place of their bytes: the method's, and the names of other files."""
    if isinstance(value, list):
        return [readable(item) for item in value]
    if not isinstance(value, dict):
        return value
    shown = {name: readable(item) for name, item in value.items()}
    if value.get("proto_descriptor_bin"):
        descriptors = FileDescriptorSet.FromString(base64.b64decode(value["proto_descriptor_bin"]))
        shown["proto_descriptor_bin"] = text_format.MessageToString(descriptors.file[-1])
        shown["other_files"] = [file.name for file in descriptors.file[:-1]]
    return shown


def test_the_files_of_the_shop_with_everything_are_the_golden_ones(golden: Golden) -> None:
    files = everything().files
    assert list(files) == [
        *("sds/client_certificate.json", "sds/server_certificate.json", "sds/roots.json"),
        *("eds/inventory.json", "eds/payments.json", "cds.json", "rds.json", "lds.json", "bootstrap.json"),
    ]
    golden(
        "envoy_shop.yml",
        yaml.safe_dump(readable({name: json.loads(text) for name, text in files.items()}), sort_keys=False),
    )


def test_rendering_is_deterministic_and_versions_are_of_contents() -> None:
    first, again = everything(), everything()
    assert first == again
    assert dict(first.versions) == {
        "sds.client_certificate.version_text": version(first, "sds/client_certificate.json"),
        "sds.server_certificate.version_text": version(first, "sds/server_certificate.json"),
        "sds.roots.version_text": version(first, "sds/roots.json"),
        "cluster.inventory.version_text": version(first, "eds/inventory.json"),
        "cluster.payments.version_text": version(first, "eds/payments.json"),
        "cluster_manager.cds.version_text": version(first, "cds.json"),
        "http.edge.rds.edge.version_text": version(first, "rds.json"),
        "listener_manager.lds.version_text": version(first, "lds.json"),
    }
    other = made(shop(), {**EVERYTHING, "correlation_id": False}, SECURE)
    assert changed(first, other) == {"lds.json"}
    other = made(shop(), {**EVERYTHING, "cors": {"origins": ["*"]}}, SECURE)
    assert changed(first, other) == {"rds.json"}


def version(configuration: EnvoyConfiguration, name: str) -> str:
    found = json.loads(configuration.files[name])["version_info"]
    assert isinstance(found, str)
    return found


def changed(one: EnvoyConfiguration, other: EnvoyConfiguration) -> set[str]:
    return {name for name, text in one.files.items() if other.files[name] != text}


def test_new_endpoints_change_one_file_and_the_order_of_endpoints_none() -> None:
    policy = EdgePolicy.parse(EVERYTHING)
    table = build(shop(), policy.services)

    def rendered(*endpoints: Endpoint) -> EnvoyConfiguration:
        found = {**ENDPOINTS, "inventory": list(endpoints)}
        return EnvoyRenderer(table, policy, SECURE, api_keys={"batch-key": "b"}, openapi="{}").render(found)

    first, second = Endpoint("a", "10.0.0.1", 1), Endpoint("b", "10.0.0.2", 1)
    assert rendered(first, second) == rendered(second, first)
    assert changed(rendered(first), rendered(first, second)) == {"eds/inventory.json"}
    assert resources(rendered(), "eds/inventory.json")[0]["endpoints"] == []


def test_the_bootstrap_file_is_of_the_settings_alone() -> None:
    assert everything().files[BOOTSTRAP] == made(shop(), one("shop.v1.OrderService"), SECURE).files[BOOTSTRAP]
    admin = json.loads(made(shop(), one("shop.v1.OrderService")).files[BOOTSTRAP])["admin"]
    assert admin == {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 9901}}}


def test_without_anything_asked_for_there_are_no_filters_for_it() -> None:
    (listener,) = resources(made(shop(), one("shop.v1.OrderService")), "lds.json")
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert [item["name"] for item in manager["http_filters"]] == [
        "rest_headers",
        "envoy.filters.http.lua",
        "envoy.filters.http.grpc_json_transcoder",
        "rest_status",
        "envoy.filters.http.router",
    ]
    assert not {"tracing", "access_log"} & manager.keys()
    assert "transport_socket" not in listener["filter_chains"][0]
    (cluster,) = resources(made(shop(), one("shop.v1.OrderService")), "cds.json")
    assert "transport_socket" not in cluster


def test_a_policy_that_exposes_nothing_answers_404_to_all_but_its_description() -> None:
    configuration = made(shop(), {})
    described, grpc, other_method, nothing = routes(configuration)[1:]
    assert described["match"] == {
        "path": "/openapi.json",
        "headers": [{"name": ":method", "string_match": {"exact": "GET"}}],
    }
    assert (other_method["match"]["path"], other_method["direct_response"]["status"]) == ("/openapi.json", 405)
    assert (grpc["match"]["prefix"], grpc["direct_response"]["status"]) == ("/", 404)
    assert (nothing["match"], nothing["direct_response"]["status"]) == ({"prefix": "/"}, 404)
    assert resources(configuration, "cds.json") == []
    assert {name for name in made(shop(), {}, SECURE).versions if "sds" in name} == {
        "sds.server_certificate.version_text"
    }


def test_rest_and_grpc_ask_for_the_same() -> None:
    asked: dict[str, list[object]] = {}
    for route in routes(everything()):
        name = route.get("name", "").removesuffix("~grpc").removesuffix(".2")
        if name and name != "openapi":
            config = route["typed_per_filter_config"]
            ways = {key: value for key, value in config.items() if key.endswith(("jwt_authn", "api_key_auth"))}
            asked.setdefault(name, []).append((ways, route["route"]["rate_limits"]))
    assert {name: len({json.dumps(item) for item in items}) for name, items in asked.items()} == dict.fromkeys(asked, 1)
    assert len(asked["shop.v1.OrderService.PlaceOrder"]) == 2
    assert len(asked["shop.v1.OrderService.GetOrder"]) == 3
    assert len(asked["shop.v1.PaymentService.GetPayment"]) == 1


def test_a_cluster_waits_for_connections_as_long_as_the_most_patient_service() -> None:
    document = {
        "services": {
            "shop.v1.OrderService": {"upstream": "inventory", "connect_timeout": "2s"},
            "shop.v1.InventoryService": {"upstream": "inventory"},
        }
    }
    (cluster,) = resources(made(shop(), document), "cds.json")
    assert cluster["connect_timeout"] == "2s"


def test_spans_can_go_to_a_collector_over_tls() -> None:
    document = one("shop.v1.OrderService", tracing={"endpoint": "https://otel.example/v1/traces"})
    collector = resources(made(shop(), document), "cds.json")[-1]
    (locality,) = collector["load_assignment"]["endpoints"]
    address = locality["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert address == {"address": "otel.example", "port_value": 443}
    assert collector["transport_socket"]["typed_config"]["sni"] == "otel.example"
    plain = one("shop.v1.OrderService", tracing={"endpoint": "http://[::1]/v1/traces"})
    collector = resources(made(shop(), plain), "cds.json")[-1]
    (locality,) = collector["load_assignment"]["endpoints"]
    address = locality["lb_endpoints"][0]["endpoint"]["address"]["socket_address"]
    assert (address, collector["type"]) == ({"address": "::1", "port_value": 80}, "STATIC")


def test_a_single_issuer_is_required_by_its_name() -> None:
    issuer = {"issuer": "i", "algorithm": "ES256", "public_key": P256}
    document = one("shop.v1.OrderService", {"authentication": ["jwt"]}, consumers={"a": {"jwt_issuers": [issuer]}})
    (listener,) = resources(made(shop(), document), "lds.json")
    filters = listener["filter_chains"][0]["filters"][0]["typed_config"]["http_filters"]
    (jwt,) = [item["typed_config"] for item in filters if item["name"] == "envoy.filters.http.jwt_authn"]
    assert jwt["requirement_map"] == {"token": {"provider_name": "a/0"}}


@pytest.mark.parametrize(
    ("document", "api_keys", "message"),
    [
        (EVERYTHING, {}, "consumers.batch.api_keys: batch-key: there is no such secret"),
        (EVERYTHING, {"batch-key": ""}, "batch-key: expected visible ASCII characters"),
        (EVERYTHING, {"batch-key": "a b"}, "batch-key: expected visible ASCII characters"),
        (EVERYTHING, {"batch-key": "ü"}, "batch-key: expected visible ASCII characters"),
        (EVERYTHING, {"batch-key": "a\n"}, "batch-key: expected visible ASCII characters"),
        (
            one(
                "shop.v1.OrderService",
                {"authentication": ["api_key"]},
                consumers={"a": {"api_keys": ["one", "two"]}},
            ),
            {"one": "same", "two": "same"},
            "consumers.a.api_keys: two: it has the value of one",
        ),
        (
            one("shop.v1.OrderService", tracing={"endpoint": "http://user@host/v1/traces"}),
            {},
            "tracing.endpoint: expected http(s)://host:port/path",
        ),
    ],
)
def test_what_does_not_fit_is_refused(document: dict[str, object], api_keys: dict[str, str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        made(shop(), document, api_keys=api_keys)
    assert message in str(caught.value)
    assert "same " not in str(caught.value)


@pytest.mark.parametrize("key", [P256.replace("MFkw", "MFkx"), P384], ids=["damaged", "another curve"])
def test_a_key_that_is_none_is_refused(key: str) -> None:
    """The policy checks how keys look; whether they are any is found out here."""
    document = one(
        "shop.v1.OrderService",
        {"authentication": ["jwt"]},
        consumers={"a": {"jwt_issuers": [{"issuer": "i", "algorithm": "ES256", "public_key": P256}]}},
    )
    policy = EdgePolicy.parse(document)
    issuer = policy.consumers["a"].jwt_issuers[0].model_copy(update={"public_key": key})
    consumer = policy.consumers["a"].model_copy(update={"jwt_issuers": (issuer,)})
    policy = policy.model_copy(update={"consumers": {"a": consumer}})
    table = build(shop(), policy.services)
    with pytest.raises(SettingsError, match=r"consumers\.a\.jwt_issuers: the key of 'i' is"):
        EnvoyRenderer(table, policy, PLAIN, api_keys={}, openapi="{}").render({})


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ('get: "/v1/a" response_body: "id"', "Envoy cannot answer with the field id alone"),
        ('get: "/v1/a" response_body: "n"', "Envoy cannot answer with the field n alone"),
        ('get: "/v1/a%20b"', "Envoy decodes paths"),
    ],
)
def test_what_envoy_cannot_serve_is_refused(rule: str, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        made(with_rules(rule), one("t.v1.S"))
    assert message in str(caught.value)
    assert str(caught.value).startswith("t.v1.S.A: ")


def test_a_field_that_is_a_whole_http_body_can_be_the_answer() -> None:
    text = f"""{HEADER} import "google/api/httpbody.proto";
    service S {{ rpc A(M) returns (M) {{ option (google.api.http) = {{get: "/a" response_body: "body"}}; }} }}
    message M {{ google.api.HttpBody body = 1; }}
    """
    assert made(read([compile_text({"t.proto": text})]), one("t.v1.S")).files["rds.json"]


def descriptor_sets(configuration: EnvoyConfiguration) -> Iterator[tuple[str, FileDescriptorSet]]:
    for route in routes(configuration):
        config = route.get("typed_per_filter_config", {}).get("envoy.filters.http.grpc_json_transcoder")
        if config is not None:
            yield route["name"], FileDescriptorSet.FromString(base64.b64decode(config["proto_descriptor_bin"]))


@pytest.mark.parametrize("api", [shop, nasty], ids=["shop", "nasty"])
def test_descriptors_of_each_route_are_whole_and_hold_its_method_alone(api: Any) -> None:
    table: RouteTable = build(api())
    kept = [route for route in table.routes if not route.response_body]
    policy = EdgePolicy.parse({"services": {name: {"upstream": "u"} for name in {r.method.service for r in kept}}})
    trimmed = RouteTable(table.api, tuple(kept))
    configuration = EnvoyRenderer(trimmed, policy, PLAIN, api_keys={}, openapi="{}").render({})
    found = dict(descriptor_sets(configuration))
    assert set(found) == {route.name for route in kept}
    for route in kept:
        pool = descriptor_pool.DescriptorPool()
        for file in found[route.name].file:
            pool.Add(file)  # raises if anything is missing
        services = [service for file in found[route.name].file for service in file.service]
        assert [method.name for service in services for method in service.method] == [route.method.name]
        method = pool.FindMethodByName(route.method.full_name)
        assert method.input_type.full_name == route.method.input.full_name
        assert {field.name for field in method.input_type.fields} == {field.name for field in route.method.input.fields}


def test_descriptors_hold_what_is_needed_of_files_that_import_each_other_by_third_ones() -> None:
    files = {
        "c.proto": 'edition = "2023"; package c; message C { int32 n = 1; E e = 2; } enum E { X = 0; } message O {}',
        "b.proto": 'syntax = "proto3"; package b; import public "c.proto"; message Other {}',
        "a.proto": 'syntax = "proto3"; package a; import "b.proto"; import "c.proto"; message A { c.C c = 1; }',
        "t.proto": f"""{HEADER} import "a.proto";
        service S {{ rpc A(a.A) returns (a.A) {{ option (google.api.http) = {{get: "/a"}}; }} }}""",
    }
    ((_, found),) = descriptor_sets(made(read([compile_text(files)]), one("t.v1.S")))
    assert [file.name for file in found.file] == ["c.proto", "a.proto", "edge/t.v1.S.A.proto"]
    assert [message.name for message in found.file[0].message_type] == ["C"]
    assert list(found.file[1].dependency) == ["c.proto"]
    pool = descriptor_pool.DescriptorPool()
    for file in found.file:
        pool.Add(file)
    assert pool.FindMessageTypeByName("c.C").fields_by_name["n"].has_presence


def test_names_in_the_query_are_those_of_the_proto_and_of_json() -> None:
    text = f"""{HEADER}
    service S {{ rpc A(M) returns (M) {{ option (google.api.http) = {{get: "/a/{{in_ner.order_id}}"}}; }} }}
    message M {{ N in_ner = 1; }}
    message N {{ string order_id = 1 [json_name = "@^]\u00fc"]; }}
    """
    (route,) = build(read([compile_text({"t.proto": text})])).routes
    pattern = re.compile(query_names(route.fields_along(route.template.variables[0])))
    for name in ("in_ner.order_id", "inNer.order_id", "inNer.@^]ü"):
        assert pattern.fullmatch(name), name
    for name in ("in_ner", "order_id", "inner.order_id", "in_ner.order_id2", "in_nerXorder_id"):
        assert not pattern.fullmatch(name), name
