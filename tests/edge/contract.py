"""The contract of the REST edge: requests and what is answered, whichever edge it is.

One table for Envoy and Kong. Where Kong differs by nature, a row says why, and what it answers instead, if that is
known; docs/edge.md lists these rows.
"""

from __future__ import annotations

import json

from tests.edge import tokens
from tests.edge.contract_rows import Answer, Difference, Row, echo, refused

ORIGIN = "https://shop.example"
KEYS = {"web-key": "web-key-0123456789", "batch-key": "batch-key-0123456789"}
MAX_BODY = 4_096
DEADLINE = 2.0
"""Seconds that Sleep may take."""

_CODES = (
    *((1, 499), (2, 500), (3, 400), (4, 504), (5, 404), (6, 409), (7, 403), (8, 429), (9, 400), (10, 409), (11, 400)),
    *((12, 501), (13, 500), (14, 503), (15, 500), (16, 401)),
)
_BEARER = "Bearer {%s}"
_PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}
_REPEATED = "%s is set by the path; leave it out of the body"
_UNMEASURED = "not measured with Kong"

PATHS = (
    Row("path", "GET", "/v1/echo/a", echo(name="a")),
    Row(
        "percent-encoding in the path",
        "GET",
        "/v1/echo/a%20%C3%BC",
        echo(name="a ü"),
        kong=Difference("percent-encoding in the path is not decoded", echo(name="a%20%C3%BC")),
    ),
    Row("literal before variable", "GET", "/v1/echo/latest", Answer(body={"latest": True})),
    Row("pattern in a variable", "GET", "/v1/deep/echoes/a/parts/b", echo(name="echoes/a/parts/b")),
    Row("many segments", "GET", "/v1/files/a/b/c", echo(name="a/b/c")),
    Row("many segments, none", "GET", "/v1/files", echo()),
    Row("custom verb", "GET", "/v1/echo/a:loud", echo(name="a")),
    Row("colon that is no verb", "GET", "/v1/echo/a:quiet", echo(name="a:quiet")),
    Row("verb of another path", "GET", "/v1/files/a:loud", echo(name="a:loud")),
    Row("custom verb without a body", "POST", "/v1/echo/a:remove", Answer(body={})),
    Row("additional binding with a body", "POST", "/v1/echo/a", echo(name="a", tags=["x"]), body='{"tags": ["x"]}'),
    Row("delete", "DELETE", "/v1/echo/a", Answer(body={})),
    Row(
        "variable within a message",
        "GET",
        "/v1/nested/a",
        echo(inner={"text": "a"}),
        kong=Difference("refused by `mesh gateway lint` (nested-path)"),
    ),
    Row("unknown path", "GET", "/v1/nowhere", refused(404, 5)),
    Row("unknown path below a known one", "GET", "/v1/echo/a/b", refused(404, 5)),
    Row("empty segment at the end", "GET", "/v1/echo/", refused(404, 5)),
    Row(
        "wrong method",
        "PATCH",
        "/v1/echo/a",
        refused(405, 12, "this path has the methods DELETE, GET, POST", allow="DELETE, GET, POST"),
        kong=Difference("a path with a method that it does not have is 404, without `Allow`", refused(404, 5)),
    ),
    Row(
        "slash in a variable, encoded",
        "GET",
        "/v1/echo/a%2Fb",
        refused(400, 3),
        kong=Difference(f"`%2F`, `%5C` and `%00` in paths are not refused; {_UNMEASURED} what becomes of them"),
    ),
)
NO_TEXT = (
    *(
        Row(
            f"escapes that are no text, {path}",
            "GET",
            path,
            refused(400, 3, "what is escaped by % in the path or query is not UTF-8"),
            kong=Difference(f"escapes that are not UTF-8, or no escapes: {_UNMEASURED}"),
        )
        for path in (
            *("/v1/echo/%ff", "/v1/echo/%C0%AF", "/v1/echo/a%zz", "/v1/echo/a%", "/v1/echo/%ed%a0%80"),
            *("/v1/echo/a?tags=%ff", "/v1/echo/a?tags=%", "/v1/echo/a?tags=x%2", "/v1/nowhere/%ff"),
        )
    ),
    Row(
        "escapes that are text",
        "GET",
        "/v1/echo/a?inner.text=%F0%9F%98%80%20%2525",
        echo(name="a", inner={"text": "😀 %25"}),
    ),
)
QUERIES = (
    Row("query", "GET", "/v1/echo/a?fraction=1.5", echo(name="a", fraction=1.5)),
    Row("repeated", "GET", "/v1/echo/a?tags=x&tags=y", echo(name="a", tags=["x", "y"])),
    Row(
        "repeated, once",
        "GET",
        "/v1/echo/a?tags=x",
        echo(name="a", tags=["x"]),
        kong=Difference("a repeated parameter that comes once is 400", refused(400, 3)),
    ),
    Row("enum", "GET", "/v1/echo/a?color=COLOR_RED", echo(name="a", color="COLOR_RED")),
    Row(
        "repeated enum",
        "GET",
        "/v1/echo/a?colors=COLOR_RED&colors=COLOR_GREEN",
        echo(name="a", colors=["COLOR_RED", "COLOR_GREEN"]),
    ),
    Row(
        "enum by number",
        "GET",
        "/v1/echo/a?color=2",
        echo(name="a", color="COLOR_GREEN"),
        kong=Difference(f"an enum by its number: {_UNMEASURED}"),
    ),
    Row(
        "enum that is none",
        "GET",
        "/v1/echo/a?color=COLOR_BLUE",
        refused(400, 3),
        kong=Difference(f"an unknown name of an enum: {_UNMEASURED}"),
    ),
    Row("nested", "GET", "/v1/echo/a?inner.text=t&inner.number=3", echo(name="a", inner={"text": "t", "number": 3})),
    Row("flag", "GET", "/v1/echo/a?flag=true", echo(name="a", flag=True)),
    Row(
        "flag that is not set",
        "GET",
        "/v1/echo/a?flag=false",
        echo(name="a"),
        kong=Difference(f"`false` in the query may be taken for true; {_UNMEASURED}"),
    ),
    Row(
        "number of 64 bits",
        "GET",
        "/v1/echo/a?big=5",
        echo(name="a", big="5"),
        kong=Difference("numbers of 64 bits are JSON numbers, and lose digits beyond 2^53", echo(name="a", big=5)),
    ),
    Row(
        "number of 64 bits with all its digits",
        "GET",
        "/v1/echo/a?big=9007199254740993",
        echo(name="a", big="9007199254740993"),
        kong=Difference("numbers of 64 bits are JSON numbers, and lose digits beyond 2^53"),
    ),
    Row(
        "timestamp",
        "GET",
        "/v1/echo/a?at=2024-01-02T03:04:05.5Z",
        echo(name="a", at="2024-01-02T03:04:05.500Z"),
        kong=Difference("timestamps in queries are not understood; answers have them without Z and fractions"),
    ),
    Row(
        "number that is none",
        "GET",
        "/v1/echo/a?inner.number=x",
        refused(400, 3),
        kong=Difference(f"text where a number belongs: {_UNMEASURED}"),
    ),
    Row(
        "unknown parameter",
        "GET",
        "/v1/echo/a?colour=red",
        refused(400, 3),
        kong=Difference("unknown parameters are ignored", echo(name="a")),
    ),
    Row("parameter that the path has", "GET", "/v1/echo/a?name=b", refused(400, 3)),
    Row("parameter that the path has, after another", "GET", "/v1/echo/a?flag=true&name=b", refused(400, 3)),
    Row(
        "parameter that the path has, encoded",
        "GET",
        "/v1/echo/a?%6e%61me=b",
        refused(400, 3),
    ),
    Row(
        "parameter that the path has, beside a body",
        "POST",
        "/v1/echo/a?name=b",
        refused(400, 3),
        body="{}",
        kong=Difference("the query of a method with a body is ignored", echo(name="a")),
    ),
)
BODIES = (
    Row(
        "body",
        "POST",
        "/v1/echo/a",
        echo(
            name="a",
            color="COLOR_RED",
            inner={"text": "t", "color": "COLOR_GREEN", "words": ["x", "y"]},
            inners=[{"text": "1"}, {"number": 2}],
            labels={"k": "v"},
            flag=True,
            fraction=0.25,
        ),
        body=json.dumps(
            {
                "color": "COLOR_RED",
                "inner": {"text": "t", "color": "COLOR_GREEN", "words": ["x", "y"]},
                "inners": [{"text": "1"}, {"number": 2}],
                "labels": {"k": "v"},
                "flag": True,
                "fraction": 0.25,
            }
        ),
    ),
    Row("no body", "POST", "/v1/echo/a", echo(name="a")),
    Row("body that is one field", "PUT", "/v1/echo/a/inner", echo(name="a", inner={"text": "t"}), body='{"text": "t"}'),
    Row(
        "query beside a body",
        "PUT",
        "/v1/echo/a/inner?color=COLOR_RED",
        echo(name="a", color="COLOR_RED", inner={"text": "t"}),
        body='{"text": "t"}',
        kong=Difference("the query of a method with a body is ignored", echo(name="a", inner={"text": "t"})),
    ),
    Row(
        "query beside a whole body",
        "POST",
        "/v1/echo/a?color=COLOR_RED",
        echo(name="a", color="COLOR_RED"),
        body="{}",
        kong=Difference("the query of a method with a body is ignored", echo(name="a")),
    ),
    Row("field that is unknown", "POST", "/v1/echo/a", echo(name="a"), body='{"unknown": 1}'),
    Row(
        "body that contradicts a path within a message",
        "POST",
        "/v1/nested/a",
        refused(400, 3),
        body='{"inner": {"text": "b"}}',
        kong=Difference("refused by `mesh gateway lint` (nested-path)"),
    ),
    Row(
        "number of 64 bits in a body",
        "POST",
        "/v1/echo/a",
        echo(name="a", big="9007199254740993"),
        body='{"big": "9007199254740993"}',
        kong=Difference("numbers of 64 bits are JSON numbers, and lose digits beyond 2^53"),
    ),
    Row(
        "timestamp in a body",
        "POST",
        "/v1/echo/a",
        echo(name="a", at="2024-01-02T03:04:05Z"),
        body='{"at": "2024-01-02T03:04:05Z"}',
        kong=Difference("timestamps in requests are objects with seconds, by Kong's code; not measured"),
    ),
    Row(
        "null",
        "POST",
        "/v1/echo/a",
        echo(name="a"),
        body='{"color": null}',
        kong=Difference("null in a body is 400", refused(400, 3)),
    ),
    Row("bad JSON", "POST", "/v1/echo/a", refused(400, 3), body='{"tags": ['),
    Row("JSON that is no object", "POST", "/v1/echo/a", refused(400, 3), body='["x"]'),
    *(
        Row(f"body that {what}", "POST", "/v1/echo/a", refused(400, 3, _REPEATED % "name"), body=body)
        for what, body in (
            ("contradicts the path", '{"name": "b"}'),
            ("repeats the path", '{"tags": ["x"], "name": "a"}'),
            ("repeats the path, then contradicts it", '{"name": "a", "name": "b"}'),
            ("contradicts the path, by an escaped name", r'{"\u006eame": "b"}'),
            ("says null where the path says something", '{"name": null}'),
        )
    ),
    *(
        Row(f"body that {what}", "POST", "/v1/long/a", refused(400, 3, _REPEATED % "long_name"), body=body)
        for what, body in (
            ("contradicts the path, by the name in JSON", '{"longName": "b"}'),
            ("contradicts the path, by the name in the proto", '{"long_name": "b"}'),
            ("repeats the path, then contradicts it by its other name", '{"long_name": "a", "longName": "b"}'),
        )
    ),
    Row(
        "body that repeats a path within a message, then contradicts it",
        "POST",
        "/v1/nested/a",
        refused(400, 3),
        body='{"inner": {"text": "a"}, "inner": {"text": "b"}}',
        kong=Difference("refused by `mesh gateway lint` (nested-path)"),
    ),
    Row(
        "body that has the name of what the path says elsewhere",
        "POST",
        "/v1/echo/a",
        echo(name="a", inner={"text": "t"}, labels={"name": "b"}, tags=["name"]),
        body='{"inner": {"name": "b", "text": "t"}, "labels": {"name": "b"}, "tags": ["name"]}',
    ),
    Row("names without quotes", "POST", "/v1/echo/a", refused(400, 3), body='{name: "b"}'),
    Row("names in single quotes", "POST", "/v1/echo/a", refused(400, 3), body="{'name': 'b'}"),
    *(
        Row(f"body where there is none, {verb} {path}", verb, path, refused(413, 3), body=body)
        for verb, path, body in (
            ("GET", "/v1/echo/a", '{"name": "a", "name": "b"}'),
            ("DELETE", "/v1/echo/a", '{"name": "a", "name": "b"}'),
            ("GET", "/v1/count/1", '{"to": 3}'),
            ("GET", "/v1/metadata", "{}"),
        )
    ),
    Row("oversized body", "POST", "/v1/echo/a", refused(413, 3), body=json.dumps({"tags": ["x" * MAX_BODY]})),
    Row(
        "many requests",
        "POST",
        "/v1/sum",
        Answer(body={"number": 3}),
        body='[{"to": 1}, {"to": 2}]',
        kong=Difference("refused by `mesh gateway lint` (client-streaming)"),
    ),
)
STREAMS = (
    Row(
        "stream",
        "GET",
        "/v1/count/3",
        Answer(text='{"number":1}\n{"number":2}\n{"number":3}\n', headers={"content-type": "application/json"}),
        kong=Difference(
            "nothing separates the messages of a stream", Answer(text='{"number":1}{"number":2}{"number":3}')
        ),
    ),
    Row("empty stream", "GET", "/v1/count/0", Answer(text="")),
    Row("stream that fails at once", "GET", "/v1/count/0?code=5", refused(404, 5, "counted")),
    Row(
        "stream that fails later",
        "GET",
        "/v1/count/2?code=5",
        Answer(text='{"number":1}\n{"number":2}\n'),
        kong=Difference("an error after the first message is lost", Answer(text='{"number":1}{"number":2}')),
    ),
)
STATUSES = (
    *(
        Row(f"status {code}", "GET", f"/v1/fail/{code}?message=it%20failed", refused(status, code, "it failed"))
        for code, status in _CODES
    ),
    Row("status with a message beyond ASCII", "GET", "/v1/fail/3?message=%C3%BC%25%22", refused(400, 3, 'ü%"')),
    Row(
        "status with details", "POST", "/v1/fail", refused(400, 3, "m"), body='{"code":3,"message":"m","details":true}'
    ),
    Row("service without endpoints", "GET", "/v1/gone", refused(503, 14)),
    Row("deadline passed", "GET", "/v1/sleep/5000", refused(504, 4)),
)
CORS = (
    Row(
        "preflight",
        "OPTIONS",
        "/v1/echo/a",
        Answer(
            headers={
                "access-control-allow-origin": ORIGIN,
                "access-control-allow-methods": "*",
                "access-control-allow-headers": "*",
                "access-control-max-age": "600",
            }
        ),
        headers={"origin": ORIGIN, **_PREFLIGHT},
    ),
    Row(
        "preflight of a method that asks for a token",
        "OPTIONS",
        "/v1/with-token",
        Answer(headers={"access-control-allow-origin": ORIGIN}),
        headers={"origin": ORIGIN, **_PREFLIGHT},
    ),
    Row(
        "preflight from elsewhere",
        "OPTIONS",
        "/v1/echo/a",
        Answer(headers={"access-control-allow-origin": None}),
        headers={"origin": "https://evil.example", **_PREFLIGHT},
    ),
    Row(
        "request from a page",
        "GET",
        "/v1/metadata",
        Answer(headers={"access-control-allow-origin": ORIGIN, "access-control-expose-headers": "x-echo-a"}),
        headers={"origin": ORIGIN},
    ),
    Row(
        "error to a page",
        "GET",
        "/v1/with-key",
        refused(401, 16, access_control_allow_origin=ORIGIN),
        headers={"origin": ORIGIN},
    ),
    Row(
        "request from a page elsewhere",
        "GET",
        "/v1/metadata",
        Answer(headers={"access-control-allow-origin": None}),
        headers={"origin": "https://evil.example"},
    ),
)
TOKENS = (
    Row("token missing", "GET", "/v1/with-token", refused(401, 16)),
    *(
        Row(
            f"token, {name.replace('_', ' ')}",
            "GET",
            "/v1/with-token",
            refused(401, 16),
            headers={"authorization": _BEARER % name},
            kong=Difference(
                "what is wrong with a token may be said by 403; which version does so is not measured",
                Answer((401, 403)),
            )
            if name in {"wrong_issuer", "wrong_key", "forged", "crossed"}
            else None,
        )
        for name in (
            *("expired", "early", "endless", "wrong_issuer", "wrong_key", "forged", "none", "none_signed"),
            *("confused", "crossed"),
        )
    ),
    Row(
        "token, wrong audience",
        "GET",
        "/v1/with-token",
        refused(401, 16),
        headers={"authorization": _BEARER % "wrong_audience"},
    ),
    Row(
        "token in the query",
        "GET",
        "/v1/with-token?access_token=x&jwt=x",
        refused(401, 16),
    ),
    Row(
        "token, RS256",
        "GET",
        "/v1/with-token",
        Answer(metadata={"x-consumer-username": "web"}),
        headers={"authorization": _BEARER % "rs256", "x-consumer-username": "forged"},
    ),
    Row(
        "token, ES256",
        "GET",
        "/v1/with-token",
        Answer(metadata={"x-consumer-username": "batch"}),
        headers={"authorization": _BEARER % "es256"},
    ),
)
API_KEYS = (
    Row("key missing", "GET", "/v1/with-key", refused(401, 16)),
    Row("key wrong", "GET", "/v1/with-key", refused(401, 16), headers={"x-api-key": "wrong"}),
    Row("key in the query", "GET", f"/v1/with-key?x-api-key={KEYS['web-key']}", refused(401, 16)),
    Row(
        "key",
        "GET",
        "/v1/with-key",
        Answer(metadata={"x-consumer-username": "web", "x-api-key": None}),
        headers={"x-api-key": KEYS["web-key"], "x-consumer-username": "forged"},
    ),
    Row("token without key", "GET", "/v1/with-both", refused(401, 16), headers={"authorization": _BEARER % "rs256"}),
    Row("key without token", "GET", "/v1/with-both", refused(401, 16), headers={"x-api-key": KEYS["web-key"]}),
    Row(
        "token and key",
        "GET",
        "/v1/with-both",
        Answer(metadata={"x-consumer-username": "web"}),
        headers={"authorization": _BEARER % "es256", "x-api-key": KEYS["web-key"]},
    ),
)
LIMITS = (
    Row("limit by address", "GET", "/v1/limited-by-address", refused(429, 8, retry_after="*"), times=3),
    Row(
        "limit of another path of the same method",
        "GET",
        "/v1/limited-by-address/too",
        refused(429, 8),
        kong=Difference("each path of a method has a limit of its own", Answer()),
    ),
    Row(
        "limit by consumer",
        "GET",
        "/v1/limited-by-consumer",
        refused(429, 8, retry_after="*"),
        headers={"x-api-key": KEYS["web-key"]},
        times=3,
    ),
    Row(
        "limit of another consumer",
        "GET",
        "/v1/limited-by-consumer",
        Answer(metadata={"x-consumer-username": "batch"}),
        headers={"x-api-key": KEYS["batch-key"]},
    ),
)
_SIZES = Difference(f"nginx has a limit of its own for headers, `large_client_header_buffers`; {_UNMEASURED}")
SIZES = (
    *(
        Row(
            f"{size} bytes of headers",
            "GET",
            "/v1/echo/a",
            answer,
            headers={"x-large": "a" * size},
            kong=_SIZES,
        )
        for size, answer in (
            (9_000, echo(name="a")),
            (23_000, echo(name="a")),
            (25_000, refused(431, 3)),
            (60_000, refused(431, 3)),
        )
    ),
    Row("long path", "GET", f"/v1/fail/5?message={'a' * 23_000}&details=false", refused(404, 5), kong=_SIZES),
    Row("path that is too long", "GET", f"/v1/echo/{'a' * 25_000}", refused(431, 3), kong=_SIZES),
)
METADATA = (
    Row(
        "header to metadata and back",
        "GET",
        "/v1/metadata",
        Answer(metadata={"x-echo-a": "value, with spaces"}, headers={"x-echo-a": "value, with spaces"}),
        headers={"x-echo-a": "value, with spaces"},
    ),
    Row(
        "headers that only the mesh may say",
        "GET",
        "/v1/metadata",
        Answer(metadata={"mesh-caller": None, "x-consumer-username": None, "x-consumer-id": None}),
        headers={"mesh-caller": "orders", "x-consumer-username": "web", "x-consumer-id": "1"},
    ),
    Row(
        "request id",
        "GET",
        "/v1/metadata",
        Answer(metadata={"x-request-id": "id-of-the-caller"}, headers={"x-request-id": "id-of-the-caller"}),
        headers={"x-request-id": "id-of-the-caller"},
    ),
    Row("request id that is made", "GET", "/v1/metadata", Answer(headers={"x-request-id": "*"})),
    Row("request id of an error", "GET", "/v1/with-key", refused(401, 16, x_request_id="*")),
    Row(
        "request id of an unknown path",
        "GET",
        "/v1/nowhere",
        refused(404, 5, x_request_id="*"),
        kong=Difference("a path that no route has gets no `X-Request-ID`", refused(404, 5)),
    ),
    Row(
        "headers that mean something to gRPC",
        "GET",
        "/v1/metadata",
        Answer(metadata={"grpc-previous-rpc-attempts": None, "grpc-tags": None, "x-other": "1"}),
        headers={"grpc-previous-rpc-attempts": "3", "grpc-tags": "1", "x-other": "1"},
    ),
    *(
        Row(f"header that gRPC would not take, {name}", "GET", "/v1/metadata", Answer(), headers={name: value})
        for name, value in (
            *(("x-a-bin", "not base64 !!"), ("grpc-trace-bin", "!"), ("grpc-encoding", "junk")),
            *(("grpc-status", "junk"), ("grpc-retry-pushback-ms", "junk"), ("grpc-timeout", "junk")),
        )
    ),
    Row(
        "no headers of gRPC",
        "GET",
        "/v1/metadata",
        Answer(headers={"grpc-status": None, "grpc-message": None}),
        kong=Difference("`grpc-status` and `grpc-message` stay in the headers of answers", Answer()),
    ),
)
TABLE = (
    *PATHS,
    *NO_TEXT,
    *QUERIES,
    *BODIES,
    *STREAMS,
    *STATUSES,
    *CORS,
    *TOKENS,
    *API_KEYS,
    *LIMITS,
    *SIZES,
    *METADATA,
)


def policy() -> dict[str, object]:
    """The policy of the edge that the table is about, as a document."""
    limit = {"requests": 2, "per": "minute"}
    issuer = {"audiences": [tokens.AUDIENCE], **_issuer(tokens.web())}
    return {
        "services": {
            "contract.v1.ContractService": {
                "upstream": "contract",
                "max_body_bytes": MAX_BODY,
                "methods": {
                    "Sleep": {"timeout": DEADLINE},
                    "WithToken": {"authentication": ["jwt"]},
                    "WithKey": {"authentication": ["api_key"]},
                    "WithBoth": {"authentication": ["jwt", "api_key"]},
                    "LimitedByConsumer": {"authentication": ["api_key"], "rate_limit": {**limit, "by": "consumer"}},
                    "LimitedByAddress": {"rate_limit": limit},
                },
            },
            "contract.v1.ExtraService": {"upstream": "contract"},
            "contract.v1.GoneService": {"upstream": "gone"},
        },
        "consumers": {
            "web": {"jwt_issuers": [issuer], "api_keys": ["web-key"]},
            "batch": {"jwt_issuers": [_issuer(tokens.mobile())], "api_keys": ["batch-key"]},
        },
        "cors": {
            # Two: to a single one, Kong names it whoever asks, and leaves the rest to the browser.
            "origins": [ORIGIN, "https://admin.example"],
            "exposed_headers": ["x-echo-a"],
        },
        "access_log": True,
    }


def kong_policy() -> dict[str, object]:
    """The same without what Kong cannot do."""
    document = policy()
    services = document["services"]
    assert isinstance(services, dict)
    del services["contract.v1.ExtraService"]
    return {**document, "accept": ["int64:contract.v1.EchoRequest.big"], "access_log": False}


def _issuer(issuer: tokens.Issuer) -> dict[str, object]:
    return {"issuer": issuer.name, "algorithm": issuer.algorithm, "public_key": issuer.public_key}
