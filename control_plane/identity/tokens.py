"""Join tokens: ``mesh1.<payload>.<signature>``, both parts base64url without padding.

The payload is JSON; the signature is Ed25519 over ``mesh1.<payload>`` and is checked before the payload is looked at.
Uses and revocation are not in the token: the control plane that made it keeps them by its id.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from dataclasses import dataclass

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from control_plane.identity.errors import InvalidTokenError
from mesh_client.core.errors import InvalidValueError
from mesh_client.core.identity import check_trust_domain
from mesh_client.core.model import check_service_name

PREFIX = "mesh1"
MAX_LENGTH = 4096
"""Characters of a token."""
MAX_ROOTS = 16
"""Roots that a token can name."""

_ID = re.compile(r"[0-9a-f]{16}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_FIELDS = {"id", "service", "expires", "roots", "domain"}


@dataclass(frozen=True, slots=True)
class JoinToken:
    """What a join token says.

    Attributes:
        id: for lists, logs and revocation: 16 hex digits.
        service: that it attests.
        expires: seconds since the epoch.
        roots: fingerprints of the roots to trust, for those who have nothing else.
        trust_domain: of the mesh.
    """

    id: str
    service: str
    expires: int
    roots: tuple[str, ...]
    trust_domain: str


def sign_token(token: JoinToken, key: Ed25519PrivateKey) -> str:
    """The token's text. Secret."""
    payload = json.dumps(
        {
            "id": token.id,
            "service": token.service,
            "expires": token.expires,
            "roots": list(token.roots),
            "domain": token.trust_domain,
        },
        separators=(",", ":"),
    )
    signed = f"{PREFIX}.{_encode(payload.encode())}"
    return f"{signed}.{_encode(key.sign(signed.encode()))}"


def verify_token(text: str, key: Ed25519PublicKey, trust_domain: str, now: float) -> JoinToken:
    """What a token says that this key signed, for this trust domain, and that has not ended.

    Raises:
        InvalidTokenError: it does not hold.
    """
    if not 0 < len(text) <= MAX_LENGTH or not text.isascii():
        raise InvalidTokenError("it is no join token")
    parts = text.split(".")
    if len(parts) != 3 or parts[0] != PREFIX:
        raise InvalidTokenError("it is no join token")
    signature = _decode(parts[2])
    payload = _decode(parts[1])
    try:
        key.verify(signature, f"{PREFIX}.{parts[1]}".encode())
    except InvalidSignature:
        raise InvalidTokenError("this control plane did not sign it") from None
    token = parse_payload(payload)
    if token.trust_domain != trust_domain:
        raise InvalidTokenError(f"token {token.id} is for another trust domain")
    if not now < token.expires:
        raise InvalidTokenError(f"token {token.id} has ended")
    return token


def parse_payload(payload: bytes) -> JoinToken:
    """What the payload of a token says, whose signature is not looked at here.

    Raises:
        InvalidTokenError: it is not exactly as `sign_token` writes it.
    """
    try:
        fields = json.loads(payload, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidTokenError("its payload is no JSON") from None
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise InvalidTokenError("its payload has other fields")
    id, expires, roots = fields["id"], fields["expires"], fields["roots"]
    if not isinstance(id, str) or not _ID.fullmatch(id):
        raise InvalidTokenError("its id is none")
    if type(expires) is not int or not 0 < expires < 2**53:
        raise InvalidTokenError("its end is none")
    if not isinstance(roots, list) or not 1 <= len(roots) <= MAX_ROOTS:
        raise InvalidTokenError("its roots are none")
    if not all(isinstance(root, str) and _FINGERPRINT.fullmatch(root) for root in roots):
        raise InvalidTokenError("its roots are none")
    try:
        service = check_service_name(_text(fields["service"]))
        trust_domain = check_trust_domain(_text(fields["domain"]))
    except InvalidValueError as error:
        raise InvalidTokenError(str(error)) from None
    return JoinToken(id, service, expires, tuple(roots), trust_domain)


def ends_at(now: float, ttl: float) -> int:
    """When a token of ``ttl`` seconds that is made now ends: whole seconds, never sooner than asked."""
    return math.ceil(now + ttl)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise InvalidValueError("field", type(value).__name__, "a text")
    return value


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a field stands twice")
    return fields


def _no_constant(name: str) -> object:
    raise ValueError(name)


def _encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        content = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except binascii.Error:
        raise InvalidTokenError("it is no join token") from None
    if _encode(content) != text:  # padding, or bits that do not count: each token has one text
        raise InvalidTokenError("it is no join token")
    return content
