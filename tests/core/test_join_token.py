"""What a join token says of itself to the one who joins with it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.errors import ConfigError
from mesh_client.core.join_token import MAX_LENGTH, JoinTokenClaims, read_claims

ROOT = "ab" * 32
PAYLOAD = {"id": "0123456789abcdef", "service": "orders", "expires": 1000, "roots": [ROOT], "domain": "mesh.internal"}


def encode(payload: object) -> str:
    text = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    return base64.urlsafe_b64encode(text).rstrip(b"=").decode()


def token(payload: object) -> str:
    return f"mesh1.{encode(payload)}.c2lnbmF0dXJl"


def test_it_says_whose_it_is_and_whom_to_trust() -> None:
    assert read_claims(token(PAYLOAD), "token") == JoinTokenClaims(
        "0123456789abcdef", "orders", 1000.0, frozenset({ROOT}), "mesh.internal"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"id": 5},
        {"service": None},
        {"service": "Orders!"},
        {"expires": "soon"},
        {"roots": "ab"},
        {"roots": []},
        {"roots": [ROOT, 5]},
        {"roots": [ROOT.upper()]},
        {"domain": 7},
        {"domain": "-"},
    ],
)
def test_claims_of_another_form_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="MESH_TOKEN: this is no join token"):
        read_claims(token({**PAYLOAD, **change}), "MESH_TOKEN")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mesh1",
        "mesh1..",
        "mesh2." + token(PAYLOAD).partition(".")[2],
        token(PAYLOAD) + ".more",
        token(PAYLOAD) + "=",
        token(PAYLOAD) + "\n",
        token([1, 2]),
        token(b"{"),
        token(b"\xff"),
        token(b"[" * 2900),
        "mesh1.A.A",
        token({**PAYLOAD, "more": "x" * MAX_LENGTH}),
    ],
)
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no join token"):
        read_claims(text, "token")


@given(st.text(max_size=60), st.text(max_size=60))
def test_no_text_breaks_it_and_no_message_holds_any_of_it(payload: str, signature: str) -> None:
    text = f"mesh1.{payload}.{signature}"
    with pytest.raises(ConfigError) as error:
        read_claims(text, "token")
    assert len(payload) < 8 or payload not in str(error.value)
