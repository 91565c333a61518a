"""Takes secrets out of what is to be logged, by their form: the last line of defence, behind never logging them at all.

What has no form of its own, as a password or Consul's ACL tokens, is known by the name that it stands under.
"""

from __future__ import annotations

import re

REMOVED = "[removed]"
"""What stands in the place of a secret."""

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # To the end of the text where the key is cut off. A log that escapes line breaks is no hindrance.
    (
        re.compile(
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z0-9 ]{0,40}PRIVATE KEY-----|\Z)"
        ),
        "[private key removed]",
    ),
    # A join token's payload is JSON in base64url, hence its beginning; the rest of the pattern is for other versions.
    (re.compile(r"\bmesh\d\.(?:eyJ[\w-]*(?:\.[\w-]*)?|[\w-]+\.[\w-]{43,})"), "[join token removed]"),
    # RFC 7519 and RFC 6750. Words of prose are shorter, and have neither digits nor punctuation within.
    (re.compile(r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"), REMOVED),
    (
        re.compile(r"(?i)\b(bearer\s+)(?=[\w.~+/=-]*[\d_~+/=]|[\w.~+/=-]{24})[\w.~+/-]{8,}=*"),
        rf"\1{REMOVED}",
    ),
    (
        re.compile(r"(?i)\b((?:proxy-)?authorization[\s:=\"']{1,6}(?:basic|bearer|digest|apikey)\s+)[^\s\"',;)}\]\[]+"),
        rf"\1{REMOVED}",
    ),
    (re.compile(r"(?i)\b((?:x-consul-token|x-api-key)[\s:=\"']{1,6}|vault:v\d+:)[^\s\"',;)}\]\[]+"), rf"\1{REMOVED}"),
    # The password in a URL.
    (re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]{0,30}://[^\s/:@\"']*:)[^\s/@\"'\[\]]+(?=@)"), rf"\1{REMOVED}"),
)

_SUSPICIOUS = re.compile(
    r"PRIVATE KEY-----|\bmesh\d\.|\beyJ|://|(?i:bearer\s|authorization|x-consul-token|x-api-key|vault:v\d)"
)
"""In every text with a secret that is known by its form. Most texts have nothing of it, and are looked through once."""

_SECRET_NAME = re.compile(
    r"(?i)(?:^|[_.-])(?:pass(?:word|wd|phrase)|secret|token|api[_-]?key|private[_-]?key|authorization|cookie)s?$"
)


def scrub(text: str) -> str:
    """The text without the secrets in it. What it takes for none stays as it is; doing it again changes nothing."""
    if _SUSPICIOUS.search(text) is None:
        return text
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def names_secret(name: str) -> bool:
    """Whether what stands under such a name is a secret: ``password``, ``api_key``, but not ``token_id``."""
    return _SECRET_NAME.search(name) is not None
