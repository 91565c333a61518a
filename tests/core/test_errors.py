from __future__ import annotations

import pytest

from mesh_client.core.errors import (
    AttemptDetail,
    ConfigError,
    FieldError,
    InvalidPolicyError,
    InvalidTransitionError,
    InvalidValueError,
    MeshError,
    MeshErrorDetail,
    Reason,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ConfigError("x"), Exception),
        (InvalidValueError("a", 1, "2"), ValueError),
        (InvalidTransitionError("x"), RuntimeError),
        (InvalidPolicyError((FieldError("a", "b"),)), ValueError),
    ],
)
def test_every_error_derives_from_the_root_and_from_what_python_code_catches(
    error: Exception, builtin: type[Exception]
) -> None:
    assert isinstance(error, MeshError)
    assert isinstance(error, builtin)


def test_an_invalid_value_names_its_path_and_the_allowed_range() -> None:
    error = InvalidValueError("endpoint.port", 0, "1 to 65535")
    assert str(error) == "endpoint.port: 0 is not allowed; expected 1 to 65535"
    assert (error.path, error.expected) == ("endpoint.port", "1 to 65535")


def test_a_long_invalid_value_is_cut_short() -> None:
    text = str(InvalidValueError("endpoint.id", "x" * 1000, "less"))
    assert len(text) < 150
    assert "xxx... is not allowed" in text


def test_an_invalid_policy_lists_each_bad_field() -> None:
    error = InvalidPolicyError((FieldError("retry.max_attempts", "too many"), FieldError("", "not a mapping")))
    assert str(error) == "retry.max_attempts: too many; not a mapping"


def test_a_failed_call_explains_itself() -> None:
    detail = MeshErrorDetail(
        service="orders",
        method="/shop.v1.OrderService/PlaceOrder",
        reason=Reason.ATTEMPTS_FAILED,
        attempts=(
            AttemptDetail("orders-1", "10.0.0.1:50051", "UNAVAILABLE", "refused", 0.0012),
            AttemptDetail("orders-2", "10.0.0.2:50051", "DEADLINE_EXCEEDED", "", 1.5),
        ),
        breaker="half-open",
        snapshot_version="0123456789abcdef",
        snapshot_age=2.25,
        control_plane="connected to 127.0.0.1:7000",
        hint="look at orders-1",
        identity="certificate valid for 23 h",
    )
    assert str(detail) == (
        "orders: every attempt failed; tried orders-1 at 10.0.0.1:50051 UNAVAILABLE after 1 ms, "
        "orders-2 at 10.0.0.2:50051 DEADLINE_EXCEEDED after 1500 ms; breaker half-open; "
        "endpoints version 0123456789abcdef 2.2 s old; control plane connected to 127.0.0.1:7000; "
        "identity: certificate valid for 23 h; look at orders-1"
    )


def test_endpoints_from_disk_are_told_from_confirmed_ones() -> None:
    detail = MeshErrorDetail("orders", "/a.B/C", Reason.NO_ENDPOINTS, snapshot_version="ab")
    assert "endpoints version ab from the disk cache" in str(detail)


def test_what_is_not_known_is_left_out() -> None:
    detail = MeshErrorDetail("orders", "/a.B/C", Reason.UNKNOWN_SERVICE)
    assert str(detail) == "orders: the mesh does not know the service; breaker closed"
