"""Which lines of gRPC's C core are worth a record, and what of them."""

from __future__ import annotations

import pytest

from mesh_client.core.grpc_log import MAX_REASONS, TOLD_AT_ONCE, Handshakes, Line, handshake, parse

FAILED = "Handshake failed with error SSL_ERROR_SSL: error:1000007d:SSL routines:OPENSSL_internal:"
NOISE = "Invalid certificate verification context"


def test_a_line_of_the_core_is_taken_apart() -> None:
    line = parse("I1130 05:45:23.998911    3071 ssl_transport_security.cc:2563] Handshake failed: of course")
    assert line == Line("I", "ssl_transport_security.cc:2563", "Handshake failed: of course")
    assert not line.is_about_itself


@pytest.mark.parametrize("line", ["", "Traceback (most recent call last):", "I1130 nonsense", "INFO mesh: I1130"])
def test_lines_of_others_are_left_alone(line: str) -> None:
    assert parse(line) is None


def test_what_the_core_says_of_its_own_level_is_told_apart() -> None:
    line = parse("W1130 05:45:23.984605    3062 log.cc:102] Log level INFO is not suitable for production. Prefer ...")
    assert line is not None
    assert line.is_about_itself


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            f"{FAILED}CERTIFICATE_VERIFY_FAILED: certificate has expired",
            "the other side's certificate was refused: certificate has expired",
        ),
        (f"{FAILED}PEER_DID_NOT_RETURN_A_CERTIFICATE: {NOISE}", "the other side showed no certificate"),
        (f"{FAILED}WRONG_VERSION_NUMBER: {NOISE}", "the other side speaks plaintext, not TLS"),
        (f"{FAILED}HTTP_REQUEST", "the other side speaks plaintext HTTP, not TLS"),
        (f"{FAILED}SOMETHING_NEW: {NOISE}", "SOMETHING_NEW"),
        ("ipv4:127.0.0.1:35479: Got goaway [2]", None),
    ],
)
def test_failed_handshakes_are_put_into_words(text: str, reason: str | None) -> None:
    assert handshake(Line("I", "x.cc:1", text)) == reason


def test_failures_for_one_reason_are_recorded_once_a_second_and_those_between_are_counted() -> None:
    handshakes = Handshakes()
    told = [handshakes.record("it is late", 0.0) for _ in range(TOLD_AT_ONCE + 5)]
    assert told == ["a TLS handshake failed: it is late"] * TOLD_AT_ONCE + [None] * 5
    assert handshakes.record("another", 0.0) == "a TLS handshake failed: another"
    assert handshakes.record("it is late", 1.0) == "a TLS handshake failed: it is late (5 more since the last record)"
    assert handshakes.record("it is late", 1.5) is None
    assert handshakes.record("it is late", 2.0) == "a TLS handshake failed: it is late (1 more since the last record)"


def test_there_is_no_end_of_reasons_but_of_those_that_are_remembered() -> None:
    handshakes = Handshakes()
    for number in range(MAX_REASONS):
        assert handshakes.record(f"reason {number}", 0.0) == f"a TLS handshake failed: reason {number}"
    assert handshakes.record("one too many", 0.0) == "a TLS handshake failed: other reasons"
    assert handshakes.record("reason 3", 0.0) == "a TLS handshake failed: reason 3"
