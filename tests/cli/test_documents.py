from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mesh_cli.documents import Document, check, read_documents, split_documents
from mesh_client.core.errors import ConfigError
from mesh_client.core.policy import ServicePolicy
from mesh_client.core.policy_base import MAX_DOCUMENT_BYTES


def split(text: str) -> list[tuple[int, int, object]]:
    """Number, line and content of each document."""
    return [(item.number, item.line, yaml.safe_load(item.text)) for item in split_documents(text, "file")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\n", [(1, 1, {"a": 1})]),
        ("a: 1", [(1, 1, {"a": 1})]),
        ("---\na: 1\n---\nb: 2\n", [(1, 1, {"a": 1}), (2, 3, {"b": 2})]),
        ("a: 1\r\n---\r\nb: 2\r\n", [(1, 1, {"a": 1}), (2, 2, {"b": 2})]),
        ("a: 1\n--- # the second\nb: 2\n---", [(1, 1, {"a": 1}), (2, 2, {"b": 2})]),
        ("a: 1\n--- {b: 2}\n", [(1, 1, {"a": 1}), (2, 2, {"b": 2})]),
        ("# only\n---\n# comments\n--- \n...\n\n---\na: 1\n", [(1, 7, {"a": 1})]),
        ("%YAML 1.1\n---\na: 1\n---\nb: 2\n", [(1, 2, {"a": 1}), (2, 4, {"b": 2})]),
        ("a: '---'\nb: ---x\n", [(1, 1, {"a": "---", "b": "---x"})]),
        ("a: |\n  ---\n  text\n", [(1, 1, {"a": "---\ntext\n"})]),
        ("", []),
        ("\n \n# nothing\n", []),
    ],
)
def test_a_file_is_split_where_yaml_splits_it(text: str, expected: list[tuple[int, int, object]]) -> None:
    assert split(text) == expected


@given(
    st.lists(
        st.sampled_from(["a: 1\n", "--- ", "---\n", "# c\n", "\n", "b: x\n", "  - 1\n", "...\n", "'\n"]), max_size=12
    )
)
def test_splitting_agrees_with_yaml_wherever_yaml_understands_the_text(lines: list[str]) -> None:
    text = "".join(lines)
    try:
        expected = [document for document in yaml.safe_load_all(text) if document is not None]
    except yaml.YAMLError:
        return
    assert [item for part in split_documents(text, "f") for item in yaml.safe_load_all(part.text) if item] == expected


def test_a_broken_document_does_not_hide_the_next() -> None:
    documents = list(split_documents("service: 'orders\n---\nservice: payments\n", "file"))
    first, second = check(documents, ServicePolicy)
    assert first.errors
    assert second.name == "payments"
    assert not second.errors


def test_errors_name_the_lines_of_the_file() -> None:
    (_, second) = check(
        split_documents("service: orders\n---\nservice: payments\ntimeout: never\n", "file"), ServicePolicy
    )
    assert [error.message for error in second.errors] == ["expected a duration such as 250ms, 1.5s, 2m or 1h (line 4)"]


def test_a_document_of_the_largest_size_is_valid_however_far_down_it_is() -> None:
    head = "service: orders\n"
    text = head + "#" * (MAX_DOCUMENT_BYTES - len(head))
    (result,) = check([Document("file", 2, 400_000, text)], ServicePolicy)
    assert not result.errors
    (too_large,) = check([Document("file", 2, 400_000, text + "#")], ServicePolicy)
    assert "at most 262144 are allowed" in too_large.errors[0].message


def test_documents_of_several_files_are_read_in_order(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("service: a\n---\nservice: b\n")
    second.write_bytes(b"\xef\xbb\xbfservice: c\n")
    assert [item.name for item in check(read_documents([second, first], ServicePolicy), ServicePolicy)] == [
        "c",
        "a",
        "b",
    ]


def test_a_file_that_is_far_too_large_is_refused_unread(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    with large.open("wb") as stream:
        stream.truncate(65 * 1024 * 1024)
    with pytest.raises(ConfigError, match="is larger than 64 MiB; split it up"):
        read_documents([large], ServicePolicy)
