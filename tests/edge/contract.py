"""The contract of the REST edge: requests and what is answered, whichever edge it is.

One table for Envoy and Kong. Where Kong differs by nature, a row says why, and what it answers instead, if that is
known; docs/edge.md lists these rows.
"""

from __future__ import annotations

from tests.edge import tokens
from tests.edge.contract_messages import BODIES, MAX_BODY, NO_TEXT, PATHS, QUERIES
from tests.edge.contract_rows import NO_405, UNMEASURED, Answer, Difference, Row, echo, refused

ORIGIN = "https://shop.example"
KEYS = {"web-key": "web-key-0123456789", "batch-key": "batch-key-0123456789"}
DEADLINE = 2.0
"""Seconds that Sleep may take."""

_CODES = (
    *((1, 499), (2, 500), (3, 400), (4, 504), (5, 404), (6, 409), (7, 403), (8, 429), (9, 400), (10, 409), (11, 400)),
    *((12, 501), (13, 500), (14, 503), (15, 500), (16, 401)),
)
_BEARER = "Bearer {%s}"
_PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "content-type"}

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
_OF_THE_EDGE = Difference(f"whether pages may read what the edge answers itself: {UNMEASURED}")
CORS_OF_THE_EDGE = tuple(
    Row(
        f"{what} to a page {'elsewhere' if origin != ORIGIN else 'that may call'}",
        verb,
        path,
        Answer(
            status,
            headers={
                "access-control-allow-origin": origin if origin == ORIGIN else None,
                "access-control-expose-headers": "x-echo-a" if origin == ORIGIN else None,
            },
        ),
        headers={"origin": origin},
        kong=_OF_THE_EDGE,
    )
    for what, verb, path, status in (
        ("unknown path", "GET", "/v1/nowhere", 404),
        ("wrong method", "PATCH", "/v1/count/1", 405),
        ("repeated parameter", "GET", "/v1/echo/a?name=b", 400),
        ("description", "GET", "/openapi.json", 200),
    )
    for origin in (ORIGIN, "https://evil.example")
)
_OTHER_METHOD = Difference(NO_405, refused(404, 5))
_UPGRADE = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13", "sec-websocket-key": "AAAA"}
PROTOCOLS = (
    Row(
        "upgrade",
        "GET",
        "/v1/echo/a",
        refused(400, 3, "the request asks for an upgrade to another protocol, and there is none"),
        headers=_UPGRADE,
        kong=Difference(f"upgrades: {UNMEASURED}"),
    ),
    *(
        Row(
            f"{kind}, {path}",
            verb,
            path,
            answer,
            headers={"content-type": kind},
            kong=Difference(f"what begins with `application/grpc` is taken for gRPC; {UNMEASURED}"),
        )
        for kind in ("application/grpc-web", "application/grpcfoo")
        for verb, path, answer in (
            ("GET", "/v1/echo/a", echo(name="a")),
            ("GET", "/v1/with-key", refused(401, 16)),
            ("POST", "/contract.v1.ContractService/Echo", refused(404, 5, "no method has this path")),
        )
    ),
    Row(
        "gRPC with a parameter of its content type",
        "GET",
        "/v1/echo/a",
        refused(404, 5, "no method has this path"),
        headers={"content-type": "application/grpc; charset=utf-8"},
        kong=Difference(f"what begins with `application/grpc` is taken for gRPC; {UNMEASURED}"),
    ),
    Row(
        "description by POST",
        "POST",
        "/openapi.json",
        refused(405, 12, "this path has the methods GET", allow="GET"),
        kong=_OTHER_METHOD,
    ),
    Row(
        "description by HEAD",
        "HEAD",
        "/openapi.json",
        Answer(405, headers={"allow": "GET"}),
        kong=Difference(_OTHER_METHOD.why, Answer(404)),
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
_SIZES = Difference(f"nginx has a limit of its own for headers, `large_client_header_buffers`; {UNMEASURED}")
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
    *CORS_OF_THE_EDGE,
    *PROTOCOLS,
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
