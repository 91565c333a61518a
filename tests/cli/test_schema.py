from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from mesh_cli.policy import policy_schema
from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.policy import ServicePolicy
from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.test_policy_reference import EXAMPLES

TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
ANNOTATIONS = {"$schema", "$defs", "title", "description", "default", "examples"}
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}
SIZES = {"minItems": "maxItems", "minProperties": "maxProperties", "minLength": "maxLength"}


def violations(value: object, schema: dict[str, Any], root: dict[str, Any], path: str = "") -> Iterator[str]:
    """What JSON Schema, draft 2020-12, has against a value: the keywords that policies use, and no others.

    A keyword that is not known here fails the test: an editor would ignore a misspelt one without a word.
    """
    unknown = set(schema) - ANNOTATIONS - BOUNDS - set(SIZES) - set(SIZES.values())
    unknown -= {"$ref", "type", "enum", "pattern", "anyOf", "items", "properties", "additionalProperties", "required"}
    assert not unknown, f"{path}: {unknown}"
    if "$ref" in schema:
        yield from violations(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, path)
    if "anyOf" in schema:
        tried = [list(violations(value, option, root, path)) for option in schema["anyOf"]]
        if all(tried):
            yield from max(tried, key=len)
    if "type" in schema:
        names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(isinstance(value, TYPES[name]) for name in names) or (
            isinstance(value, bool) != ("boolean" in names)
        ):
            yield f"{path}: type"
            return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{path}: enum"
    if isinstance(value, str) and "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{path}: pattern"
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not schema.get("minimum", value) <= value <= schema.get("maximum", value):
            yield f"{path}: range"
        if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
            yield f"{path}: range"
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{path}: size"
        for index, item in enumerate(value):
            yield from violations(item, schema.get("items", {}), root, f"{path}[{index}]")
    if isinstance(value, dict):
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
            yield f"{path}: size"
        yield from (f"{path}.{name}: required" for name in schema.get("required", ()) if name not in value)
        properties, other = schema.get("properties", {}), schema.get("additionalProperties", {})
        for name, item in value.items():
            if name in properties:
                yield from violations(item, properties[name], root, f"{path}.{name}")
            elif other is False:
                yield f"{path}.{name}: unknown"
            else:
                yield from violations(item, other, root, f"{path}.{name}")


def check(document: str) -> list[str]:
    schema: dict[str, Any] = json.loads(json.dumps(policy_schema()))
    return list(violations(yaml.safe_load(document), schema, schema))


def test_the_schema_is_written_as_json(run: Run) -> None:
    result = run("policy", "schema")
    assert (result.exit_code, result.stderr) == (0, "")
    schema = json.loads(result.stdout)
    assert schema == json.loads(json.dumps(policy_schema()))
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["required"] == ["service"]


@pytest.mark.parametrize("document", [samples.ORDERS, *EXAMPLES], ids=range(len(EXAMPLES) + 1))
def test_valid_policies_satisfy_the_schema(document: str) -> None:
    assert check(document) == []


def test_the_whole_default_policy_satisfies_the_schema() -> None:
    assert check(json.dumps(ServicePolicy(service="orders").dump())) == []


@pytest.mark.parametrize(
    ("document", "violation"),
    [
        ("timeout: 1s", ".service: required"),
        ("{service: a, timeuot: 1s}", ".timeuot: unknown"),
        ("{service: a, timeout: soon}", ".timeout: pattern"),
        ("{service: a, retry: {max_attempts: 11}}", ".retry.max_attempts: range"),
        ("{service: a, retry: {max_attempts: many}}", ".retry.max_attempts: type"),
        ("{service: a, retry: {retry_on: [BROKEN]}}", ".retry.retry_on[0]: enum"),
        ("{service: a, retry: {retry_on: []}}", ".retry.retry_on: size"),
        ("{service: a, load_balancer: {algorithm: FASTEST}}", ".load_balancer.algorithm: enum"),
        ("{service: a, load_balancer: {panic_threshold: 101}}", ".load_balancer.panic_threshold: range"),
        ("{service: a, routes: [{split: [{labels: {}}]}]}", ".routes[0].split[0].labels: size"),
        ("{service: a, rate_limits: [{requests_per_second: 0}]}", ".rate_limits[0].requests_per_second: range"),
        ("{service: a, routes: {}}", ".routes: type"),
        ("{service: a, authorization: [{callers: [b]}]}", ".authorization[0].methods: required"),
        ("{service: a, authorization: [{callers: [], methods: ['*']}]}", ".authorization[0].callers: size"),
        ("{service: a, authorization: [{callers: [B], methods: ['*']}]}", ".authorization[0].callers[0]: pattern"),
    ],
)
def test_an_editor_sees_what_the_control_plane_would_refuse(document: str, violation: str) -> None:
    assert check(document) == [violation]
    with pytest.raises(InvalidPolicyError):
        ServicePolicy.parse(yaml.safe_load(document))
