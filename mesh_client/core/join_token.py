"""What a join token says of itself, for the one who joins with it. Only the control plane can tell whether it is true.

Text: ``mesh1.<payload>.<signature>``, both in base64url without padding. The payload is JSON: ``id``; ``service``;
``expires``, seconds since the epoch; ``roots``, SHA-256 of the trust roots in hex; ``domain``, the trust domain.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from dataclasses import dataclass

from mesh_client.core.errors import ConfigError, InvalidValueError
from mesh_client.core.identity import check_trust_domain
from mesh_client.core.model import check_service_name

MAX_LENGTH = 4096
"""Characters."""

_PREFIX = "mesh1"
_BASE64URL = re.compile(r"[A-Za-z0-9_-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class JoinTokenClaims:
    """What a join token says of itself. Nothing of it is secret.

    Attributes:
        id: for operators.
        service: whom it makes.
        expires: seconds since the epoch.
        roots: SHA-256 of the trust roots of the mesh when it was made, lower-case hex; at least one.
        trust_domain: of the mesh.
    """

    id: str
    service: str
    expires: float
    roots: frozenset[str]
    trust_domain: str


def read_claims(token: str, name: str) -> JoinTokenClaims:
    """What the token says of itself.

    Args:
        token: the token. Secret: no message shows any of it.
        name: where it is from, for the error.

    Raises:
        ConfigError: it is no join token.
    """
    prefix, _, rest = token.partition(".")
    payload, _, signature = rest.partition(".")
    parts = (payload, signature)
    if len(token) > MAX_LENGTH or prefix != _PREFIX or not all(_BASE64URL.fullmatch(part) for part in parts):
        raise _malformed(name)
    try:
        document = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        raise _malformed(name) from None
    if not isinstance(document, dict):
        raise _malformed(name)
    identifier, service, expires, roots, domain = map(document.get, ("id", "service", "expires", "roots", "domain"))
    if not (
        isinstance(identifier, str)
        and isinstance(service, str)
        and isinstance(domain, str)
        and isinstance(expires, int | float)
        and isinstance(roots, list)
        and roots
        and all(isinstance(root, str) and _SHA256.fullmatch(root) for root in roots)
    ):
        raise _malformed(name)
    try:
        check_service_name(service)
        check_trust_domain(domain)
    except InvalidValueError:
        raise _malformed(name) from None
    return JoinTokenClaims(identifier, service, float(expires), frozenset(roots), domain)


def _malformed(name: str) -> ConfigError:
    return ConfigError(f"{name}: this is no join token; expected the text that `mesh token create` prints")
