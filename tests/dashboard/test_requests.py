"""Which requests are answered at all: by name, origin and kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from control_plane.dashboard.requests import Doors, bracketed, is_loopback

LOCAL = Doors("127.0.0.1", 7080, secure=False)
PUBLIC = Doors("0.0.0.0", 443, secure=True)
JSON = {"Content-Type": "application/json; charset=utf-8"}
OWN = {"Host": "127.0.0.1:7080"}
POST = {**OWN, **JSON, "Origin": "http://127.0.0.1:7080"}


def status(doors: Doors, method: str, headers: dict[str, str], *, api: bool = True) -> int:
    refused = doors.refusal(method, headers, api=api)
    return 0 if refused is None else refused.status


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_addresses_are_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "example.com", ""])
def test_others_are_not(host: str) -> None:
    assert not is_loopback(host)


def test_addresses_are_written_with_brackets_where_they_need_them() -> None:
    assert (bracketed("::1"), bracketed("127.0.0.1")) == ("[::1]", "127.0.0.1")


@pytest.mark.parametrize("host", ["127.0.0.1:7080", "LOCALHOST:7080", "[::1]:7080"])
def test_own_names_are_answered(host: str) -> None:
    assert status(LOCAL, "GET", {"Host": host}) == 0
    assert status(LOCAL, "POST", {**POST, "Host": host, "Origin": f"http://{host.lower()}"}) == 0


@pytest.mark.parametrize(
    "host", ["", "evil.example", "evil.example:7080", "127.0.0.1", "127.0.0.1:80", "127.0.0.1:7080.evil.example"]
)
def test_other_names_are_not(host: str) -> None:
    assert status(LOCAL, "GET", {"Host": host}) == 421
    assert status(LOCAL, "GET", {"Host": host}, api=False) == 421
    assert status(LOCAL, "POST", {**POST, "Host": host, "Origin": f"http://{host}"}) == 421


@pytest.mark.parametrize(("port", "secure", "scheme"), [(80, False, "http"), (443, True, "https")])
def test_at_the_port_of_its_scheme_no_port_is_named(port: int, secure: bool, scheme: str) -> None:
    doors = Doors("127.0.0.1", port, secure=secure)
    for host in ("127.0.0.1", "[::1]", f"localhost:{port}"):
        assert status(doors, "POST", {**JSON, "Host": host, "Origin": f"{scheme}://{host}"}) == 0
    assert status(doors, "GET", {"Host": "evil.example"}) == 421


def test_beyond_loopback_the_certificate_says_which_names_are_right() -> None:
    assert status(PUBLIC, "GET", {"Host": "mesh.example"}) == 0
    assert status(PUBLIC, "POST", {**JSON, "Host": "mesh.example", "Origin": "https://mesh.example"}) == 0
    assert status(PUBLIC, "POST", {**JSON, "Host": "mesh.example", "Origin": "http://mesh.example"}) == 403
    assert status(PUBLIC, "GET", {}) == 421


@pytest.mark.parametrize("origin", ["", "null", "http://evil.example", "https://127.0.0.1:7080", "http://127.0.0.1:9"])
def test_pages_of_others_may_do_nothing(origin: str) -> None:
    assert status(LOCAL, "POST", {**POST, "Origin": origin}) == 403
    assert status(LOCAL, "GET", {**OWN, "Origin": origin}) == 403


def test_whoever_does_something_says_from_where_and_sends_json() -> None:
    assert status(LOCAL, "POST", {**OWN, **JSON}) == 403
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert status(LOCAL, "POST", {**POST, "Content-Type": kind}) == 415


@pytest.mark.parametrize(
    ("site", "expected"), [("same-origin", 0), ("none", 0), ("same-site", 403), ("cross-site", 403)]
)
def test_what_the_browser_says_of_the_asking_page_counts(site: str, expected: int) -> None:
    assert status(LOCAL, "GET", {**OWN, "Sec-Fetch-Site": site}) == expected
    assert status(LOCAL, "GET", {**OWN, "Sec-Fetch-Site": site}, api=False) == 0, "a link to the page may be anywhere"


def test_files_are_read_and_not_written() -> None:
    assert status(LOCAL, "HEAD", OWN, api=False) == 0
    assert status(LOCAL, "POST", POST, api=False) == 405


@given(st.text(), st.text(), st.text())
def test_nothing_else_lets_a_change_through(host: str, origin: str, kind: str) -> None:
    refused = LOCAL.refusal("POST", {"Host": host, "Origin": origin, "Content-Type": kind}, api=True)
    assert refused is not None
