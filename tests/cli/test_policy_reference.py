"""docs/policy.md agrees with the model: every field, default and range, and every example."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from control_plane.documents import parse_document
from mesh_client.core.policy import (
    Algorithm,
    AuthorizationRule,
    Backoff,
    CircuitBreaker,
    ConcurrencyLimit,
    FaultAbort,
    FaultDelay,
    FaultInjection,
    HashKey,
    HashSource,
    LoadBalancer,
    OutlierDetection,
    RateLimit,
    RetryBudget,
    RetryPolicy,
    Route,
    ServicePolicy,
    WeightedSubset,
)

REFERENCE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")

SECTIONS: dict[str, type[BaseModel]] = {
    "The policy": ServicePolicy,
    "retry": RetryPolicy,
    "retry.backoff": Backoff,
    "retry.budget": RetryBudget,
    "load_balancer": LoadBalancer,
    "load_balancer.hash_key": HashKey,
    "circuit_breaker": CircuitBreaker,
    "outlier_detection": OutlierDetection,
    "concurrency_limit and server_concurrency_limit": ConcurrencyLimit,
    "fault": FaultInjection,
    "fault.delay": FaultDelay,
    "fault.abort": FaultAbort,
    "routes": Route,
    "routes.split": WeightedSubset,
    "rate_limits": RateLimit,
    "authorization": AuthorizationRule,
}

VALID: dict[type[BaseModel], dict[str, object]] = {
    ServicePolicy: {"service": "orders"},
    FaultDelay: {"duration": "1s"},
    FaultAbort: {"code": "UNAVAILABLE"},
    WeightedSubset: {"labels": {"version": "v1"}},
    RateLimit: {"requests_per_second": 1},
    AuthorizationRule: {"callers": ["*"], "methods": ["*"]},
}
"""What a model needs at least."""


@dataclass(frozen=True)
class Row:
    section: str
    field: str
    default: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.section}: {self.field}"


def rows() -> Iterator[Row]:
    section = ""
    for line in REFERENCE.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| `"):
            name, default, allowed, _ = (cell.strip() for cell in line.strip("|").split("|"))
            yield Row(section, name.strip("`"), default, allowed)


ROWS = list(rows())
EXAMPLES = re.findall(r"^```yaml\n(.*?)^```", REFERENCE, re.MULTILINE | re.DOTALL)


def models(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and all that it is made of."""

    def within(annotation: object) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from models(annotation)
        for argument in typing.get_args(annotation):
            yield from within(argument)

    yield of
    for field in of.model_fields.values():
        yield from within(field.annotation)


def test_every_part_of_a_policy_has_a_section() -> None:
    assert set(models(ServicePolicy)) == set(SECTIONS.values())


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_holds_exactly_the_fields_of_its_model_in_their_order(section: str) -> None:
    assert [row.field for row in ROWS if row.section == section] == list(SECTIONS[section].model_fields)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_defaults_are_those_of_the_model(row: Row) -> None:
    model = SECTIONS[row.section]
    default = model.model_fields[row.field].default
    if row.default == "required":
        assert default is PydanticUndefined
    elif row.default == "-":
        assert default is None
    elif row.default == "see below":
        assert isinstance(default, BaseModel)
    else:
        written = yaml.safe_load(row.default.strip("`"))
        document = VALID.get(model, {}) | {row.field: written}
        assert getattr(model.model_validate(document), row.field) == default


def sized(row: Row, size: float) -> object:
    """A value of the field at a bound of its range."""
    if row.field in ("callers", "methods"):
        return ["*"] * int(size)
    return {f"key{number}": "" for number in range(int(size))} if row.field == "labels" else size


@pytest.mark.parametrize("row", [row for row in ROWS if re.fullmatch(r"[\d.]+ to [\d.]+", row.allowed)], ids=str)
def test_ranges_are_those_of_the_model(row: Row) -> None:
    model = SECTIONS[row.section]
    base = VALID.get(model, {})
    lowest, highest = map(float, row.allowed.split(" to "))
    for inside in (lowest, highest):
        model.model_validate(base | {row.field: sized(row, inside)})
    for outside in (lowest - 1, highest + 1):
        with pytest.raises(ValidationError):
            model.model_validate(base | {row.field: sized(row, outside)})


@pytest.mark.parametrize("row", [row for row in ROWS if row.allowed.startswith("above 0")], ids=str)
def test_what_must_be_above_0_must_be(row: Row) -> None:
    model = SECTIONS[row.section]
    with pytest.raises(ValidationError):
        model.model_validate(VALID.get(model, {}) | {row.field: 0})


def test_every_algorithm_and_source_is_explained() -> None:
    for name in [*Algorithm, *HashSource]:
        assert f"- `{name}`: " in REFERENCE


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_every_example_is_a_valid_policy_that_says_something(example: str) -> None:
    policy = parse_document(example, ServicePolicy)
    assert example == EXAMPLES[0] or policy != ServicePolicy(service=policy.service)


def test_the_examples_show_every_field() -> None:
    shown: set[tuple[type[BaseModel], str]] = set()

    def note(value: object) -> None:
        if isinstance(value, BaseModel):
            for name in value.model_fields_set:
                shown.add((type(value), name))
                note(getattr(value, name))
        elif isinstance(value, tuple):
            for item in value:
                note(item)

    for example in EXAMPLES:
        note(parse_document(example, ServicePolicy))
    expected = {(model, name) for model in SECTIONS.values() for name in model.model_fields}
    assert expected - shown == {(CircuitBreaker, "enabled"), (OutlierDetection, "enabled")}
