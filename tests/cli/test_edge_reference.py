"""docs/edge.md agrees with the model of edge policies: every field, default and range, and every example."""

from __future__ import annotations

import re

import pytest
from pydantic import BaseModel

from control_plane.documents import parse_document
from mesh_client.core.edge_policy import (
    Authentication,
    Cors,
    EdgeConsumer,
    EdgePolicy,
    EdgeRateLimit,
    ExposedMethod,
    ExposedService,
    JwtIssuer,
    Tracing,
)
from tests.cli.reference import DOCS, Reference, Row
from tests.edge_policies import P256

SECTIONS: dict[str, type[BaseModel]] = {
    "The policy": EdgePolicy,
    "services": ExposedService,
    "services.methods": ExposedMethod,
    "services.rate_limit": EdgeRateLimit,
    "consumers": EdgeConsumer,
    "consumers.jwt_issuers": JwtIssuer,
    "cors": Cors,
    "tracing": Tracing,
}
VALID: dict[type[BaseModel], dict[str, object]] = {
    ExposedService: {"upstream": "orders"},
    EdgeRateLimit: {"requests": 1},
    JwtIssuer: {"issuer": "i", "algorithm": "ES256", "public_key": P256},
    Cors: {"origins": ["https://shop.example"]},
    Tracing: {"endpoint": "http://collector"},
}
CHAPTER = re.split(r"^## ", (DOCS / "edge.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
(TEXT,) = [chapter for chapter in CHAPTER if chapter.startswith("Edge policy\n")]
REFERENCE = Reference(TEXT, EdgePolicy, SECTIONS, VALID)
EXAMPLES = REFERENCE.examples


def test_every_part_of_a_policy_has_a_section_with_its_fields() -> None:
    REFERENCE.assert_sections()


@pytest.mark.parametrize("row", REFERENCE.rows, ids=str)
def test_defaults_are_those_of_the_model(row: Row) -> None:
    row.assert_default()


def sized(field: str, size: float) -> object:
    return ["x"] * int(size) if field in ("origins", "headers") else size


@pytest.mark.parametrize("row", [row for row in REFERENCE.rows if row.has_range], ids=str)
def test_ranges_are_those_of_the_model(row: Row) -> None:
    row.assert_range(sized)


@pytest.mark.parametrize("row", [row for row in REFERENCE.rows if row.allowed.startswith("above 0")], ids=str)
def test_what_must_be_above_0_must_be(row: Row) -> None:
    row.assert_above_0()


def test_every_way_of_authentication_is_explained() -> None:
    for way in Authentication:
        assert f"- `{way}`: " in TEXT


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_is_a_valid_policy(example: str) -> None:
    assert parse_document(example, EdgePolicy).services


def test_the_examples_show_every_field() -> None:
    assert REFERENCE.not_shown() == set()
