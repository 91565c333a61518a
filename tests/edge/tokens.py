"""Issuers of tokens for tests, and tokens as they should be and as they must not be."""

from __future__ import annotations

import base64
import functools
import json
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

WEB = "https://login.example"
MOBILE = "https://mobile.example"
AUDIENCE = "shop"

ALWAYS = 4_000_000_000
"""A time in the year 2096."""


@dataclass(frozen=True)
class Issuer:
    """Signs tokens with a key of its own."""

    name: str
    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

    @property
    def algorithm(self) -> str:
        return "RS256" if isinstance(self.key, rsa.RSAPrivateKey) else "ES256"

    @property
    def public_key(self) -> str:
        """PEM."""
        encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        return self.key.public_key().public_bytes(encoding, form).decode()

    def token(self, **claims: object) -> str:
        """A token that holds, but for these claims; None leaves one out."""
        stated = {"iss": self.name, "aud": AUDIENCE, "nbf": int(time.time()) - 60, "exp": ALWAYS, **claims}
        text = {name: value for name, value in stated.items() if value is not None}
        signed = f"{_part({'alg': self.algorithm, 'typ': 'JWT'})}.{_part(text)}"
        return f"{signed}.{_base64(self._sign(signed.encode()))}"

    def _sign(self, data: bytes) -> bytes:
        if isinstance(self.key, rsa.RSAPrivateKey):
            return self.key.sign(data, padding.PKCS1v15(), hashes.SHA256())
        r, s = decode_dss_signature(self.key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32, "big") + s.to_bytes(32, "big")


@functools.cache
def web() -> Issuer:
    """Signs with RS256."""
    return Issuer(WEB, rsa.generate_private_key(65537, 2048))


@functools.cache
def mobile() -> Issuer:
    """Signs with ES256."""
    return Issuer(MOBILE, ec.generate_private_key(ec.SECP256R1()))


@functools.cache
def tokens() -> dict[str, str]:
    """Tokens by what they are about."""
    good = web().token()
    header, claims, signature = good.split(".")
    flipped = ("B" if signature[0] == "A" else "A") + signature[1:]
    stranger = Issuer(WEB, rsa.generate_private_key(65537, 2048))
    return {
        "rs256": good,
        "es256": mobile().token(aud=None),
        "expired": web().token(exp=int(time.time()) - 3_600),
        "early": web().token(nbf=int(time.time()) + 3_600),
        "endless": web().token(exp=None),
        "wrong_issuer": Issuer("https://evil.example", web().key).token(),
        "wrong_audience": web().token(aud="elsewhere"),
        "wrong_key": stranger.token(),
        "forged": f"{header}.{claims}.{flipped}",
        "none": f"{_part({'alg': 'none', 'typ': 'JWT'})}.{claims}.",
        "none_signed": f"{_part({'alg': 'none', 'typ': 'JWT'})}.{claims}.{signature}",
        # The public key as the secret of a symmetric algorithm.
        "confused": f"{_part({'alg': 'HS256', 'typ': 'JWT'})}.{claims}.{signature}",
        # Of one issuer, by the key of the other.
        "crossed": Issuer(WEB, mobile().key).token(),
    }


def _part(value: object) -> str:
    return _base64(json.dumps(value).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
