"""What grpc's accounts of failed TLS handshakes mean, in words.

The accounts are those of grpcio 1.85 (BoringSSL); what is not recognised is left as it is.
"""

from __future__ import annotations

_MEANINGS = {
    "Hostname Verification Check failed": (
        "whoever answers there holds a certificate of somebody else than {server}, and was refused; the address may "
        "belong to another service by now"
    ),
    "certificate has expired": (
        "the certificate of {server} has expired, and it was refused; see whether it reaches the control plane, and "
        "whether this host's clock is right"
    ),
    "certificate is not yet valid": (
        "the certificate of {server} is not valid yet, and it was refused; this host's clock is probably behind"
    ),
    "CERTIFICATE_VERIFY_FAILED": (
        "the certificate of {server} is not from an authority that this process trusts, and it was refused"
    ),
    "WRONG_VERSION_NUMBER": "whoever answers there speaks plaintext, not TLS, and was refused",
}
"""By what grpc says, the first that fits."""
_CLOSED = ("Socket closed", "Connection reset", "Broken pipe", "Handshake read failed")


def explain(details: str, server: str, *, secure: bool) -> str:
    """Why a connection was not established; empty when its security has, as far as grpc tells, nothing to do with it.

    Args:
        details: grpc's message.
        server: whom the connection was for, in words.
        secure: whether this side speaks TLS.
    """
    if "failed to connect" not in details:
        return ""
    if secure:
        for sign, meaning in _MEANINGS.items():
            if sign in details:
                return meaning.format(server=server)
    if any(sign in details for sign in _CLOSED):
        # In TLS 1.3 the client has finished when the server looks at its certificate, and is not told what is wrong.
        why = "not accept this process's certificate" if secure else "require TLS, and this process speaks plaintext"
        return f"{server} closed the connection at its beginning; it may {why}"
    return ""
