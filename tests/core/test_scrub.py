from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_client.core.scrub import REMOVED, names_secret, scrub

BASE64URL = string.ascii_letters + string.digits + "-_"
B68 = string.ascii_letters + string.digits + "-._~+/"
AROUND = st.text(max_size=40).filter(lambda text: "-----" not in text)


def edged(text: str) -> str:
    """What stands apart from a secret."""
    return f"{text} "


@st.composite
def join_tokens(draw: st.DrawFn) -> str:
    document = '{"id": "' + draw(st.text(BASE64URL, max_size=300)) + '"}'
    payload = base64.urlsafe_b64encode(document.encode()).decode().rstrip("=")
    signature = base64.urlsafe_b64encode(draw(st.binary(min_size=64, max_size=64))).decode().rstrip("=")
    return f"mesh1.{payload}.{signature}"


@st.composite
def private_keys(draw: st.DrawFn) -> str:
    kind = draw(st.sampled_from(["", "EC ", "RSA ", "ENCRYPTED ", "OPENSSH "]))
    newline = draw(st.sampled_from(["\n", "\r\n", "\\n", " "]))
    body = newline.join(draw(st.lists(st.text(BASE64URL + "+/=", min_size=16, max_size=64), min_size=1, max_size=4)))
    end = draw(st.sampled_from([f"-----END {kind}PRIVATE KEY-----", ""]))
    return f"-----BEGIN {kind}PRIVATE KEY-----{newline}{body}{newline}{end}"


@given(AROUND, join_tokens(), AROUND)
def test_join_tokens_are_removed_and_what_is_around_them_stays(before: str, token: str, after: str) -> None:
    made = scrub(f"{edged(before)}{token} {after}")
    assert token.rpartition(".")[2] not in made
    assert made == f"{scrub(edged(before))}[join token removed] {scrub(after)}"


@given(join_tokens(), st.integers(min_value=12, max_value=300))
def test_nothing_is_left_of_a_join_token_that_is_cut(token: str, length: int) -> None:
    assert scrub(token[:length]) == "[join token removed]"


@given(AROUND, private_keys(), AROUND)
def test_private_keys_are_removed_whole_also_when_their_end_is_cut_off(before: str, key: str, after: str) -> None:
    rest = f"\n{after}" if key.endswith("KEY-----") else ""
    assert scrub(f"{edged(before)}{key}\n{after}") == f"{scrub(edged(before))}[private key removed]{scrub(rest)}"


@given(AROUND, st.sampled_from(["Bearer ", "bearer  ", "BEARER\t"]), st.text(B68, min_size=30, max_size=200))
def test_bearer_tokens_are_removed(before: str, word: str, token: str) -> None:
    assert scrub(f"{edged(before)}{word}{token}") == f"{scrub(edged(before))}{word}{REMOVED}"


@given(st.text(BASE64URL, min_size=8), st.text(BASE64URL, min_size=8), st.text(BASE64URL, min_size=20))
def test_signed_tokens_are_removed_without_the_word_too(header: str, payload: str, signature: str) -> None:
    assert scrub(f"got eyJ{header}.{payload}.{signature}") == f"got {REMOVED}"


@given(st.text(max_size=300))
def test_scrubbing_again_changes_nothing(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


@given(st.text(string.ascii_letters + string.digits + " .,:;/()[]{}'\"=_-@", max_size=300))
def test_scrubbing_prose_again_changes_nothing(text: str) -> None:
    assert scrub(scrub(text)) == scrub(text)


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("Authorization: Basic dXNlcjpwYXNz", f"Authorization: Basic {REMOVED}"),
        ("{'authorization': 'Bearer abcdef', 'b': 1}", f"{{'authorization': 'Bearer {REMOVED}', 'b': 1}}"),
        ("Bearer abcdef1234", f"Bearer {REMOVED}"),
        ("X-Consul-Token: 7c1b6f3e-0d6a", f"X-Consul-Token: {REMOVED}"),
        ("amqp://shop:hunter2@broker:5672/", f"amqp://shop:{REMOVED}@broker:5672/"),
    ],
)
def test_what_has_a_secret_in_a_known_place_loses_it(text: str, made: str) -> None:
    assert scrub(text) == made
    assert scrub(made) == made


@pytest.mark.parametrize(
    "text",
    [
        "mesh1.internal:7070 is reachable, mesh1.example.com too",
        "the bearer of this certificate; bearer authentication is not configured",
        "authorization[0] allows orders to call shop.v1.PaymentService/*",
        "token 8a1e3cc39be0f858 lets 3 workloads join",
        "consul://[::1]:8500 and http://127.0.0.1:8500/ui/@x",
        "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----",
        "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----",
    ],
)
def test_what_only_looks_alike_stays(text: str) -> None:
    assert scrub(text) == text


@pytest.mark.parametrize(
    "name", ["password", "db_password", "DB-PASSWORD", "token", "consul.token", "api_key", "apikey", "Authorization"]
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert names_secret(name)


@pytest.mark.parametrize("name", ["token_id", "tokens_left", "author", "keyboard", "secretary", "path"])
def test_names_of_other_things_are_not_taken_for_secrets(name: str) -> None:
    assert not names_secret(name)
