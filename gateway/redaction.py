"""What other programs say, made fit for logs and reports: they repeat what they were given, secrets included. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_WORDS = 1000
"""Characters that are passed on."""
_SHORTEST_SECRET = 6
_DUMP = re.compile(r"goo\.gle/debug[a-z]*.*?(?=: Proto constraint validation failed|$)", re.DOTALL)
"""What Envoy puts before its reason: all of the configuration that it refuses."""
_PEM = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(-----END [A-Z ]*PRIVATE KEY-----|$)", re.DOTALL)


def fit_for_logs(text: str, secrets: Iterable[str] = ()) -> str:
    """The text without private keys and these secrets, without what terminals would obey, and not too long.

    Args:
        text: what was said.
        secrets: what must not be repeated; of texts of several lines, no line. Shorter ones than 6 characters would
            match anything, and are left.
    """
    text = _PEM.sub("(key)", _DUMP.sub("", text))
    for secret in secrets:
        # A key in PEM may be repeated line by line, or with its line breaks escaped.
        for line in map(str.strip, secret.splitlines()):
            if len(line) >= _SHORTEST_SECRET and not line.startswith("-----"):
                text = text.replace(line, "(secret)")
    text = "".join(character if character.isprintable() else " " for character in text)
    return text if len(text) <= MAX_WORDS else text[:MAX_WORDS] + " ..."
