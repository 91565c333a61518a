"""Policy files: where they come from, their YAML documents, and what each of them states."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from control_plane.documents import parse_document
from mesh_client.core.errors import ConfigError, FieldError, InvalidPolicyError
from mesh_client.core.policy_base import MAX_DOCUMENT_BYTES, Policy

Kind = TypeVar("Kind", bound=Policy)

MAX_FILE_BYTES = 64 * 1024 * 1024

_MARKER = re.compile(r"^---(?=[ \t\r\n]|\Z)", re.MULTILINE)
_NOTHING = re.compile(r"(?:[ \t]*(?:---|\.\.\.)?[ \t]*(?:#[^\n]*)?\r?(?:\n|\Z))*\Z")
_DIRECTIVES = re.compile(r"(?:[ \t]*(?:%[^\n]*|#[^\n]*)?\r?(?:\n|\Z))*\Z")


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document of a file."""

    file: str
    """As the user named it; ``stdin`` for ``-``."""
    number: int
    """Counted from 1, empty documents left out."""
    line: int
    """The line of the file that it begins on."""
    text: str

    @property
    def place(self) -> str:
        """Where it is, for messages."""
        return f"{self.file}, document {self.number}"

    @property
    def in_place(self) -> str:
        """The text below as many empty lines as are above it in its file, so that errors name the file's lines.

        The text alone when that would make it too large for a policy.
        """
        moved = "\n" * (self.line - 1) + self.text
        return moved if len(moved.encode(errors="surrogatepass")) <= MAX_DOCUMENT_BYTES else self.text


@dataclass(slots=True)
class Checked(Generic[Kind]):
    """A document and what is known of it."""

    document: Document
    policy: Kind | None = None
    errors: list[FieldError] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What it is for, or empty when it cannot be understood."""
        return "" if self.policy is None else self.policy.name


def split_documents(text: str, file: str) -> Iterator[Document]:
    """The YAML documents of a text; those that hold nothing are left out.

    A line that begins with ``---`` ends a document wherever it stands, also within a quoted or block scalar (YAML 1.2,
    production ``c-forbidden``), so a broken document does not hide the ones after it.
    """
    starts = [0, *(match.start() for match in _MARKER.finditer(text) if match.start() > 0), len(text)]
    number = 0
    begin = 0
    for start, end in itertools.pairwise(starts):
        part = text[begin:end]
        if "%" in part and _DIRECTIVES.fullmatch(part):
            continue  # directives belong to the document after the marker
        if not _NOTHING.fullmatch(part):
            number += 1
            yield Document(file, number, text.count("\n", 0, start) + 1, part)
        begin = end


def read_documents(files: Sequence[Path], kind: type[Policy]) -> list[Document]:
    """All documents of all files in order; ``-`` is standard input.

    Raises:
        ConfigError: a file cannot be read, is not UTF-8 text, is too large, or holds no document.
    """
    documents: list[Document] = []
    for path in files:
        name = "stdin" if str(path) == "-" else str(path)
        found = list(split_documents(_read(path, name), name))
        if not found:
            raise ConfigError(
                f"{name}: holds no policy; expected at least one YAML document with `{kind.NAMED_BY}: NAME`"
            )
        documents += found
    return documents


def _read(path: Path, name: str) -> str:
    try:
        if name == "stdin":
            content = sys.stdin.buffer.read(MAX_FILE_BYTES + 1)
        else:
            with path.open("rb") as stream:
                content = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{name}: is larger than {MAX_FILE_BYTES // 1024**2} MiB; split it up")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: is not UTF-8 text: byte {error.start} is {content[error.start]:#04x}") from None


def check(documents: Iterable[Document], kind: type[Kind]) -> list[Checked[Kind]]:
    """What each document states or what is wrong with it, by the model that clients and control plane use too.

    That one name is stated twice is an error of the later document: which one counts would be an accident.
    """
    checked: list[Checked[Kind]] = []
    stated: dict[str, Document] = {}
    for document in documents:
        result = Checked[Kind](document)
        checked.append(result)
        try:
            result.policy = parse_document(document.in_place, kind)
        except InvalidPolicyError as error:
            result.errors = list(error.errors)
            continue
        earlier = stated.setdefault(result.name, document)
        if earlier is not document:
            result.errors.append(FieldError(kind.NAMED_BY, f"{result.name!r} is stated already by {earlier.place}"))
    return checked
