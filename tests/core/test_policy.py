from __future__ import annotations

import json
import re
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from mesh.v1 import policy_pb2

from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.model import MAX_WEIGHT, StatusCode
from mesh_client.core.policy import (
    Algorithm,
    AuthorizationRule,
    Backoff,
    CircuitBreaker,
    ConcurrencyLimit,
    EventGroup,
    EventHandling,
    FaultAbort,
    FaultDelay,
    FaultInjection,
    HashKey,
    HashSource,
    LoadBalancer,
    OutlierDetection,
    RateLimit,
    RateLimitScope,
    RetryBudget,
    RetryPolicy,
    Route,
    ServicePolicy,
    WeightedSubset,
    method_matches,
)
from mesh_client.core.policy_base import format_duration, parse_duration
from tests.core.mirrors import assert_same_fields


def durations(low: float = 1e-9) -> st.SearchStrategy[float]:
    return st.floats(low, 86_400.0)


percents = st.floats(0.0, 100.0)
methods = st.sampled_from(["*", "shop.v1.OrderService/*", "shop.v1.OrderService/PlaceOrder", "/_a/B"])
labels = st.dictionaries(st.text(max_size=5), st.text(max_size=5), min_size=1, max_size=3)
codes = st.sampled_from([code for code in StatusCode if code not in (StatusCode.OK, StatusCode.CANCELLED)])


@st.composite
def ordered_durations(draw: st.DrawFn) -> tuple[float, float]:
    low, high = sorted((draw(durations()), draw(durations())))
    return low, high


backoffs = st.builds(
    lambda bounds, multiplier: Backoff(initial=bounds[0], max=bounds[1], multiplier=multiplier),
    ordered_durations(),
    st.floats(1.0, 10.0),
)
retry_policies = st.builds(
    RetryPolicy,
    max_attempts=st.integers(1, 10),
    retry_on=st.lists(codes, min_size=1, max_size=4).map(tuple),
    per_try_timeout=st.none() | durations(),
    backoff=backoffs,
    budget=st.builds(RetryBudget, ratio=st.floats(0.0, 1.0), min_per_second=st.floats(0.0, 10_000.0)),
)
hash_keys = st.one_of(
    st.builds(HashKey, source=st.sampled_from([HashSource.SOURCE_IP, HashSource.EXPLICIT])),
    st.builds(
        HashKey,
        source=st.just(HashSource.METADATA),
        metadata_key=st.text("az09_.-", min_size=1, max_size=64),
    ),
)
load_balancers = st.builds(
    LoadBalancer,
    algorithm=st.sampled_from(Algorithm),
    hash_key=hash_keys,
    prefer_same_zone=st.booleans(),
    slow_start=durations(0.0),
    panic_threshold=percents,
)
breakers = st.builds(
    CircuitBreaker,
    enabled=st.booleans(),
    consecutive_failures=st.integers(1, 1000),
    open_duration=durations(),
    half_open_probes=st.integers(1, 100),
)
outlier_detections = st.builds(
    lambda bounds, **fields: OutlierDetection(base_ejection=bounds[0], max_ejection=bounds[1], **fields),
    ordered_durations(),
    enabled=st.booleans(),
    consecutive_failures=st.integers(1, 1000),
    max_ejected_percent=percents,
    interval=durations(),
    success_rate_min_requests=st.integers(1, 1_000_000),
    success_rate_min_endpoints=st.integers(2, 1000),
    success_rate_stdev_factor=st.floats(0.0, 10.0),
)
concurrency_limits = st.builds(ConcurrencyLimit, max_in_flight=st.none() | st.integers(1, 1_000_000))
faults = st.builds(
    FaultInjection,
    delay=st.none() | st.builds(FaultDelay, duration=durations(), percent=percents),
    abort=st.none()
    | st.builds(FaultAbort, code=st.sampled_from([code for code in StatusCode if code]), percent=percents),
)
splits = st.lists(st.builds(WeightedSubset, labels=labels, weight=st.integers(0, MAX_WEIGHT)), max_size=3).filter(
    lambda split: not split or any(subset.weight for subset in split)
)
routes = st.builds(
    Route,
    method=methods,
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
    timeout=st.none() | durations(),
    retry=st.none() | retry_policies,
    fault=st.none() | faults,
    split=splits.map(tuple),
)
rate_limits = st.builds(
    RateLimit,
    method=methods,
    scope=st.sampled_from(RateLimitScope),
    requests_per_second=st.floats(1e-6, 1_000_000.0),
    burst=st.none() | st.integers(1, 1_000_000),
)
authorization_rules = st.builds(
    AuthorizationRule,
    callers=st.lists(st.sampled_from(["*", "gateway", "operator:anna", "x" * 63]), min_size=1, max_size=3).map(tuple),
    methods=st.lists(methods, min_size=1, max_size=3).map(tuple),
)
event_groups = st.builds(
    EventGroup,
    group=st.sampled_from(["*", "shipping", "x" * 63]),
    paused=st.booleans(),
    max_in_flight=st.none() | st.integers(1, 1000),
    handlers=st.lists(
        st.builds(
            EventHandling,
            type=st.sampled_from(["*", "shop.v1.*", "shop.v1.OrderPlaced"]),
            publishers=st.lists(st.sampled_from(["orders", "mesh:control-plane"]), max_size=2).map(tuple),
            timeout=st.none() | st.floats(1e-9, 3_600.0),
            max_attempts=st.none() | st.integers(1, 100),
        ),
        max_size=2,
    ).map(tuple),
)
policies = st.builds(
    ServicePolicy,
    service=st.sampled_from(["orders", "0", "a-b", "x" * 63]),
    timeout=st.none() | durations(),
    retry=retry_policies,
    load_balancer=load_balancers,
    circuit_breaker=breakers,
    outlier_detection=outlier_detections,
    concurrency_limit=concurrency_limits,
    fault=faults,
    routes=st.lists(routes, max_size=2).map(tuple),
    rate_limits=st.lists(rate_limits, max_size=2).map(tuple),
    server_concurrency_limit=concurrency_limits,
    authorization=st.lists(authorization_rules, max_size=2).map(tuple),
    events=st.lists(event_groups, max_size=2).map(tuple),
)


def test_the_model_and_the_protobuf_message_have_the_same_fields_in_the_same_order() -> None:
    seen: set[str] = set()
    assert_same_fields(ServicePolicy, policy_pb2.ServicePolicy.DESCRIPTOR, seen)
    assert seen == set(policy_pb2.DESCRIPTOR.message_types_by_name)


@given(policies)
def test_a_policy_survives_the_way_through_protobuf(policy: ServicePolicy) -> None:
    message = json_format.ParseDict(policy.dump(), policy_pb2.ServicePolicy())
    received = policy_pb2.ServicePolicy.FromString(message.SerializeToString(deterministic=True))
    assert ServicePolicy.parse(json_format.MessageToDict(received, preserving_proto_field_name=True)) == policy


@given(policies)
def test_a_policy_survives_the_way_through_json(policy: ServicePolicy) -> None:
    assert ServicePolicy.parse(json.loads(json.dumps(policy.dump()))) == policy


def test_a_policy_without_settings_has_the_documented_defaults() -> None:
    policy = ServicePolicy.parse({"service": "orders"})
    assert policy.timeout is None
    assert policy.retry.max_attempts == 3
    assert policy.retry.retry_on == (StatusCode.UNAVAILABLE,)
    assert policy.retry.budget == RetryBudget(ratio=0.2, min_per_second=10.0)
    assert policy.load_balancer.algorithm is Algorithm.LEAST_REQUEST
    assert policy.circuit_breaker == CircuitBreaker(consecutive_failures=5, open_duration=60.0, half_open_probes=1)
    assert policy.outlier_detection.max_ejected_percent == 10.0
    assert policy.concurrency_limit.max_in_flight is None


def test_an_unset_protobuf_field_means_the_default() -> None:
    message = policy_pb2.ServicePolicy(service="orders")
    document = json_format.MessageToDict(message, preserving_proto_field_name=True)
    assert ServicePolicy.parse(document) == ServicePolicy(service="orders")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("1.5s", 1.5), ("2m", 120.0), ("1h", 3600.0), (" 5s ", 5.0), (3, 3), (0.5, 0.5), (None, None)],
)
def test_durations_are_written_as_people_write_them(text: object, seconds: object) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "-1s", "1e3s", "1.s", "1 s", "5 minutes", True])
def test_other_forms_of_duration_are_refused(text: object) -> None:
    with pytest.raises(ValueError, match="expected a duration such as 250ms"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0, "0s"), (60.0, "60s"), (0.25, "0.25s"), (1e-9, "0.000000001s"), (100.0, "100s")]
)
def test_durations_are_sent_as_protobuf_writes_them(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("document", "path", "message"),
    [
        ({}, "service", "Field required"),
        ({"service": "Orders"}, "service", "expected a DNS label"),
        ({"service": "a", "unknown": 1}, "unknown", "Extra inputs are not permitted"),
        ({"service": "a", "timeout": "0s"}, "timeout", "greater than 0"),
        ({"service": "a", "timeout": "0.0000000001s"}, "timeout", "greater than 0"),
        ({"service": "a", "timeout": "25h"}, "timeout", "less than or equal to 86400"),
        ({"service": "a", "timeout": float("inf")}, "timeout", "finite number"),
        ({"service": "a", "timeout": "soon"}, "timeout", "expected a duration"),
        ({"service": "a", "retry": {"max_attempts": 11}}, "retry.max_attempts", "less than or equal to 10"),
        ({"service": "a", "retry": {"retry_on": ["NOPE"]}}, "retry.retry_on[0]", "expected a gRPC status code name"),
        ({"service": "a", "retry": {"retry_on": [99]}}, "retry.retry_on[0]", "Input should be"),
        ({"service": "a", "retry": {"retry_on": ["OK"]}}, "retry", "must not hold OK or CANCELLED"),
        ({"service": "a", "retry": {"retry_on": ["CANCELLED"]}}, "retry", "must not hold OK or CANCELLED"),
        ({"service": "a", "retry": {"backoff": {"initial": "2s"}}}, "retry.backoff", "max must be at least initial"),
        (
            {"service": "a", "outlier_detection": {"max_ejection": "1s"}},
            "outlier_detection",
            "max_ejection must be at least base_ejection",
        ),
        (
            {"service": "a", "load_balancer": {"hash_key": {"source": "METADATA"}}},
            "load_balancer.hash_key",
            "metadata_key is needed for METADATA",
        ),
        (
            {"service": "a", "load_balancer": {"hash_key": {"metadata_key": "user"}}},
            "load_balancer.hash_key",
            "and for nothing else",
        ),
        (
            {"service": "a", "load_balancer": {"panic_threshold": float("nan")}},
            "load_balancer.panic_threshold",
            "less than or equal to 100",
        ),
        ({"service": "a", "fault": {"abort": {"code": "OK"}}}, "fault.abort", "code must not be OK"),
        (
            {"service": "a", "routes": [{}, {"method": "orders"}]},
            "routes[1].method",
            "expected 'package.Service/Method'",
        ),
        (
            {"service": "a", "routes": [{"split": [{"labels": {"version": "2"}, "weight": 0}]}]},
            "routes[0]",
            "at least one weight above 0",
        ),
        (
            {"service": "a", "routes": [{"split": [{"labels": {}, "weight": 1}]}]},
            "routes[0].split[0].labels",
            "at least 1 item",
        ),
        ({"service": "a", "authorization": [{"methods": ["*"]}]}, "authorization[0].callers", "Field required"),
        (
            {"service": "a", "authorization": [{"callers": [], "methods": ["*"]}]},
            "authorization[0].callers",
            "at least 1 item",
        ),
        (
            {"service": "a", "authorization": [{"callers": ["b"], "methods": []}]},
            "authorization[0].methods",
            "at least 1 item",
        ),
        (
            {"service": "a", "authorization": [{"callers": ["*"], "methods": ["*", "a.*"]}]},
            "authorization[0].methods[1]",
            "expected 'package.Service/Method'",
        ),
        ({"service": "a", "events": [{"group": "Reports"}]}, "events[0].group", "expected '*' or a DNS label"),
        ({"service": "a", "events": [{"max_in_flight": 0}]}, "events[0].max_in_flight", "greater than or equal to 1"),
        ({"service": "a", "events": [{"handlers": [{"type": "OrderPlaced"}]}]}, "events[0].handlers[0].type", "'*'"),
        ({"service": "a", "events": [{"handlers": [{"type": "shop.*.A"}]}]}, "events[0].handlers[0].type", "'*'"),
        (
            {"service": "a", "events": [{"handlers": [{"publishers": ["operator:anna"]}]}]},
            "events[0].handlers[0].publishers[0]",
            "expected the name of a service or 'mesh:control-plane'",
        ),
        (
            {"service": "a", "events": [{"handlers": [{"timeout": "2h"}]}]},
            "events[0].handlers[0].timeout",
            "less than or equal to 3600",
        ),
    ],
)
def test_a_bad_field_is_refused_with_its_path(document: dict[str, Any], path: str, message: str) -> None:
    with pytest.raises(InvalidPolicyError) as caught:
        ServicePolicy.parse(document)
    error = caught.value.errors[0]
    assert error.path == path
    assert message in error.message


@pytest.mark.parametrize(
    "caller",
    [
        "",
        "Orders",
        "a.b",
        "operator:",
        "operator:Anna",
        "operator:*",
        "mesh:control-plane",
        "spiffe://m/service/a",
        "a*",
    ],
)
def test_a_caller_that_no_identity_can_have_is_refused(caller: str) -> None:
    with pytest.raises(InvalidPolicyError) as caught:
        ServicePolicy.parse({"service": "a", "authorization": [{"callers": ["b", caller], "methods": ["*"]}]})
    (error,) = caught.value.errors
    assert (error.path, error.message) == (
        "authorization[0].callers[1]",
        "expected the name of a service, 'operator:NAME' or '*'",
    )


@given(policies, policies)
def test_equal_policies_have_equal_versions(one: ServicePolicy, other: ServicePolicy) -> None:
    assert re.fullmatch("[0-9a-f]{16}", one.version)
    assert (one.version == other.version) == (one.dump() == other.dump())
    assert ServicePolicy.parse(one.dump()).version == one.version


def test_every_bad_field_is_named_at_once() -> None:
    with pytest.raises(InvalidPolicyError) as caught:
        ServicePolicy.parse({"service": "a", "timeout": "x", "circuit_breaker": {"half_open_probes": 0}})
    assert [error.path for error in caught.value.errors] == ["timeout", "circuit_breaker.half_open_probes"]


def test_a_document_that_is_not_a_mapping_is_refused() -> None:
    with pytest.raises(InvalidPolicyError):
        ServicePolicy.parse(["service"])  # type: ignore[arg-type]  # what YAML may hold


def test_methods_are_given_with_or_without_their_leading_slash() -> None:
    assert Route(method="/shop.v1.OrderService/PlaceOrder").method == "shop.v1.OrderService/PlaceOrder"


@pytest.mark.parametrize(
    ("pattern", "method", "matches"),
    [
        ("*", "/a.B/C", True),
        ("a.B/*", "/a.B/C", True),
        ("a.B/*", "a.B/C", True),
        ("a.B/*", "/a.BB/C", False),
        ("a.B/C", "/a.B/C", True),
        ("a.B/C", "/a.B/CD", False),
    ],
)
def test_patterns_cover_methods(pattern: str, method: str, matches: bool) -> None:
    assert method_matches(pattern, method) is matches


def test_the_first_group_and_handler_that_match_say_how_events_are_handled() -> None:
    policy = ServicePolicy.parse(
        {
            "service": "shipping",
            "events": [
                {"group": "reports", "paused": True},
                {
                    "max_in_flight": 4,
                    "handlers": [
                        {"type": "shop.v1.OrderPlaced", "timeout": "5s"},
                        {"type": "shop.v1.*", "timeout": "6s"},
                        {"timeout": "7s"},
                    ],
                },
                {"group": "shipping", "paused": True},
            ],
        }
    )
    assert policy.event_group("reports") == EventGroup(group="reports", paused=True)
    group = policy.event_group("shipping")
    assert (group.max_in_flight, group.paused) == (4, False)
    times = {
        "shop.v1.OrderPlaced": 5.0,
        "shop.v1.OrderPlacedAgain": 6.0,
        "shop.v1.inner.A": 6.0,
        "shop.v10.A": 7.0,
        "A": 7.0,
    }
    assert {each: group.handling(each).timeout for each in times} == times


def test_without_a_match_the_code_alone_says_how_events_are_handled() -> None:
    policy = ServicePolicy.parse(
        {"service": "shipping", "events": [{"group": "reports", "handlers": [{"type": "a.B"}]}]}
    )
    assert policy.event_group("shipping") == EventGroup()
    assert policy.event_group("reports").handling("a.C") == EventHandling()
