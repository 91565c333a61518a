from __future__ import annotations

import json
import re
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from mesh.v1 import edge_pb2
from pydantic import ValidationError

from mesh_client.core.edge_policy import Authentication, EdgePolicy, EdgeRateLimit, MethodSettings
from mesh_client.core.errors import FieldError, InvalidPolicyError
from tests.core.mirrors import assert_same_fields
from tests.edge_policies import P256, P384, RSA, edge_policies

ISSUER = {"issuer": "i", "algorithm": "ES256", "public_key": P256}


def test_the_model_and_the_protobuf_message_have_the_same_fields_in_the_same_order() -> None:
    seen: set[str] = set()
    assert_same_fields(EdgePolicy, edge_pb2.EdgePolicy.DESCRIPTOR, seen)
    assert {name for name in edge_pb2.DESCRIPTOR.message_types_by_name if "Follow" not in name} == seen


@given(edge_policies)
def test_a_policy_survives_the_way_through_protobuf_and_json(policy: EdgePolicy) -> None:
    message = json_format.ParseDict(policy.dump(), edge_pb2.EdgePolicy())
    received = edge_pb2.EdgePolicy.FromString(message.SerializeToString(deterministic=True))
    assert EdgePolicy.parse(json_format.MessageToDict(received, preserving_proto_field_name=True)) == policy
    assert EdgePolicy.parse(json.loads(json.dumps(policy.dump()))) == policy
    assert EdgePolicy.parse(policy.dump()).version == policy.version


@given(edge_policies, edge_policies)
def test_equal_policies_have_equal_versions(one: EdgePolicy, other: EdgePolicy) -> None:
    assert re.fullmatch("[0-9a-f]{16}", one.version)
    assert (one.version == other.version) == (one.dump() == other.dump())


def test_an_empty_policy_exposes_nothing_and_has_the_documented_defaults() -> None:
    policy = EdgePolicy.parse({})
    assert EdgePolicy.parse(json_format.MessageToDict(edge_pb2.EdgePolicy())) == policy
    assert (policy.name, policy.followers, policy.services, policy.upstreams) == ("edge", ("edge",), {}, ())
    assert (policy.cors, policy.correlation_id, policy.tracing, policy.access_log) == (None, True, None, False)
    service = exposing({}).services["a.B"]
    assert (service.connect_timeout, service.native_grpc, service.max_body_bytes) == (1.0, True, None)


def test_who_follows_is_who_is_named() -> None:
    assert EdgePolicy(edge="public", gateways=("kong", "envoy")).followers == ("kong", "envoy")
    assert EdgePolicy(edge="public").followers == ("public",)


def exposing(service: dict[str, Any], **more: object) -> EdgePolicy:
    return EdgePolicy.parse(
        {
            "services": {"a.B": {"upstream": "b", **service}},
            "consumers": {"web": {"jwt_issuers": [ISSUER], "api_keys": ["k"]}},
            **more,
        }
    )


def test_what_a_method_does_not_say_its_service_says() -> None:
    limit, own = EdgeRateLimit(requests=1), EdgeRateLimit(requests=2)
    service = exposing(
        {
            "authentication": ["jwt"],
            "rate_limit": limit,
            "timeout": "3s",
            "stream_timeout": "4s",
            "retries": 5,
            "methods": {
                "Open": {"authentication": ["none"]},
                "Own": {"authentication": ["api_key", "jwt"], "rate_limit": own, "timeout": "6s", "retries": 0},
            },
        }
    ).services["a.B"]
    jwt, key = Authentication.JWT, Authentication.API_KEY
    assert service.settings("Any", streams=False) == MethodSettings((jwt,), limit, 3.0, 5)
    assert service.settings("Any", streams=True) == MethodSettings((jwt,), limit, 4.0, 5)
    assert service.settings("Open", streams=False) == MethodSettings((), limit, 3.0, 5)
    for streams in (False, True):
        assert service.settings("Own", streams=streams) == MethodSettings((key, jwt), own, 6.0, 0)
    assert exposing({"authentication": ["none"]}).services["a.B"].settings("A", streams=False).authentication == ()


def test_the_services_that_an_edge_calls_are_listed_once() -> None:
    services = {"a.C": {"upstream": "c"}, "a.B": {"upstream": "b"}, "a.D": {"upstream": "c"}}
    assert EdgePolicy.parse({"services": services}).upstreams == ("b", "c")


def test_an_rsa_key_is_for_rs256() -> None:
    issuer = {"issuer": "i", "audiences": ["shop"], "algorithm": "RS256", "public_key": RSA}
    (item,) = EdgePolicy.parse({"consumers": {"a": {"jwt_issuers": [issuer]}}}).consumers["a"].jwt_issuers
    assert item.audiences == ("shop",)


def service(**settings: object) -> dict[str, object]:
    return {"services": {"a.B": {"upstream": "b", **settings}}}


def issuers(*items: dict[str, object]) -> dict[str, object]:
    return {"consumers": {"a": {"jwt_issuers": [ISSUER | item for item in items]}}}


BY_CONSUMER = {"requests": 1, "by": "consumer"}
KEYS = {"consumers": {"a": {"api_keys": ["k"]}}}


@pytest.mark.parametrize(
    ("document", "path", "message"),
    [
        ({"edge": "Edge"}, "edge", "expected a DNS label"),
        ({"service": "orders"}, "service", "Extra inputs are not permitted"),
        ({"gateways": ["a", "b.c"]}, "gateways[1]", "expected a DNS label"),
        ({"services": {"a..B": {"upstream": "b"}}}, "services.a..B", "should match pattern"),
        ({"services": {"a.B": {}}}, "services.a.B.upstream", "Field required"),
        (service(upstream="B"), "services.a.B.upstream", "expected a DNS label"),
        (service(timeout="0s"), "services.a.B.timeout", "greater than 0"),
        (service(retries=11), "services.a.B.retries", "less than or equal to 10"),
        (service(max_body_bytes=0), "services.a.B.max_body_bytes", "greater than or equal to 1"),
        (service(rate_limit={"requests": 1, "per": "year"}), "services.a.B.rate_limit.per", "'second', 'minute'"),
        (service(authentication=["basic"]), "services.a.B.authentication[0]", "'jwt', 'api_key' or 'none'"),
        (service(authentication=["none", "jwt"]), "services.a.B.authentication", "none stands alone"),
        (service(authentication=["jwt", "jwt"]), "services.a.B.authentication", "each way is named once"),
        (service(authentication=["jwt"]), "services.a.B.authentication", "jwt needs a consumer with jwt_issuers"),
        (service(authentication=["api_key"]), "services.a.B.authentication", "api_key needs a consumer with api_keys"),
        (service(methods={"A/B": {}}), "services.a.B.methods.A/B", "should match pattern"),
        (service(methods={"A": {"authentication": []}}), "services.a.B.methods.A.authentication", "at least 1 item"),
        (
            service(methods={"A": {"authentication": ["jwt"]}}),
            "services.a.B.methods.A.authentication",
            "jwt needs a consumer",
        ),
        (service(rate_limit=BY_CONSUMER, methods={"A": {"retries": 1}}), "services.a.B.rate_limit", "by consumer"),
        (
            service(methods={"A": {"rate_limit": BY_CONSUMER}}),
            "services.a.B.methods.A.rate_limit",
            "a rate limit by consumer needs authentication",
        ),
        (
            KEYS
            | service(authentication=["api_key"], rate_limit=BY_CONSUMER, methods={"A": {"authentication": ["none"]}}),
            "services.a.B.methods.A.authentication",
            "a rate limit by consumer needs authentication",
        ),
        ({"consumers": {"/": {}}}, "consumers./", "should match pattern"),
        ({"consumers": {"a": {"api_keys": ["../k"]}}}, "consumers.a.api_keys[0]", "should match pattern"),
        ({"consumers": {"a": {"api_keys": ["k", "k"]}}}, "consumers.a.api_keys[1]", "'k' is there already, for a"),
        (
            KEYS | {"consumers": {"a": {"api_keys": ["k"]}, "b": {"api_keys": ["k"]}}},
            "consumers.b.api_keys[0]",
            "for a",
        ),
        (issuers({}, {}), "consumers.a.jwt_issuers[1]", "'i' is there already, for a"),
        (issuers({"algorithm": "none"}), "consumers.a.jwt_issuers[0].algorithm", "'RS256' or 'ES256'"),
        (issuers({"public_key": "hunter2"}), "consumers.a.jwt_issuers[0].public_key", "expected PEM"),
        (issuers({"public_key": P256.replace("=", "")}), "consumers.a.jwt_issuers[0].public_key", "expected base64"),
        (issuers({"public_key": P384}), "consumers.a.jwt_issuers[0].public_key", "expected a P-256 key"),
        (issuers({"public_key": RSA}), "consumers.a.jwt_issuers[0].public_key", "expected a P-256 key"),
        (issuers({"algorithm": "RS256"}), "consumers.a.jwt_issuers[0].public_key", "expected an RSA key of 2048"),
        ({"cors": {"origins": []}}, "cors.origins", "at least 1 item"),
        ({"cors": {"origins": ["*"], "credentials": True}}, "cors.origins", "with credentials, name the origins"),
        ({"cors": {"origins": ["*"], "max_age": "2d"}}, "cors.max_age", "expected a duration"),
        ({"tracing": {"endpoint": "collector:4318"}}, "tracing.endpoint", "should match pattern"),
        ({"accept": ["Int64"]}, "accept[0]", "should match pattern"),
    ],
)
def test_a_bad_field_is_refused_with_its_path(document: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(InvalidPolicyError) as caught:
        EdgePolicy.parse(document)
    (error,) = caught.value.errors
    assert error.path == path
    assert message in error.message
    assert "hunter2" not in error.message


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(InvalidPolicyError) as caught:
        EdgePolicy.parse(service(authentication=["jwt", "api_key"]) | {"gateways": []})
    assert [str(error) for error in caught.value.errors] == [
        "services.a.B.authentication: jwt needs a consumer with jwt_issuers",
        "services.a.B.authentication: api_key needs a consumer with api_keys",
    ]


def test_values_that_look_like_templates_are_shown_as_they_are() -> None:
    with pytest.raises(InvalidPolicyError) as caught:
        EdgePolicy.parse(issuers({"issuer": "{text} %s"}, {"issuer": "{text} %s"}))
    assert caught.value.errors == (FieldError("consumers.a.jwt_issuers[1]", "'{text} %s' is there already, for a"),)


def test_a_policy_made_in_code_is_held_to_the_same() -> None:
    with pytest.raises(ValidationError, match="P-256"):
        EdgePolicy.model_validate(issuers({"public_key": RSA}))
