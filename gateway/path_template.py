"""Path templates of ``google.api.http``: parsing, matching, precedence, regular expressions.

The grammar is that of google/api/http.proto::

    Template = "/" Segments [ Verb ] ;
    Segments = Segment { "/" Segment } ;
    Segment  = "*" | "**" | LITERAL | Variable ;
    Variable = "{" FieldPath [ "=" Segments ] "}" ;
    FieldPath = IDENT { "." IDENT } ;
    Verb     = ":" LITERAL ;

``*`` matches one segment that is not empty, ``**``, which must come last, any number of such. A literal has the
characters that RFC 3986 allows in a segment, but for ``:`` and ``*``, which mean something here.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

_LITERAL = re.compile(r"(?:[A-Za-z0-9\-._~!$&'()+,;=@]|%[0-9A-Fa-f]{2})+")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class TemplateError(ValueError):
    """A path template does not follow the grammar. The message says where and how."""


class Wildcard(enum.Enum):
    """What stands for segments that a request chooses."""

    ONE = "*"
    MANY = "**"


Segment = str | Wildcard
"""A literal, or a wildcard."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A field of the request that is bound to a part of the path."""

    field_path: tuple[str, ...]
    start: int
    """Index of its first segment."""
    end: int
    """Index after its last segment."""

    @property
    def name(self) -> str:
        """The field path with dots."""
        return ".".join(self.field_path)


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """A parsed template. Its text is canonical: ``{name=*}`` is written ``{name}``."""

    segments: tuple[Segment, ...]
    variables: tuple[Variable, ...] = ()
    """In the order of the path; they do not overlap."""
    verb: str = ""
    """What comes after the colon at the end; empty for none."""

    def __str__(self) -> str:
        parts, index = [], 0
        starts = {variable.start: variable for variable in self.variables}
        while index < len(self.segments):
            variable = starts.get(index)
            if variable is None:
                parts.append(_text(self.segments[index]))
                index += 1
                continue
            inner = self.segments[index : variable.end]
            pattern = "" if inner == (Wildcard.ONE,) else "=" + "/".join(map(_text, inner))
            parts.append(f"{{{variable.name}{pattern}}}")
            index = variable.end
        return "/" + "/".join(parts) + (f":{self.verb}" if self.verb else "")

    @property
    def shape(self) -> tuple[tuple[Segment, ...], str]:
        """Equal for templates that match the same paths by the same segments, whatever their variables are."""
        return self.segments, self.verb

    @property
    def precedence(self) -> tuple[bool, tuple[int, ...], tuple[str, ...], str]:
        """Sorts templates so that of those that match a path, the first is the one that is meant.

        A verb goes before none; then, from left to right, a literal before ``*`` before ``**``. What is left is the
        order of the texts: such templates match no path in common, or have the same shape.
        """
        ranks = {Wildcard.ONE: 1, Wildcard.MANY: 2}
        return (
            not self.verb,
            tuple(ranks[segment] if isinstance(segment, Wildcard) else 0 for segment in self.segments),
            tuple(map(_text, self.segments)),
            str(self),
        )

    def match(self, path: str) -> dict[str, str] | None:
        """The values of the variables, as they stand in the path (percent-encoded), or None if it does not match."""
        if not path.startswith("/"):
            return None
        if self.verb:
            if not path.endswith(f":{self.verb}"):
                return None
            path = path[: -len(self.verb) - 1]
        given = path[1:].split("/") if path != "/" else []
        if "" in given:
            return None
        fixed = self.segments[:-1] if self.segments[-1] is Wildcard.MANY else self.segments
        open_ended = len(fixed) < len(self.segments)
        if len(given) < len(fixed) or (len(given) > len(fixed) and not open_ended):
            return None
        if any(want not in {Wildcard.ONE, have} for want, have in zip(fixed, given, strict=False)):
            return None
        ends = {variable: len(given) if variable.end > len(fixed) else variable.end for variable in self.variables}
        return {variable.name: "/".join(given[variable.start : ends[variable]]) for variable in self.variables}

    def regex(self) -> str:
        """A regular expression that matches whole paths exactly as `match` does.

        It means the same to PCRE, Rust and Python: no look-around, no captures, no backslash.
        """
        if self.segments == (Wildcard.MANY,):
            body = "/(?:[^/]+(?:/[^/]+)*)?"
        else:
            body = "".join(_segment_regex(segment) for segment in self.segments)
        return body + (f":{escape(self.verb)}" if self.verb else "")


def escape(literal: str) -> str:
    """The literal as a regular expression: ``[.]``, for a backslash would not survive a proto's string."""
    return "".join(f"[{character}]" if character in "!$&'()+,.;=@" else character for character in literal)


def _segment_regex(segment: Segment) -> str:
    match segment:
        case Wildcard.ONE:
            return "/[^/]+"
        case Wildcard.MANY:
            return "(?:/[^/]+)*"
        case _:
            return "/" + escape(segment)


def _text(segment: Segment) -> str:
    return segment.value if isinstance(segment, Wildcard) else segment


def parse(text: str) -> PathTemplate:
    """Parses a template.

    Raises:
        TemplateError: it does not follow the grammar.
    """
    return _Parser(text).template()


class _Parser:
    """Recursive descent over the grammar above; `position` only grows."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.segments: list[Segment] = []
        self.variables: list[Variable] = []

    def template(self) -> PathTemplate:
        if not self._take("/"):
            raise self._error("must begin with a slash")
        self._segments(inside=False)
        verb = self._pattern(_LITERAL, "a verb") if self._take(":") else ""
        if self.position < len(self.text):
            raise self._error("expected a slash, a colon or the end")
        if Wildcard.MANY in self.segments[:-1]:
            raise TemplateError(f"{self.text!r}: ** is only allowed as the last segment")
        names = [variable.name for variable in self.variables]
        for name in names:
            if names.count(name) > 1:
                raise TemplateError(f"{self.text!r}: {{{name}}} is there twice")
        return PathTemplate(tuple(self.segments), tuple(self.variables), verb)

    def _segments(self, *, inside: bool) -> None:
        self._segment(inside=inside)
        while self._take("/"):
            self._segment(inside=inside)

    def _segment(self, *, inside: bool) -> None:
        if self._take("**"):
            self.segments.append(Wildcard.MANY)
        elif self._take("*"):
            self.segments.append(Wildcard.ONE)
        elif self._take("{"):
            if inside:
                raise self._error("a variable cannot hold another one")
            self._variable()
        else:
            self.segments.append(self._pattern(_LITERAL, "*, **, {field} or a literal"))

    def _variable(self) -> None:
        path = [self._pattern(_IDENTIFIER, "a field's name")]
        while self._take("."):
            path.append(self._pattern(_IDENTIFIER, "a field's name"))
        start = len(self.segments)
        if self._take("="):
            self._segments(inside=True)
        else:
            self.segments.append(Wildcard.ONE)
        if not self._take("}"):
            raise self._error("expected }")
        self.variables.append(Variable(tuple(path), start, len(self.segments)))

    def _take(self, token: str) -> bool:
        if self.text.startswith(token, self.position):
            self.position += len(token)
            return True
        return False

    def _pattern(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.position)
        if match is None:
            raise self._error(f"expected {what}")
        self.position = match.end()
        return match[0]

    def _error(self, message: str) -> TemplateError:
        return TemplateError(f"{self.text!r}, character {self.position + 1}: {message}")
