"""docs/policy.md agrees with the model: every field, default and range, and every example."""

from __future__ import annotations

import pytest
from pydantic import BaseModel

from control_plane.documents import parse_document
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
    RetryBudget,
    RetryPolicy,
    Route,
    ServicePolicy,
    WeightedSubset,
)
from tests.cli.reference import DOCS, Reference, Row

SECTIONS: dict[str, type[BaseModel]] = {
    "The policy": ServicePolicy,
    "retry": RetryPolicy,
    "retry.backoff": Backoff,
    "retry.budget": RetryBudget,
    "load_balancer": LoadBalancer,
    "load_balancer.hash_key": HashKey,
    "circuit_breaker": CircuitBreaker,
    "outlier_detection": OutlierDetection,
    "concurrency_limit and server_concurrency_limit": ConcurrencyLimit,
    "fault": FaultInjection,
    "fault.delay": FaultDelay,
    "fault.abort": FaultAbort,
    "routes": Route,
    "routes.split": WeightedSubset,
    "rate_limits": RateLimit,
    "authorization": AuthorizationRule,
    "events": EventGroup,
    "events.handlers": EventHandling,
}

VALID: dict[type[BaseModel], dict[str, object]] = {
    ServicePolicy: {"service": "orders"},
    FaultDelay: {"duration": "1s"},
    FaultAbort: {"code": "UNAVAILABLE"},
    WeightedSubset: {"labels": {"version": "v1"}},
    RateLimit: {"requests_per_second": 1},
    AuthorizationRule: {"callers": ["*"], "methods": ["*"]},
}
"""What a model needs at least."""


REFERENCE = Reference((DOCS / "policy.md").read_text(encoding="utf-8"), ServicePolicy, SECTIONS, VALID)
EXAMPLES = REFERENCE.examples


def test_every_part_of_a_policy_has_a_section_with_its_fields() -> None:
    REFERENCE.assert_sections()


@pytest.mark.parametrize("row", REFERENCE.rows, ids=str)
def test_defaults_are_those_of_the_model(row: Row) -> None:
    row.assert_default()


def sized(field: str, size: float) -> object:
    """A value of the field at a bound of its range."""
    if field in ("callers", "methods"):
        return ["*"] * int(size)
    return {f"key{number}": "" for number in range(int(size))} if field == "labels" else size


@pytest.mark.parametrize("row", [row for row in REFERENCE.rows if row.has_range], ids=str)
def test_ranges_are_those_of_the_model(row: Row) -> None:
    row.assert_range(sized)


@pytest.mark.parametrize("row", [row for row in REFERENCE.rows if row.allowed.startswith("above 0")], ids=str)
def test_what_must_be_above_0_must_be(row: Row) -> None:
    row.assert_above_0()


def test_every_algorithm_and_source_is_explained() -> None:
    for name in [*Algorithm, *HashSource]:
        assert f"- `{name}`: " in REFERENCE.text


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_is_a_valid_policy_that_says_something(example: str) -> None:
    policy = parse_document(example, ServicePolicy)
    assert example == EXAMPLES[0] or policy != ServicePolicy(service=policy.service)


def test_the_examples_show_every_field() -> None:
    assert REFERENCE.not_shown() == {(CircuitBreaker, "enabled"), (OutlierDetection, "enabled")}
