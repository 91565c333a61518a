"""What Kong's admin API says, in words without secrets."""

from __future__ import annotations

import json

import pytest

from gateway.kong_answers import configuration_hash, refusal, same_target, targets
from gateway.redaction import MAX_WORDS

KEY = "-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEH\nshort\n-----END PRIVATE KEY-----\n"


def body(**answer: object) -> bytes:
    return json.dumps(answer).encode()


def test_a_refusal_names_each_field_and_what_is_wrong_with_it() -> None:
    fields = {"services": [None, {"protocol": "expected a string", "routes": [{"paths": ["must start with /"]}]}]}
    words = "services[1].protocol: expected a string; services[1].routes[0].paths[0]: must start with /"
    assert refusal(body(message="declarative config is invalid", fields=fields)) == words


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (body(message="Currently loading previous configuration"), "Currently loading previous configuration"),
        (body(message="no", fields={}), "no"),
        (body(), "no reason given"),
        (b"", "no reason given"),
        (b"[1, 2]", "[1, 2]"),
        (b"<html>502\x1b[31m\n</html>", "<html>502 [31m </html>"),
        (b"[" * 100_000, "[" * MAX_WORDS + " ..."),
    ],
)
def test_other_answers_are_told_as_they_are_but_for_what_terminals_would_obey(answer: bytes, words: str) -> None:
    assert refusal(answer) == words


@pytest.mark.parametrize(
    "repeated",
    [KEY, KEY.replace("\n", "\\n"), KEY.splitlines()[1], KEY[:60]],
    ids=["whole", "escaped", "one line", "cut"],
)
def test_keys_and_other_secrets_are_not_repeated(repeated: str) -> None:
    words = refusal(body(fields={"certificates": [{"key": f"invalid key: {repeated}"}]}), [KEY, "sesame-open"])
    assert "MIGHAgEAMBMG" not in words
    assert words.startswith("certificates[0].key: invalid key: (")
    assert "sesame" not in refusal(body(message="got sesame-open"), [KEY, "sesame-open"])


def test_the_hash_of_a_configuration_is_found_where_there_is_one() -> None:
    assert configuration_hash(body(configuration_hash="abc")) == "abc"
    for other in (body(), body(configuration_hash=1), b"[]", b"no"):
        assert configuration_hash(other) == ""


def test_targets_come_in_pages_and_those_without_weight_are_none() -> None:
    page = {
        "data": [{"target": "10.0.0.1:80", "weight": 100}, {"target": "10.0.0.2:80", "weight": 0}],
        "next": "/upstreams/orders/targets?offset=2",
    }
    assert targets(body(**page)) == (frozenset({"10.0.0.1:80"}), "/upstreams/orders/targets?offset=2")
    assert targets(body(data=[], next=None)) == (frozenset(), "")
    for other in (body(), body(data=[{}]), body(data=[1]), b"[]", b"1"):
        with pytest.raises(ValueError, match="expected form"):
            targets(other)
    with pytest.raises(ValueError, match="Expecting value"):
        targets(b"no")


def test_a_target_is_the_same_however_kong_writes_it() -> None:
    assert same_target("[::1]:80") == same_target("[0000:0000:0000:0000:0000:0000:0000:0001]:80")
    assert same_target("Host.example:80") == "host.example:80"
    assert same_target("10.0.0.1:80") != same_target("10.0.0.1:81")
