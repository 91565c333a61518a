from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import InvalidRoutesError
from gateway.path_template import PathTemplate
from gateway.routes import build
from tests.gateway.compiling import nasty, shop, with_paths, with_rules
from tests.gateway.templates import PATHS, templates


def problems(*rules: str) -> list[str]:
    with pytest.raises(InvalidRoutesError) as caught:
        build(with_rules(*rules))
    return [str(problem) for problem in caught.value.problems]


def test_routes_of_the_shop() -> None:
    assert [(str(route), route.name, route.body) for route in build(shop()).routes] == [
        ("POST /v1/orders/{order_id}:cancel", "shop.v1.OrderService.CancelOrder", "*"),
        ("GET /v1/stock/{sku}:watch", "shop.v1.InventoryService.WatchStock", ""),
        ("GET /v1/orders", "shop.v1.OrderService.ListOrders", ""),
        ("POST /v1/orders", "shop.v1.OrderService.PlaceOrder", "*"),
        ("GET /v1/orders/by-key/{idempotency_key}", "shop.v1.OrderService.GetOrder.2", ""),
        ("GET /v1/orders/{order_id}", "shop.v1.OrderService.GetOrder", ""),
        ("PATCH /v1/orders/{order_id}", "shop.v1.OrderService.UpdateOrder", "order"),
        ("GET /v1/payments/{order_id}", "shop.v1.PaymentService.GetPayment", ""),
        ("GET /v1/stock/{sku}", "shop.v1.InventoryService.GetStock", ""),
    ]


def test_additional_bindings_are_routes_of_their_own() -> None:
    found = [route for route in build(nasty()).routes if route.method.name == "GetBook"]
    assert {route.name: str(route) for route in found} == {
        "nasty.v1.LibraryService.GetBook": "GET /v1/{name=shelves/*/books/*}",
        "nasty.v1.LibraryService.GetBook.2": "GET /v1/books/{isbn}",
        "nasty.v1.LibraryService.GetBook.3": "GET /v1.1/books/latest",
    }


def test_only_the_services_that_are_asked_for_are_in_the_table() -> None:
    table = build(nasty(), ["nasty.v1.LibraryService"])
    assert {route.method.service for route in table.routes} == {"nasty.v1.LibraryService"}
    assert table.of("nasty.v1.DistortedService") == ()


def test_a_service_that_there_is_not_is_an_error_that_names_those_there_are() -> None:
    with pytest.raises(InvalidRoutesError, match=r"shop\.v1\.Nobody: no such service; there are shop\.v1\.Inventory"):
        build(shop(), ["shop.v1.Nobody"])


def test_a_literal_wins_over_a_template_whatever_is_declared_first() -> None:
    table = with_paths("/v1/{id}", "/v1/latest")
    found = table.match("GET", "/v1/latest")
    assert found is not None
    assert (found[0].method.name, found[1]) == ("B", {})
    other = table.match("GET", "/v1/1")
    assert other is not None
    assert (other[0].method.name, other[1]) == ("A", {"id": "1"})
    assert table.match("POST", "/v1/1") is None
    assert table.match("GET", "/v2/1") is None


@given(st.lists(templates(), min_size=1, max_size=5), PATHS)
def test_the_first_route_that_matches_is_the_best_by_precedence(found: list[PathTemplate], path: str) -> None:
    matching = [template for template in found if template.match(path) is not None]
    ordered = sorted(found, key=lambda template: template.precedence)
    first = next((template for template in ordered if template.match(path) is not None), None)
    assert first == (min(matching, key=lambda template: template.precedence) if matching else None)


def test_query_parameters_are_what_the_path_and_the_body_leave() -> None:
    routes = {route.name: route for route in build(nasty()).routes}
    library = "nasty.v1.LibraryService"
    find = [name for name, _ in routes[f"{library}.FindBooks"].query_fields()]
    assert find == ["authorName", "genre", "filter.minPages", "filter.maxPages", "filter.maxSize"]
    assert [name for name, _ in routes[f"{library}.PutBook"].query_fields()] == ["dryRun"]
    assert routes[f"{library}.CheckOut"].query_fields() == ()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", 'the annotation has no path; write one such as get: "/v1/things/{id}", or remove it'),
        ('get: "v1"', "bad path 'v1', character 1: must begin with a slash"),
        ('get: "/{nope}"', "t.v1.M has no field 'nope'; its fields are id, number"),
        ('get: "/{n.nope}"', "t.v1.N has no field 'nope'; its fields are id"),
        ('get: "/{id.x}"', "t.v1.M.id is not a message, so it has no field 'x'"),
        ('get: "/{tags}"', "tags is repeated; a path variable is a single value"),
        ('get: "/{ns.id}"', "ns is repeated"),
        ('get: "/{labels}"', "labels is repeated"),
        ('get: "/{n}"', "t.v1.M.n is a message; name a field of it"),
        ('get: "/{number=a/*}"', "t.v1.M.number is not a string; write {number}"),
        ('post: "/a" body: "nope"', "body names 'nope', which is no field of t.v1.M; its fields are id"),
        ('post: "/a" body: "n.id"', "body names 'n.id'"),
        ('post: "/{n.id}" body: "n"', "'n' is both in the path and the body"),
        ('get: "/a" body: "*"', "GET has no body; remove `body`"),
        ('get: "/a" response_body: "nope"', "response_body names 'nope', which is no field of t.v1.M"),
        ('custom: {kind: "head" path: "/a"}', "'head' is not an HTTP method; write it in capital letters"),
        (
            'get: "/a" additional_bindings {get: "/b" additional_bindings {get: "/c"}}',
            "additional binding 1: holds additional bindings itself",
        ),
        ('get: "/a" additional_bindings {get: "/{nope}"}', "additional binding 1: {nope} in the path: "),
        ('get: "/a" additional_bindings {body: "*"}', "additional binding 1: the annotation has no path"),
    ],
)
def test_a_malformed_annotation_is_an_error_with_the_methods_name(rule: str, message: str) -> None:
    (problem,) = problems(rule)
    assert problem.startswith("t.v1.S.A: ")
    assert message in problem


def test_all_problems_are_reported_at_once() -> None:
    found = problems('get: "/{nope}"', 'get: "x"', 'get: "/fine"')
    assert [problem.split(":")[0] for problem in found] == ["t.v1.S.A", "t.v1.S.B"]


@pytest.mark.parametrize("other", ["/v1/{id}", "/v1/{number}", "/v1/*", "/v1/{n.id=*}"])
def test_two_methods_on_one_verb_and_path_are_an_error_that_names_both(other: str) -> None:
    (problem,) = problems('get: "/v1/{id}"', f'get: "{other}"')
    assert "t.v1.S.A" in problem
    assert "t.v1.S.B" in problem
    assert "one of them needs another path or verb" in problem


def test_one_path_may_have_several_verbs() -> None:
    table = build(with_rules('get: "/v1/{id}"', 'delete: "/v1/{id}"', 'custom: {kind: "HEAD" path: "/v1/{id}"}'))
    assert [route.verb for route in table.routes] == ["DELETE", "GET", "HEAD"]


def test_a_message_without_fields_is_said_to_have_none() -> None:
    from gateway.descriptors import read
    from tests.gateway.compiling import HEADER, compile_text

    rule = 'option (google.api.http) = {get: "/{id}"};'
    text = f"{HEADER} message E {{}} service S {{ rpc A(E) returns (E) {{ {rule} }} }}"
    with pytest.raises(InvalidRoutesError, match="has no field 'id'; it has none"):
        build(read([compile_text({"t.proto": text})]))
