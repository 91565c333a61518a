"""Join tokens: strict text, signature before content."""

from __future__ import annotations

import base64
import dataclasses
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from control_plane.identity.errors import InvalidTokenError
from control_plane.identity.tokens import (
    MAX_LENGTH,
    MAX_ROOTS,
    JoinToken,
    ends_at,
    parse_payload,
    sign_token,
    verify_token,
)

KEY = Ed25519PrivateKey.generate()
DOMAIN = "mesh.internal"
TOKEN = JoinToken("0123456789abcdef", "orders", 1_000, ("ab" * 32,), DOMAIN)
TEXT = sign_token(TOKEN, KEY)


def verify(text: str, now: float = 0.0) -> JoinToken:
    return verify_token(text, KEY.public_key(), DOMAIN, now)


def encode(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def signed(payload: bytes) -> str:
    """A token that this key signed, whatever is in it."""
    text = f"mesh1.{encode(payload)}"
    return f"{text}.{encode(KEY.sign(text.encode()))}"


def payload(**changes: Any) -> bytes:
    fields = {"id": TOKEN.id, "service": "orders", "expires": 1_000, "roots": list(TOKEN.roots), "domain": DOMAIN}
    return json.dumps({**fields, **changes}).encode()


def test_a_token_says_what_was_signed() -> None:
    assert verify(TEXT) == TOKEN
    assert TEXT.isascii()
    assert "\n" not in TEXT


def test_the_largest_token_fits() -> None:
    token = JoinToken("f" * 16, "a" * 63, 2**53 - 1, ("f" * 64,) * MAX_ROOTS, "a." * 89 + "aa")
    assert len(sign_token(token, KEY)) <= MAX_LENGTH
    assert verify_token(sign_token(token, KEY), KEY.public_key(), token.trust_domain, 0.0) == token


def test_a_token_ends() -> None:
    assert verify(TEXT, 999.9) == TOKEN
    with pytest.raises(InvalidTokenError, match="has ended"):
        verify(TEXT, 1_000.0)
    assert ends_at(10.2, 60.0) == 71


def test_another_key_or_trust_domain_is_refused() -> None:
    with pytest.raises(InvalidTokenError, match="did not sign"):
        verify(sign_token(TOKEN, Ed25519PrivateKey.generate()))
    with pytest.raises(InvalidTokenError, match="another trust domain"):
        verify(sign_token(dataclasses.replace(TOKEN, trust_domain="other.example"), KEY))


@given(st.integers(0, len(TEXT) - 1), st.characters(min_codepoint=1, max_codepoint=0x2FF))
def test_no_character_can_be_changed(position: int, character: str) -> None:
    changed = TEXT[:position] + character + TEXT[position + 1 :]
    if changed != TEXT:
        with pytest.raises(InvalidTokenError):
            verify(changed)


@given(st.integers(0, len(TEXT) - 1), st.text(max_size=4))
def test_nothing_can_be_cut_or_put_in(position: int, more: str) -> None:
    for changed in (TEXT[:position], TEXT[:position] + more + TEXT[position:], more + TEXT, TEXT + more):
        if changed != TEXT:
            with pytest.raises(InvalidTokenError):
                verify(changed)


@given(st.text(max_size=200) | st.lists(st.text("aZ0-_=.", max_size=30), max_size=5).map(".".join))
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidTokenError):
        verify(text)
    with pytest.raises(InvalidTokenError):
        verify(f"mesh1.{text}")


@given(st.binary(max_size=100))
def test_no_payload_that_is_not_a_token_s_is_taken_even_if_signed(content: bytes) -> None:
    with pytest.raises(InvalidTokenError):
        verify(signed(content))


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text("A.-_/\0 é", max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    st.sampled_from(["id", "service", "expires", "roots", "domain"]),
)
def test_every_field_is_checked(value: Any, field: str) -> None:
    if field == "expires" and type(value) is int and value > 0:
        return
    with pytest.raises(InvalidTokenError):
        parse_payload(payload(**{field: value}))


@pytest.mark.parametrize(
    "content",
    [
        payload(more=1),
        payload()[:-1] + b', "service": "inventory"}',
        payload(expires=True),
        payload(expires=10.0),
        payload(expires=2**53),
        payload(service="control-plane.mesh"),
        payload(service="Orders"),
        payload(domain="mesh internal"),
        payload(id="0123456789ABCDEF"),
        payload(roots=[]),
        payload(roots=["ab" * 32] * (MAX_ROOTS + 1)),
        payload(roots=["AB" * 32]),
        b"[" * 100_000,
        b"NaN",
        b"null",
    ],
)
def test_payloads_that_are_nearly_right_are_refused(content: bytes) -> None:
    with pytest.raises(InvalidTokenError):
        parse_payload(content)


def test_a_payload_has_one_text() -> None:
    assert parse_payload(payload()) == TOKEN
    _, content, signature = TEXT.split(".")
    for changed in (f"{content}=", f"{content}==", content.replace("-", "+").replace("_", "/") + "\n"):
        with pytest.raises(InvalidTokenError):
            verify(f"mesh1.{changed}.{signature}")
    # The last character of 86 has four bits that do not count.
    last = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    other = last[last.index(signature[-1]) ^ 1]
    with pytest.raises(InvalidTokenError):
        verify(f"mesh1.{content}.{signature[:-1]}{other}")


def test_errors_do_not_show_the_token() -> None:
    for text in (TEXT + "A", TEXT[:-40] + "A" * 40, signed(payload(id=7)), "x" * 5000):
        with pytest.raises(InvalidTokenError) as caught:
            verify(text)
        assert not any(part in str(caught.value) for part in text.split(".") if len(part) > 5)
