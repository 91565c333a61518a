"""The programs that Kong runs, run by LuaJIT with as much of Kong's plugin development kit as they use."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest
from lupa.luajit21 import LuaRuntime

from gateway import kong_lua
from gateway.http_status import HTTP_STATUS
from gateway.routes import Route, build
from tests.gateway.compiling import nasty, shop, with_rules

KIT = """
function(request, response, json, decode_base64)
  local exits = {}
  local kong = { request = {}, response = {}, service = { request = {} } }
  function kong.request.get_query() return request.query end
  function kong.request.get_raw_body() return request.body end
  function kong.request.get_headers(most)
    local copy = {}
    for name, value in pairs(request.headers) do copy[name] = value end
    return copy
  end
  function kong.request.get_header(name) return request.headers[name] end
  function kong.service.request.clear_header(name) request.headers[name] = nil end
  function kong.response.get_header(name) return response.headers[name] end
  function kong.response.set_header(name, value) response.headers[name] = value end
  function kong.response.clear_header(name) response.headers[name] = nil end
  function kong.response.get_status() return response.status end
  function kong.response.set_status(status) response.status = status end
  function kong.response.get_raw_body() return response.body end
  function kong.response.set_raw_body(body) response.body = body end
  function kong.response.exit(status, body)
    response.status = status
    response.body = json.encode(body)
    return "exited"
  end
  local ngx = { var = {}, decode_base64 = decode_base64 }
  response.ngx = ngx
  local sandbox = {
    kong = kong, ngx = ngx, pairs = pairs, ipairs = ipairs, type = type, tonumber = tonumber, string = string,
    require = function(name) assert(name == "cjson.safe"); return json end,
  }
  return function(program) return setfenv(assert(loadstring(program)), sandbox)() end
end
"""


@dataclass
class Kong:
    """One request in a Kong."""

    query: Mapping[str, str] = field(default_factory=dict)
    body: str | None = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    answer: str | None = ""
    status: int = 200
    answer_headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lua = LuaRuntime(unpack_returned_tuples=True)
        table = self.lua.table_from
        self.request_headers = table(dict(self.headers))
        self.response = table({"status": self.status, "body": self.answer, "headers": table(dict(self.answer_headers))})
        request = table({"query": table(dict(self.query)), "body": self.body, "headers": self.request_headers})
        codec = self.lua.table_from({"decode": self.decode, "encode": self.encode})
        self.program = self.lua.eval(KIT)(request, self.response, codec, self.decode_base64)

    def decode(self, text: str) -> object:
        try:
            value = json.loads(text)
        except ValueError:
            return None
        if isinstance(value, dict | list):
            return self.lua.table_from(value, recursive=True)
        return object() if value is None else value  # cjson.null is no nil

    def decode_base64(self, text: bytes | str) -> object:
        """As ngx.decode_base64: nil for what is none."""
        try:
            return base64.b64decode(text, validate=True).decode()
        except ValueError:
            return None

    def encode(self, value: object) -> str:
        return json.dumps(dict(cast("Mapping[str, object]", value)))

    def runs(self, programs: list[str]) -> Kong:
        for program in programs:
            if self.program(program) == "exited":
                break
        return self

    @property
    def status_and_body(self) -> tuple[int, object]:
        return self.response.status, json.loads(self.response.body)


def route(name: str) -> Route:
    table = build(shop() if name.startswith("shop") else nasty())
    return next(item for item in table.routes if item.name == name)


GET_ORDER = kong_lua.access(route("shop.v1.OrderService.GetOrder"), None)
PLACE_ORDER = kong_lua.access(route("shop.v1.OrderService.PlaceOrder"), 40)
CHECK_OUT = kong_lua.access(route("nasty.v1.LibraryService.CheckOut"), None)
PUT_BOOK = kong_lua.access(route("nasty.v1.LibraryService.PutBook"), None)


def test_trailers_are_asked_for_first() -> None:
    assert Kong().runs(GET_ORDER).response.ngx["var"]["upstream_te"] == "trailers"


def test_what_only_the_mesh_and_kong_may_say_is_removed() -> None:
    kong = Kong(headers={"mesh-caller": "orders", "x-consumer-username": "web", "x-other": "1"}).runs(GET_ORDER)
    assert dict(kong.request_headers) == {"x-other": "1"}


def test_what_is_of_grpc_alone_is_removed() -> None:
    kong = Kong(headers={"grpc-encoding": "junk", "grpc-x": "1", "x-bin": "!", "x-binary": "1", "x-grpc-a": "1"})
    assert dict(kong.runs(GET_ORDER).request_headers) == {"x-binary": "1", "x-grpc-a": "1"}


@pytest.mark.parametrize(
    "name", ["orderId", "order_id", "order_id.x", "orderId.x", ".orderId", "..orderId.", "orderId."]
)
def test_a_query_that_would_override_the_path_is_refused(name: str) -> None:
    status, body = Kong(query={"page": "1", name: "2"}).runs(GET_ORDER).status_and_body
    assert (status, body) == (400, {"code": 3, "message": "order_id is set by the path; leave it out of the query"})


@pytest.mark.parametrize("name", ["a.orderId", "orderIds", "...", ""])
def test_other_queries_pass(name: str) -> None:
    assert Kong(query={name: "1"}).runs(GET_ORDER).response.status == 200


@pytest.mark.parametrize("rule", ['get: "/a"', 'delete: "/a/{id}"', 'post: "/a"'])
@pytest.mark.parametrize(("body", "status"), [("", 200), ("{}", 413), (None, 413)])
def test_a_body_where_there_is_none_is_refused(rule: str, body: str | None, status: int) -> None:
    route = build(with_rules(rule)).routes[0]
    assert Kong(body=body).runs(kong_lua.access(route, None)).response.status == status


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (None, 413),
        ('{"sku": "' + "x" * 40 + '"}', 413),
        ("{", 400),
        ("null", 400),
        ("1", 400),
        ('["a"]', 400),
        ('{"sku": "a"}', 200),
        ("", 200),
    ],
)
def test_bodies_that_kong_would_take_wrongly_are_refused(body: str | None, status: int) -> None:
    assert Kong(body=body).runs(PLACE_ORDER).response.status == status


def test_a_body_that_would_override_the_path_is_refused() -> None:
    for said in ('{"isbn": "2"}', '{"isbn": "1", "isbn": "2"}', r'{"\u0069sbn": "2"}'):
        status, body = Kong(body=said).runs(CHECK_OUT).status_and_body
        assert (status, body) == (400, {"code": 3, "message": "isbn is set by the path; leave it out of the body"})
    rename = kong_lua.access(route("shop.v1.OrderService.CancelOrder"), None)
    for name in ("order_id", "orderId"):
        status, body = Kong(body=f'{{"{name}": "2"}}').runs(rename).status_and_body
        assert (status, body) == (400, {"code": 3, "message": "order_id is set by the path; leave it out of the body"})
    assert Kong(body='{"name": "2"}').runs(CHECK_OUT).response.status == 200
    assert Kong(body="").runs(CHECK_OUT).response.status == 200


@pytest.mark.parametrize(("body", "status"), [('{"title": "a"}', 200), ('"text"', 200), ("{", 400), ("", 200)])
def test_a_field_that_is_the_body_may_be_any_json(body: str, status: int) -> None:
    assert Kong(body=body).runs(PUT_BOOK).response.status == status


def answered(kong: Kong, *origins: str) -> Kong:
    phases = kong_lua.errors(origins)
    return kong.runs(phases["header_filter"]).runs(phases["body_filter"])


@pytest.mark.parametrize(("code", "status"), HTTP_STATUS.items())
def test_each_grpc_status_is_an_http_status_with_a_json_body(code: int, status: int) -> None:
    headers = {"grpc-status": str(code), "grpc-message": "not%20a%C3%BC%0A", "content-length": "0"}
    kong = answered(Kong(answer_headers=headers))
    assert kong.status_and_body == (status, {"code": code, "message": "not aü\n"})
    assert kong.response.headers["content-type"] == "application/json"
    assert kong.response.headers["content-length"] is None


def test_an_unknown_grpc_status_is_500_and_a_missing_message_is_empty() -> None:
    assert answered(Kong(answer_headers={"grpc-status": "77"})).status_and_body == (500, {"code": 77, "message": ""})


@pytest.mark.parametrize(
    ("status", "answer", "expected"),
    [
        (
            404,
            '{"message": "no Route matched with those values"}',
            {"code": 5, "message": "no Route matched with those values"},
        ),
        (401, '{"message": "Unauthorized"}', {"code": 16, "message": "Unauthorized"}),
        (429, '{"message": "API rate limit exceeded"}', {"code": 8, "message": "API rate limit exceeded"}),
        (400, "failed to transcode", {"code": 3, "message": "failed to transcode"}),
        (418, "{}", {"code": 3, "message": ""}),
        (502, "", {"code": 14, "message": ""}),
        (599, "", {"code": 13, "message": ""}),
        (400, '{"code": 11, "message": "ours"}', {"code": 11, "message": "ours"}),
    ],
)
def test_errors_of_the_edge_itself_follow_the_same_form(status: int, answer: str, expected: object) -> None:
    assert answered(Kong(status=status, answer=answer)).status_and_body == (status, expected)


def test_answers_and_parts_of_answers_pass() -> None:
    assert answered(Kong(answer='{"a":1}', answer_headers={"grpc-status": "0"})).response.body == '{"a":1}'
    assert answered(Kong(answer="chunk")).response.body == "chunk"
    assert answered(Kong(status=500, answer=None)).response.body is None


def test_native_grpc_is_left_alone() -> None:
    kong = Kong(headers={"content-type": "application/grpc+proto"}, answer_headers={"grpc-status": "5"})
    assert (answered(kong).response.status, kong.response.body) == (200, "")


@pytest.mark.parametrize(("origins", "left"), [((), None), (("https://a",), None), (("*",), "*")])
def test_the_star_of_kongs_transcoder_goes_out_only_if_all_origins_may_call(
    origins: tuple[str, ...], left: str | None
) -> None:
    kong = Kong(answer_headers={"access-control-allow-origin": "*"})
    assert answered(kong, *origins).response.headers["access-control-allow-origin"] == left


STRANGE = 'it\'s "quoted" \\ \n]] é'
GUARD = [kong_lua.audiences({"i": ("shop", "tests"), STRANGE: (STRANGE,)})]


def token(claims: object, header: object = None, *, urlsafe: bool = True) -> str:
    def part(value: object) -> str:
        raw = base64.urlsafe_b64encode(json.dumps(value, ensure_ascii=False).encode()).decode()
        return raw.rstrip("=") if urlsafe else raw

    return f"{part(header or {'alg': 'ES256'})}.{part(claims)}.signature"


@pytest.mark.parametrize(
    "claims",
    [
        {"iss": "i", "aud": "shop"},
        {"iss": "i", "aud": ["others", "tests"]},
        {"iss": "of whom any is fine", "aud": "others"},
        {"iss": "of whom any is fine"},
        {"iss": STRANGE, "aud": STRANGE},
        {"iss": "i", "aud": "shop", "filler": "?>~" * 20},
    ],
)
@pytest.mark.parametrize("scheme", ["Bearer ", "bearer  "])
def test_tokens_for_an_audience_pass(claims: object, scheme: str) -> None:
    assert Kong(headers={"authorization": scheme + token(claims)}).runs(GUARD).response.status == 200


@pytest.mark.parametrize("header", [{}, {"authorization": "Basic eA=="}])
def test_what_has_no_token_is_left_to_the_plugin(header: dict[str, str]) -> None:
    assert Kong(headers=header).runs(GUARD).response.status == 200


@pytest.mark.parametrize(
    "text",
    [
        token({"iss": "i", "aud": "others"}),
        token({"iss": "i", "aud": ["others", 1, None]}),
        token({"iss": "i", "aud": {"1": "shop"}}),
        token({"iss": "i", "aud": {"shop": True}}),
        token({"iss": "i", "aud": []}),
        token({"iss": "i"}),
        token({"iss": "i", "aud": None}),
        token({"aud": "shop"}, {"alg": "ES256", "iss": "of whom any is fine"}),
        token({"iss": False, "aud": "shop"}, {"alg": "ES256", "iss": "of whom any is fine"}),
        token(["i"]),
        token(None),
        "a.!.c",
        "a.b",
        "nonsense",
    ],
)
def test_tokens_for_nobody_here_and_odd_ones_are_refused(text: str) -> None:
    status, body = Kong(headers={"authorization": f"Bearer {text}"}).runs(GUARD).status_and_body
    assert (status, body) == (401, {"code": 16, "message": "the token is not for this audience"})
