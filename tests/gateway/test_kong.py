from __future__ import annotations

import itertools
from collections.abc import Mapping

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gateway import kong_lua
from gateway.descriptors import Api
from gateway.errors import SettingsError
from gateway.kong import KONG_CONF, KongConfiguration, render
from gateway.lint import RefusedError
from gateway.path_template import PathTemplate
from gateway.routes import RouteTable, build
from gateway.settings import parse_settings
from mesh_client.core.edge_policy import EdgePolicy
from tests.edge_policies import P256
from tests.gateway.compiling import nasty, shop, with_paths
from tests.gateway.conftest import Golden
from tests.gateway.kong import bindings, http_routes, take, transcode
from tests.gateway.templates import PATHS, templates

EVERYTHING: dict[str, object] = {
    "services": {
        "shop.v1.InventoryService": {
            "upstream": "inventory",
            "rate_limit": {"requests": 100, "per": "second"},
            "methods": {"GetStock": {"rate_limit": {"requests": 5, "per": "minute"}}},
        },
        "shop.v1.OrderService": {
            "upstream": "orders",
            "authentication": ["jwt", "api_key"],
            "rate_limit": {"requests": 10, "by": "consumer"},
            "max_body_bytes": 65536,
            "timeout": "2.5s",
            "retries": 2,
        },
        "shop.v1.PaymentService": {"upstream": "payments", "native_grpc": False},
    },
    "consumers": {
        "web": {"jwt_issuers": [{"issuer": "https://login.example", "algorithm": "ES256", "public_key": P256}]},
        "batch": {"api_keys": ["batch-key"]},
    },
    "cors": {"origins": ["https://shop.example"], "credentials": True},
    "tracing": {"endpoint": "http://collector:4318/v1/traces"},
    "accept": ["int64:shop.v1.Order.number", "int64:shop.v1.ListOrdersResponse.total_amount_cents"],
}
KONG: dict[str, object] = {
    "upstreams": {
        "inventory": {"targets": [{"address": "10.0.0.2:50051"}, {"address": "10.0.0.1:50051", "weight": 50}]},
        "orders": {
            "targets": [{"address": "[::1]:50052"}],
            "host_header": "orders.mesh.internal",
            "client_certificate": {"certificate": "{vault://env/edge-crt}", "key": "{vault://env/edge-key}"},
        },
        "payments": {"host_header": "payments.mesh.internal"},
    },
    "prometheus": True,
}
ISSUER = {"issuer": "i", "algorithm": "ES256", "public_key": P256}
ONE: dict[str, object] = {"upstreams": {"u": {}}}


def made(api: Api, document: Mapping[str, object], settings: object = ONE) -> KongConfiguration:
    policy, local = EdgePolicy.parse(document), parse_settings(settings)
    return render(build(api, policy.services), policy, local.upstreams, local)


def rendered(table: RouteTable, document: Mapping[str, object]) -> KongConfiguration:
    local = parse_settings(ONE)
    return render(table, EdgePolicy.parse(document), local.upstreams, local)


def everything() -> KongConfiguration:
    return made(shop(), EVERYTHING, KONG)


def one(service: str, settings: Mapping[str, object] | None = None, **more: object) -> dict[str, object]:
    return {"services": {service: {"upstream": "u", **(settings or {})}}, **more}


def test_kong_yml_of_the_shop_with_everything_is_the_golden_one(golden: Golden) -> None:
    golden("kong_shop.yml", everything().declarative)


def test_kong_yml_of_the_nasty_protos_is_the_golden_one(golden: Golden) -> None:
    golden("kong_nasty.yml", made(nasty(), one("nasty.v1.LibraryService", correlation_id=False)).declarative)


def test_rendering_is_deterministic_and_names_its_protos() -> None:
    configuration = everything()
    assert configuration == everything()
    for proto in configuration.protos:
        assert f"/usr/local/kong/protos/{proto.file_name}\n" in configuration.declarative
    assert configuration.warnings


def test_every_service_says_te_trailers_and_so_does_every_pre_function_of_a_route() -> None:
    document = yaml.safe_load(everything().declarative)
    te = kong_lua.REQUEST_HEADERS
    assert 'ngx.var.upstream_te = "trailers"\n' in te
    for service in document["services"]:
        assert {"name": "pre-function", "config": {"access": [te]}} in service["plugins"]
        for route in service["routes"]:
            first = [
                plugin["config"]["access"][0] for plugin in route.get("plugins", []) if plugin["name"] == "pre-function"
            ]
            assert first in ([te], [])


def test_timeouts_retries_and_tls_are_said_for_each_service() -> None:
    services = {item["name"]: item for item in yaml.safe_load(everything().declarative)["services"]}
    orders, streams = services["shop.v1.OrderService"], services["shop.v1.InventoryService~streams"]
    assert (orders["protocol"], orders["host"], orders["retries"]) == ("grpcs", "orders", 2)
    assert (orders["connect_timeout"], orders["read_timeout"], orders["write_timeout"]) == (1000, 2500, 2500)
    assert (streams["protocol"], streams["read_timeout"]) == ("grpc", 3_600_000)
    assert all(route["strip_path"] is False for service in services.values() for route in service["routes"])


def test_what_a_method_may_be_called_does_not_depend_on_the_protocol() -> None:
    """A rate limit of one method holds by gRPC too, and so does authentication."""
    document = yaml.safe_load(everything().declarative)
    routes = {route["name"]: route for service in document["services"] for route in service["routes"]}
    kept = ("jwt", "key-auth", "rate-limiting")

    def access(name: str) -> list[object]:
        return [plugin for plugin in routes[name].get("plugins", []) if plugin["name"] in kept]

    assert access("shop.v1.InventoryService.GetStock") == access("shop.v1.InventoryService.GetStock~grpc")
    assert access("shop.v1.InventoryService.WatchStock") == access("shop.v1.InventoryService.WatchStock~grpc")
    assert access("shop.v1.OrderService.GetOrder") == access("shop.v1.OrderService~grpc")
    assert len(access("shop.v1.OrderService.GetOrder")) == 3
    assert routes["shop.v1.InventoryService.GetStock~grpc"]["paths"] == ["~/shop[.]v1[.]InventoryService/GetStock$"]
    assert "shop.v1.PaymentService~grpc" not in routes


def test_without_cors_there_are_no_preflights_and_with_all_origins_the_star_stays() -> None:
    plain = made(shop(), one("shop.v1.InventoryService")).declarative
    assert "OPTIONS" not in plain
    assert 'if kong.response.get_header("access-control-allow-origin") == "*"' in plain
    star = made(shop(), one("shop.v1.InventoryService", cors={"origins": ["*"]})).declarative
    assert 'if false and kong.response.get_header("access-control-allow-origin") == "*"' in star


def test_one_certificate_that_two_upstreams_use_is_there_once() -> None:
    certificate = {"certificate": "{vault://env/a}", "key": "{vault://env/b}"}
    upstream = {"host_header": "a.mesh.internal", "client_certificate": certificate}
    document = {
        "services": {"shop.v1.InventoryService": {"upstream": "u"}, "shop.v1.PaymentService": {"upstream": "v"}}
    }
    found = yaml.safe_load(made(shop(), document, {"upstreams": {"u": upstream, "v": upstream, "w": {}}}).declarative)
    assert [item["name"] for item in found["upstreams"]] == ["u", "v"]
    (entity,) = found["certificates"]
    assert {item["client_certificate"] for item in found["upstreams"]} == {entity["id"]}
    assert entity["cert"] == "{vault://env/a}"


def test_a_service_without_routes_is_exposed_by_grpc_alone() -> None:
    table = build(shop(), ["shop.v1.OrderService"])
    unrouted = RouteTable(table.api, ())
    configuration = rendered(unrouted, one("shop.v1.OrderService"))
    assert configuration.protos == ()
    assert "grpc-gateway" not in configuration.declarative.replace("-- grpc-gateway's own", "")
    (service,) = yaml.safe_load(configuration.declarative)["services"]
    assert [route["paths"] for route in service["routes"]] == [["/shop.v1.OrderService/"]]


def test_what_kong_would_distort_is_refused_unless_it_is_accepted() -> None:
    with pytest.raises(RefusedError, match=r"int64: nasty\.v1\.DistortedService\.Get, nasty\.v1\.Distorted\.big"):
        made(nasty(), one("nasty.v1.DistortedService"))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (one("shop.v1.Nobody"), "services.shop.v1.Nobody: no such service; there are shop.v1.InventoryService"),
        (
            one("shop.v1.OrderService", {"methods": {"Nope": {"retries": 1}}}),
            "services.shop.v1.OrderService.methods.Nope: it has no such method",
        ),
        (one("shop.v1.OrderService", {"native_grpc": False}), "no method is annotated, and native_grpc is off"),
        (
            one("shop.v1.OrderService", {"upstream": "v"}),
            "services.shop.v1.OrderService.upstream: 'v' is not among the upstreams",
        ),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(document: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        rendered(RouteTable(shop(), ()), document)
    assert message in str(caught.value)


def test_routes_of_services_that_are_not_exposed_are_refused() -> None:
    with pytest.raises(SettingsError, match="has routes and is not exposed"):
        rendered(build(shop()), one("shop.v1.OrderService"))


def test_a_method_with_a_timeout_or_retries_of_its_own_is_a_service_of_kong() -> None:
    methods = {"GetStock": {"timeout": "3s"}, "WatchStock": {"retries": 0}}
    configuration = made(shop(), one("shop.v1.InventoryService", {"methods": methods}))
    name = "shop.v1.InventoryService"
    services = {item["name"]: item for item in yaml.safe_load(configuration.declarative)["services"]}
    assert list(services) == [name, f"{name}.GetStock", f"{name}.WatchStock"]
    assert [route["name"] for route in services[name]["routes"]] == [f"{name}~grpc"]
    get, watch = services[f"{name}.GetStock"], services[f"{name}.WatchStock"]
    assert (get["read_timeout"], get["retries"], watch["read_timeout"], watch["retries"]) == (3000, 1, 3_600_000, 0)
    assert [route["name"] for route in get["routes"]] == [f"{name}.GetStock", f"{name}.GetStock~grpc"]


def test_a_method_that_is_reached_in_no_way_has_no_service_of_its_own() -> None:
    document = one("shop.v1.PaymentService", {"native_grpc": False, "methods": {"Charge": {"retries": 0}}})
    (service,) = yaml.safe_load(made(shop(), document).declarative)["services"]
    assert [route["name"] for route in service["routes"]] == ["shop.v1.PaymentService.GetPayment"]


def test_a_method_that_is_opened_asks_for_nothing() -> None:
    document = one(
        "shop.v1.InventoryService",
        {"authentication": ["api_key"], "methods": {"GetStock": {"authentication": ["none"]}}},
        consumers={"a": {"api_keys": ["key"]}},
    )
    services = yaml.safe_load(made(shop(), document, ONE | {"vault": "hcv/kong"}).declarative)["services"]
    asked = {
        route["name"].removeprefix("shop.v1.InventoryService"): "key-auth" in str(route.get("plugins"))
        for service in services
        for route in service["routes"]
    }
    assert asked == {
        ".GetStock": False,
        ".GetStock~grpc": False,
        "~grpc": True,
        ".WatchStock": True,
        ".WatchStock~grpc": True,
    }
    assert "{vault://hcv/kong/key}" in made(shop(), document, ONE | {"vault": "hcv/kong"}).declarative


def test_audiences_are_looked_at_wherever_tokens_are() -> None:
    document = one(
        "shop.v1.OrderService",
        {"authentication": ["jwt"], "methods": {"GetOrder": {"authentication": ["none"]}}},
        consumers={"a": {"jwt_issuers": [ISSUER | {"audiences": ["shop"]}]}},
        accept=["int64"],
    )
    (service,) = yaml.safe_load(made(shop(), document).declarative)["services"]
    guarded = {
        route["name"].removeprefix("shop.v1.OrderService"): [
            "audiences" in program
            for plugin in route.get("plugins", [])
            if plugin["name"] == "pre-function"
            for program in plugin["config"]["access"]
        ]
        for route in service["routes"]
    }
    assert guarded[".PlaceOrder"] == [False, False, False, True]
    assert guarded["~grpc"] == [False, True]
    assert not any(guarded[".GetOrder"] + guarded[".GetOrder~grpc"])


def test_spans_can_be_sampled_and_requests_logged_without_keys() -> None:
    document = one(
        "shop.v1.PaymentService", tracing={"endpoint": "http://c:4318/v1/traces", "sampled_percent": 5}, access_log=True
    )
    plugins = {item["name"]: item["config"] for item in yaml.safe_load(made(shop(), document).declarative)["plugins"]}
    assert plugins["opentelemetry"] == {"traces_endpoint": "http://c:4318/v1/traces", "sampling_rate": 0.05}
    assert plugins["file-log"]["path"] == "/dev/stdout"
    assert plugins["file-log"]["custom_fields_by_lua"] == {"request.headers.x-api-key": "return nil"}


def test_the_description_of_the_api_is_answered_by_a_route_without_a_service() -> None:
    policy, local = EdgePolicy.parse(one("shop.v1.PaymentService")), parse_settings(ONE)
    table = build(shop(), policy.services)
    configuration = render(table, policy, local.upstreams, local, '{"openapi": "3.1.0"}')
    (route,) = yaml.safe_load(configuration.declarative)["routes"]
    assert route["paths"] == ["~/openapi[.]json$"]
    assert route["regex_priority"] > len(table.routes)
    answer = {"status_code": 200, "content_type": "application/json", "body": '{"openapi": "3.1.0"}'}
    assert route["plugins"] == [{"name": "request-termination", "config": answer}]
    assert "routes" not in yaml.safe_load(made(shop(), one("shop.v1.PaymentService")).declarative)


def test_kong_conf_lets_the_programs_read_json_and_verifies_servers() -> None:
    assert "untrusted_lua_sandbox_requires = cjson.safe" in KONG_CONF
    assert "nginx_proxy_grpc_ssl_verify = on" in KONG_CONF


SEGMENTS = ("a", "b", "a.b", "axb")


def agrees(table: RouteTable, paths: list[str]) -> None:
    """Kong's router, its grpc-gateway and the table mean the same method with the same values."""
    configuration = rendered(table, one("t.v1.S"))
    routes, found = http_routes(configuration.declarative), bindings(configuration.protos[0].text)
    for path in paths:
        expected = table.match("GET", path)
        assert take(routes, "GET", path) == (expected[0].name if expected else None), path
        if expected is not None:
            transcoded = transcode(found, "GET", path)
            assert transcoded is not None, path
            assert transcoded[0].method == expected[0].method.name, path
            assert {name: transcoded[1].get(name, "") for name in expected[1]} == expected[1], path


def test_kong_means_the_method_that_the_table_means() -> None:
    table = with_paths(
        "/a/{id}", "/a/b", "/{id=**}", "/a/{id}:go", "/a/{id=b/**}", "/{id=a/*}/b", "/*/{id}/a.b", "/a.b/**", "/b/**:go"
    )
    paths = ["/" + "/".join(parts) for n in range(4) for parts in itertools.product(SEGMENTS, repeat=n)]
    agrees(table, [*paths, *(f"{path}:go" for path in paths), "//", "/a/", "/a//b"])


@hypothesis.settings(max_examples=40)
@given(st.lists(templates(plain_variables=True), min_size=1, max_size=4, unique_by=lambda t: t.shape), st.lists(PATHS))
def test_kong_means_the_method_that_the_table_means_whatever_the_templates(
    found: list[PathTemplate], paths: list[str]
) -> None:
    texts = [str(template).replace("f0", "id").replace("f1", "id2") for template in found]
    table = with_string_paths(*texts)
    agrees(table, paths)


def with_string_paths(*paths: str) -> RouteTable:
    from gateway.descriptors import read
    from tests.gateway.compiling import HEADER, compile_text

    rules = [f'option (google.api.http) = {{get: "{path}"}};' for path in paths]
    methods = " ".join(f"rpc M{number}(M) returns (M) {{ {rule} }}" for number, rule in enumerate(rules))
    text = f"{HEADER} service S {{ {methods} }} message M {{ string id = 1; string id2 = 2; }}"
    return build(read([compile_text({"t.proto": text})]))
