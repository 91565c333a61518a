"""Checks requests for signing. Nothing but the public key is taken from one."""

from __future__ import annotations

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from mesh_client.core.errors import InvalidValueError

MAX_BYTES = 4096
"""A request with a P-256 key takes about 250."""

_PATH = "certificate_signing_request"


def check_request(request: bytes) -> ec.EllipticCurvePublicKey:
    """The public key of a PKCS #10 request that is signed by the key itself: whoever sent it has the private key.

    Subject, names, extensions and attributes that it asks for are not looked at.

    Args:
        request: DER.

    Raises:
        InvalidValueError: it is malformed, for another kind of key than EC P-256, or not signed by its own key.
    """
    if not 0 < len(request) <= MAX_BYTES:
        raise InvalidValueError(_PATH, f"{len(request)} bytes", f"PKCS #10 as DER, at most {MAX_BYTES} bytes")
    try:
        parsed = x509.load_der_x509_csr(request)
        key = parsed.public_key()
        digest = parsed.signature_hash_algorithm
        signed = parsed.is_signature_valid
    except Exception:  # besides ValueError: several of cryptography's own, which share no base
        raise InvalidValueError(_PATH, f"{len(request)} bytes", "PKCS #10 as DER") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidValueError(_PATH, "a key of another kind", "an EC key on P-256")
    if not isinstance(digest, hashes.SHA256 | hashes.SHA384 | hashes.SHA512) or not signed:
        raise InvalidValueError(_PATH, "a signature that does not hold", "one by the key itself, with SHA-256")
    return key
