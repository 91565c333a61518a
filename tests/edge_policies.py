"""Edge policies that tests share: public keys whose private keys nobody has kept, and policies of all kinds."""

from __future__ import annotations

from hypothesis import strategies as st

from mesh_client.core.edge_policy import (
    Authentication,
    Cors,
    EdgeConsumer,
    EdgePolicy,
    EdgeRateLimit,
    ExposedMethod,
    ExposedService,
    JwtIssuer,
    Tracing,
)

P256 = """\
-----BEGIN PUBLIC KEY-----
MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAE7q52rBTrWriW9GajOkyhgedjbafF
jKJLU6AMaTenSanmze4WYyQ5e1if5kfVgJd7mj/nyORvkq+vfgceKEilaA==
-----END PUBLIC KEY-----
"""
P384 = """\
-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE5untUKRiyangS/cGNwkJ6QxoYY6sKJnn
1CFb2AQs+dQ8wJBUfO8nLFtiUsHaTMV0zYFSD1eDRDrH56htWWhjO24fMJuMyCSv
NSY9h8TdaEOv9KELM50kCxFXYs8z9CfO
-----END PUBLIC KEY-----
"""
RSA = """\
-----BEGIN PUBLIC KEY-----
MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAyiY6iUr6bktoBsAe3z5P
xZATbjmAuO0zno3du0CsjLEhkw7EzIKIDanqBGzuehOl5el7i7/hgSLUPf/j7GmZ
W7IF08O3bOA/Omiwx28oLtNo73OSckdbLVyKbeGZOFPfsLszTqXPM01DMDhKu92N
fLTJMkb3Ilaq+DMnzFeBa49mBSGpLv6/HY57SeT30MW1n09X8QKRyXr47sdeIfuJ
MuqKmGM+02K+RgmyqT9wk94hjUOqA+Pq60OMn3mIYqyiOSw6gJ2r788G2PbEq1V0
FhrdqfMOWGJZo+PPOctTYKDj4Pk/aBAU5ETVULrm1hG181maVwyJ0jyFOTKlJRjC
nQIDAQAB
-----END PUBLIC KEY-----
"""

_durations = st.floats(1e-9, 86_400.0)
_texts = st.text("abc/:.-é", min_size=1, max_size=5)
_names = st.sampled_from(["a", "orders", "0", "a-b"])
_ways = st.sampled_from([("jwt",), ("api_key",), ("jwt", "api_key"), ("none",)]).map(
    lambda ways: tuple(map(Authentication, ways))
)
_limits = st.builds(
    EdgeRateLimit,
    requests=st.integers(1, 1_000_000_000),
    per=st.sampled_from(["second", "minute", "hour", "day"]),
    by=st.just("ip"),
)
_methods = st.builds(
    ExposedMethod,
    authentication=st.none() | _ways,
    rate_limit=st.none() | _limits,
    timeout=st.none() | _durations,
    retries=st.none() | st.integers(0, 10),
)
_services = st.builds(
    ExposedService,
    upstream=_names,
    authentication=st.just(()) | _ways,
    rate_limit=st.none() | _limits,
    max_body_bytes=st.none() | st.integers(1, 1 << 30),
    connect_timeout=_durations,
    timeout=_durations,
    stream_timeout=_durations,
    retries=st.integers(0, 10),
    methods=st.dictionaries(st.sampled_from(["Get", "_Put", "A1"]), _methods, max_size=2),
    native_grpc=st.booleans(),
)
_issuers = st.builds(
    JwtIssuer,
    issuer=_texts,
    audiences=st.lists(_texts, max_size=2).map(tuple),
    algorithm=st.just("ES256"),
    public_key=st.just(P256),
)
_CONSUMERS = {
    "web": EdgeConsumer(jwt_issuers=(JwtIssuer(issuer="i", algorithm="RS256", public_key=RSA),)),
    "batch": EdgeConsumer(api_keys=("batch-key",)),
}
edge_policies = st.builds(
    EdgePolicy,
    edge=_names,
    gateways=st.lists(_names, max_size=2).map(tuple),
    services=st.dictionaries(st.sampled_from(["a.B", "shop.v1.OrderService", "_x"]), _services, max_size=2),
    consumers=st.dictionaries(
        st.just("more"), st.builds(EdgeConsumer, jwt_issuers=_issuers.map(lambda item: (item,))), max_size=1
    ).map(lambda more: _CONSUMERS | more),
    cors=st.none()
    | st.builds(
        Cors,
        origins=st.lists(_texts, min_size=1, max_size=2).map(tuple),
        headers=st.lists(_texts, min_size=1, max_size=2).map(tuple),
        exposed_headers=st.lists(_texts, max_size=2).map(tuple),
        credentials=st.booleans(),
        max_age=st.floats(0.0, 86_400.0),
    ),
    correlation_id=st.booleans(),
    tracing=st.none()
    | st.builds(Tracing, endpoint=st.just("http://c:4318/v1/traces"), sampled_percent=st.floats(0.0, 100.0)),
    access_log=st.booleans(),
    accept=st.lists(st.sampled_from(["int64", "bytes:a.B.c"]), max_size=2).map(tuple),
)
