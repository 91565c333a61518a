"""What a reference of policies in docs/ says, to be held against the model: every field, default and range."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from control_plane.documents import parse_document
from mesh_client.core.policy_base import Policy

DOCS = Path(__file__).parents[2] / "docs"

Models = Mapping[str, type[BaseModel]]


@dataclass(frozen=True)
class Row:
    """One field, as a table describes it."""

    section: str
    model: type[BaseModel]
    valid: Mapping[str, object]
    """What the model needs at least."""
    field: str
    default: str
    allowed: str

    def __str__(self) -> str:
        return f"{self.section}: {self.field}"

    def assert_default(self) -> None:
        default = self.model.model_fields[self.field].default
        if self.default == "required":
            assert default is PydanticUndefined
        elif self.default == "-":
            assert default is None
        elif self.default == "see below":
            assert isinstance(default, BaseModel)
        else:
            written = yaml.safe_load(self.default.strip("`"))
            document = {**self.valid, self.field: written}
            assert getattr(self.model.model_validate(document), self.field) == default

    def assert_range(self, sized: typing.Callable[[str, float], object]) -> None:
        lowest, highest = map(float, self.allowed.split(" to "))
        for inside in (lowest, highest):
            self.model.model_validate({**self.valid, self.field: sized(self.field, inside)})
        for outside in (lowest - 1, highest + 1):
            with pytest.raises(ValidationError):
                self.model.model_validate({**self.valid, self.field: sized(self.field, outside)})

    def assert_above_0(self) -> None:
        with pytest.raises(ValidationError):
            self.model.model_validate({**self.valid, self.field: 0})

    @property
    def has_range(self) -> bool:
        return re.fullmatch(r"[\d.]+ to [\d.]+", self.allowed) is not None


class Reference:
    """A chapter.

    Args:
        text: of the chapter.
        kind: of policy.
        sections: the model that each section is about.
        valid: what a model needs at least.
    """

    def __init__(
        self,
        text: str,
        kind: type[Policy],
        sections: Models,
        valid: Mapping[type[BaseModel], Mapping[str, object]],
    ) -> None:
        self.text = text
        self.kind = kind
        self.sections = sections
        self.rows = list(_rows(text, sections, valid))
        self.examples = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)

    def assert_sections(self) -> None:
        """Every part of a policy has a section, which holds exactly its fields in their order."""
        assert set(_models(self.kind)) == set(self.sections.values())
        for section, model in self.sections.items():
            assert [row.field for row in self.rows if row.section == section] == list(model.model_fields), section

    def not_shown(self) -> set[tuple[type[BaseModel], str]]:
        """Fields that no example shows."""
        shown: set[tuple[type[BaseModel], str]] = set()

        def note(value: object) -> None:
            if isinstance(value, BaseModel):
                for name in value.model_fields_set:
                    shown.add((type(value), name))
                    note(getattr(value, name))
            elif isinstance(value, tuple | dict):
                for item in value.values() if isinstance(value, dict) else value:
                    note(item)

        for example in self.examples:
            note(parse_document(example, self.kind))
        return {(model, name) for model in self.sections.values() for name in model.model_fields} - shown


def _rows(text: str, sections: Models, valid: Mapping[type[BaseModel], Mapping[str, object]]) -> Iterator[Row]:
    section = ""
    for line in text.splitlines():
        if line.startswith("#"):
            section = line.lstrip("# ")
        elif line.startswith("| `"):
            name, default, allowed, _ = (cell.strip() for cell in line.strip("|").split("|"))
            model = sections[section]
            yield Row(section, model, valid.get(model, {}), name.strip("`"), default, allowed)


def _models(of: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The model and all that it is made of."""

    def within(annotation: object) -> Iterator[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from _models(annotation)
        for argument in typing.get_args(annotation):
            yield from within(argument)

    yield of
    for field in of.model_fields.values():
        yield from within(field.annotation)
