"""Policy documents as people write them, YAML or JSON, read safely: no code, no bombs, no silent duplicates. Pure.

The text is looked at twice. First as a flat stream of parser events, which costs no recursion and expands nothing, to
bound its depth and size; then as a tree, which keeps the line of every field for the messages.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from mesh_client.core.errors import FieldError, InvalidPolicyError
from mesh_client.core.policy_base import MAX_DOCUMENT_BYTES, Policy

MAX_DEPTH = 16
MAX_NODES = 50_000
"""Values in a document, those behind aliases counted each time."""

_SAFE_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map"))

_Loader: type[yaml.SafeLoader | yaml.CSafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


_Kind = TypeVar("_Kind", bound=Policy)


def parse_document(document: bytes | str, kind: type[_Kind], name: str | None = None) -> _Kind:
    """The policy that a document states.

    Args:
        document: one YAML or JSON document in UTF-8, at most ``MAX_DOCUMENT_BYTES``.
        kind: of policy.
        name: what it is stored under; the document's own must be the same. None: any.

    Raises:
        InvalidPolicyError: with path and line of every bad field.
    """
    text = _text(document)
    tree = _Tree()
    try:
        _check_shape(text)
        value = tree.load(text)
    except yaml.YAMLError as error:
        raise InvalidPolicyError((FieldError("", _syntax(error)),)) from None
    if tree.errors:
        raise InvalidPolicyError(tuple(tree.errors))
    if not isinstance(value, dict):
        raise _invalid(f"expected a mapping that begins with '{kind.NAMED_BY}: <name>'")
    try:
        policy = kind.parse(value)
    except InvalidPolicyError as error:
        raise InvalidPolicyError(tuple(tree.located(item) for item in error.errors)) from None
    if name is not None and policy.name != name:
        message = f"{policy.name!r} is not {name!r}, the {kind.NAMED_BY} that the document is stored for"
        raise InvalidPolicyError((tree.located(FieldError(kind.NAMED_BY, message)),))
    return policy


def _invalid(message: str) -> InvalidPolicyError:
    return InvalidPolicyError((FieldError("", message),))


def _text(document: bytes | str) -> str:
    try:
        encoded = document.encode() if isinstance(document, str) else document
        if len(encoded) > MAX_DOCUMENT_BYTES:
            raise _invalid(f"the document has {len(encoded)} bytes; at most {MAX_DOCUMENT_BYTES} are allowed")
        return encoded.decode()
    except UnicodeError as error:
        raise _invalid(f"the document is not UTF-8: {error}") from None


def _syntax(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"not YAML: {where}{problem}"


def _line(event: yaml.Event) -> int:
    return 0 if event.start_mark is None else event.start_mark.line + 1


def _check_shape(text: str) -> None:
    """Raises InvalidPolicyError for a text that is not one document of bounded depth and size."""
    depth = nodes = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        line = _line(event)
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise _invalid(f"line {line}: a second document begins; expected one policy per document")
        elif isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _invalid(f"line {line}: nested deeper than {MAX_DEPTH} levels")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        nodes += isinstance(event, yaml.NodeEvent)
        if nodes > MAX_NODES:
            raise _invalid(f"line {line}: more than {MAX_NODES} values")


@dataclass(slots=True)
class _Tree:
    """Plain values of one document, with the line of each path."""

    errors: list[FieldError] = field(default_factory=list)
    _lines: dict[str, int] = field(default_factory=dict)
    _nodes: int = 0

    def load(self, text: str) -> object:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            return None if node is None else self._value(loader, node, "", 0)
        finally:
            loader.dispose()

    def located(self, error: FieldError) -> FieldError:
        """The error with the line of its field, or of the nearest field around it that the document holds."""
        path = error.path
        while path and path not in self._lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return FieldError(error.path, f"{error.message} (line {self._lines[path]})") if path else error

    def _value(self, loader: yaml.SafeLoader | yaml.CSafeLoader, node: yaml.Node, path: str, depth: int) -> object:
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        self._nodes += 1
        if self._nodes > MAX_NODES or depth > MAX_DEPTH:
            # Only aliases get here: the text itself is within bounds.
            raise _invalid(f"line {line}: aliases expand to more than {MAX_NODES} values or {MAX_DEPTH} levels")
        if node.tag not in _SAFE_TAGS:
            self._error(path, f"the tag {node.tag!r} is not allowed; expected a plain value", line)
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(loader, node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(loader, item, f"{path}[{index}]", depth + 1) for index, item in enumerate(node.value)]
        try:
            value: object = loader.construct_object(node)
        except (ValueError, yaml.YAMLError) as error:
            self._error(path, str(error), line)
            return None
        return value

    def _mapping(
        self, loader: yaml.SafeLoader | yaml.CSafeLoader, node: yaml.MappingNode, path: str, depth: int
    ) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key_node.value if isinstance(key_node, yaml.ScalarNode) else "a list or mapping"
                self._error(path, f"the key {shown!r} is not a text; put it in quotes if it is meant to be one", line)
                continue
            key = str(key_node.value)
            child = f"{path}.{key}" if path else key
            if key in result:
                self._error(child, f"given twice, first on line {self._lines[child]}", line)
                continue
            self._lines[child] = line
            result[key] = self._value(loader, value_node, child, depth + 1)
        return result

    def _error(self, path: str, message: str, line: int) -> None:
        self.errors.append(FieldError(path, f"{message} (line {line})"))
