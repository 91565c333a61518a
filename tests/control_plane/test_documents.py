"""Policy documents as people write them."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.documents import MAX_DEPTH, MAX_NODES, parse_document
from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.model import StatusCode
from mesh_client.core.policy import Algorithm, ServicePolicy
from mesh_client.core.policy_base import MAX_DOCUMENT_BYTES


def problems(document: bytes | str, service: str | None = None) -> list[str]:
    with pytest.raises(InvalidPolicyError) as refused:
        parse_document(document, ServicePolicy, service)
    return [str(error) for error in refused.value.errors]


GOOD = """
service: orders
timeout: 2s
retry: {max_attempts: 2, retry_on: [UNAVAILABLE, ABORTED]}
load_balancer:
  algorithm: PEAK_EWMA
routes:
  - method: shop.v1.OrderService/*
    timeout: 250ms
"""


def test_yaml_is_read() -> None:
    policy = parse_document(GOOD, ServicePolicy)
    assert policy.timeout == 2.0
    assert policy.retry.retry_on == (StatusCode.UNAVAILABLE, StatusCode.ABORTED)
    assert policy.load_balancer.algorithm is Algorithm.PEAK_EWMA
    assert policy.routes[0].timeout == 0.25
    assert parse_document(GOOD.encode(), ServicePolicy, "orders") == policy


def test_json_is_read() -> None:
    assert parse_document(b'{"service": "orders", "timeout": 1.5}', ServicePolicy).timeout == 1.5


def test_anchors_and_aliases_are_read() -> None:
    text = """
service: orders
retry: &patient {max_attempts: 5}
routes:
  - {method: a.B/C, retry: *patient}
"""
    policy = parse_document(text, ServicePolicy)
    assert policy.routes[0].retry == policy.retry


def test_every_bad_field_is_named_with_its_line() -> None:
    text = "service: orders\ntimeout: never\nretry:\n  max_attempts: 99\n  bogus: 1\nroutes:\n  - method: '!'\n"
    found = problems(text)
    assert [line.partition(":")[0] for line in found] == [
        "timeout",
        "retry.max_attempts",
        "retry.bogus",
        "routes[0].method",
    ]
    assert [line.rpartition("(")[2] for line in found] == ["line 2)", "line 4)", "line 5)", "line 7)"]


def test_a_missing_field_is_named_with_the_line_of_what_lacks_it() -> None:
    (found,) = problems("service: orders\nrate_limits:\n  - method: a.B/C\n")
    assert found.startswith("rate_limits[0].requests_per_second: ")
    assert found.endswith("(line 3)")


def test_a_missing_service_is_named() -> None:
    (found,) = problems("timeout: 1s\n")
    assert found.startswith("service: ")


def test_the_service_must_be_the_one_it_is_stored_for() -> None:
    assert problems("timeout: 1s\nservice: payments", "orders") == [
        "service: 'payments' is not 'orders', the service that the document is stored for (line 2)"
    ]


def test_a_key_that_is_given_twice_is_refused_with_both_lines() -> None:
    assert problems("service: orders\nretry:\n  max_attempts: 1\n  max_attempts: 2\n") == [
        "retry.max_attempts: given twice, first on line 3 (line 4)"
    ]


@pytest.mark.parametrize("document", ["", "# nothing\n", "[]", "orders", "null", "--- ~"])
def test_a_document_that_is_no_mapping_is_refused(document: str) -> None:
    assert problems(document) == ["expected a mapping that begins with 'service: <name>'"]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("service: orders\n  timeout: 1s", "not YAML: line 2, column"),
        ("service: *nobody", "undefined alias"),
        ("a: b\n---\nc: d", "line 2: a second document begins"),
        (b"service: \xff", "not UTF-8"),
        ("service: \x00", "not YAML"),
        ("service: \ud800", "not UTF-8"),
        ("1: x", "the key '1' is not a text"),
        ("? [a]\n: x", "the key 'a list or mapping' is not a text"),
        ("<<: {service: orders}", "the key '<<' is not a text"),
        ("service: !!python/object/apply:os.system [x]", "is not allowed"),
        ("service: !!binary aGVsbG8=", "is not allowed"),
        ("service: 2020-01-01", "is not allowed"),
        ("service: !!int x", "service"),
        ("service: !!float x", "service"),
    ],
)
def test_what_is_no_plain_yaml_is_refused(document: str | bytes, message: str) -> None:
    (found, *_) = problems(document)
    assert message in found


def test_a_document_that_is_too_large_is_refused_unread() -> None:
    for document in (b"#" * (MAX_DOCUMENT_BYTES + 1), "é" * (MAX_DOCUMENT_BYTES // 2 + 1)):
        assert problems(document)[0].startswith("the document has 26214")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("[" * 100_000, "nested deeper"),
        ("{a: " * (MAX_DEPTH + 1) + "1" + "}" * (MAX_DEPTH + 1), "nested deeper"),
        ("a: [" + "1," * MAX_NODES + "]", "more than 50000 values"),
        ("- " * 50_000, "nested deeper"),
    ],
)
def test_a_document_of_excessive_shape_is_refused(document: str, message: str) -> None:
    assert message in problems(document)[0]


def test_aliases_do_not_multiply() -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{name}: &{name} [{', '.join(['*' + before] * 10)}]"
        for before, name in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    started = time.perf_counter()
    assert "aliases expand" in problems("\n".join(lines))[0]
    assert time.perf_counter() - started < 5.0


def test_an_alias_to_itself_is_refused() -> None:
    assert "aliases expand" in problems("service: &a {b: *a}")[0]


@given(st.text(max_size=200) | st.binary(max_size=200))
def test_any_noise_is_refused_in_words(document: str | bytes) -> None:
    assert problems(document)
