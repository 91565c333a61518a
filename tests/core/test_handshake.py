"""What grpc's accounts of failed handshakes mean. tests/integration/test_mutual_tls.py has grpc itself say them."""

from __future__ import annotations

import pytest

from mesh_client.core.handshake import explain

PREFIX = "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
VERIFY = "Tls handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: CERTIFICATE_VERIFY_FAILED: "


@pytest.mark.parametrize(
    ("details", "expected"),
    [
        ("Custom verification check failed with error: Hostname Verification Check failed.", "of somebody else than"),
        (VERIFY + "certificate has expired: OK", "of orders has expired"),
        (VERIFY + "certificate is not yet valid: OK", "not valid yet"),
        (VERIFY + "unable to get local issuer certificate: OK", "not from an authority that this process trusts"),
        ("SSL routines:OPENSSL_internal:WRONG_VERSION_NUMBER", "speaks plaintext"),
        ("Socket closed", "may not accept this process's certificate"),
        ("recvmsg:Connection reset by peer", "may not accept this process's certificate"),
    ],
)
def test_a_secure_connection_that_was_not_made_is_explained(details: str, expected: str) -> None:
    assert expected in explain(PREFIX + details, "orders", secure=True)


def test_a_server_that_wants_tls_of_a_plaintext_client_is_guessed() -> None:
    assert "may require TLS" in explain(PREFIX + "Socket closed", "orders", secure=False)


@pytest.mark.parametrize(
    ("details", "secure"),
    [
        (PREFIX + "Connection refused", True),
        (PREFIX + "WRONG_VERSION_NUMBER", False),
        ("Socket closed", True),
        ("CERTIFICATE_VERIFY_FAILED, says the application", True),
    ],
)
def test_what_has_nothing_to_do_with_it_is_left_alone(details: str, secure: bool) -> None:
    assert explain(details, "orders", secure=secure) == ""
