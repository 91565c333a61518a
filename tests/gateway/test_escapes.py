from __future__ import annotations

import re
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.escapes import text_regex

REGEX = re.compile(text_regex())
ESCAPE = re.compile("%[0-9A-Fa-f]{2}")
BYTES = st.binary(max_size=8) | st.lists(
    st.sampled_from(
        [
            *(b"a", b"\x7f", b"\x80", b"\xbf", b"\xc0", b"\xc1", b"\xc2", b"\xdf", b"\xe0", b"\xe1", b"\xec", b"\xed"),
            *(
                b"\xee",
                b"\xef",
                b"\xf0",
                b"\xf1",
                b"\xf3",
                b"\xf4",
                b"\xf5",
                b"\xff",
                b"\x8f",
                b"\x90",
                b"\x9f",
                b"\xa0",
            ),
        ]
    ),
    max_size=8,
).map(b"".join)


def is_text(path: str) -> bool:
    """As Python's strict decoder has it."""
    if "%" in ESCAPE.sub("", path):
        return False
    try:
        unquote_to_bytes(path).decode("utf-8", "strict")
    except UnicodeDecodeError:
        return False
    return True


@given(BYTES, st.booleans())
def test_escaped_bytes_match_if_python_decodes_them(data: bytes, lower: bool) -> None:
    path = "".join(f"%{byte:02x}" if lower else f"%{byte:02X}" for byte in data)
    assert (REGEX.fullmatch(path) is not None) == is_text(path)


@given(st.text(alphabet="%aA0c9Ff2zG/?=", max_size=20))
def test_escapes_match_if_they_are_whole(path: str) -> None:
    assert (REGEX.fullmatch(path) is not None) == is_text(path)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(alphabet="/?&=~:a", max_size=5))
def test_every_text_can_be_said(text: str, plain: str) -> None:
    assert REGEX.fullmatch(plain + quote(text, safe="") + plain + text.replace("%", ""))


@pytest.mark.parametrize(
    "path", ["/%", "/%a", "/%zz", "/%ff", "/%C0%AF", "/%ed%a0%80", "/%f4%90%80%80", "/%c3/%bc", "/%u0041"]
)
def test_what_is_no_text_does_not_match(path: str) -> None:
    assert REGEX.fullmatch(path) is None
