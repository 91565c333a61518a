from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from hypothesis import given, settings

from mesh_cli.policy_actions import schema as schema_of
from mesh_cli.policy_kind import EDGE, SERVICE, PolicyKind
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.errors import InvalidPolicyError
from mesh_client.core.policy import ServicePolicy
from tests.cli import samples
from tests.cli.conftest import Run
from tests.cli.test_edge_reference import EXAMPLES as EDGE_EXAMPLES
from tests.cli.test_policy_reference import EXAMPLES
from tests.edge_policies import edge_policies

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
    unknown -= {"patternProperties", "propertyNames"}
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
        patterns = schema.get("patternProperties", {})
        for name, item in value.items():
            yield from violations(name, schema.get("propertyNames", {}), root, f"{path}.{name}")
            if matching := [part for pattern, part in patterns.items() if re.search(pattern, name)]:
                yield from violations(item, matching[0], root, f"{path}.{name}")
            elif name in properties:
                yield from violations(item, properties[name], root, f"{path}.{name}")
            elif other is False:
                yield f"{path}.{name}: unknown"
            else:
                yield from violations(item, other, root, f"{path}.{name}")


def check(document: str, kind: PolicyKind = SERVICE) -> list[str]:
    schema: dict[str, Any] = json.loads(json.dumps(schema_of(kind)))
    return list(violations(yaml.safe_load(document), schema, schema))


def test_the_schema_is_written_as_json(run: Run) -> None:
    result = run("policy", "schema")
    assert (result.exit_code, result.stderr) == (0, "")
    schema = json.loads(result.stdout)
    assert schema == json.loads(json.dumps(schema_of(SERVICE)))
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


def test_the_schema_of_edge_policies_is_written_as_json(run: Run) -> None:
    result = run("edge", "schema")
    assert json.loads(result.stdout) == json.loads(json.dumps(schema_of(EDGE)))


@pytest.mark.parametrize("document", EDGE_EXAMPLES, ids=range(len(EDGE_EXAMPLES)))
def test_valid_policies_of_edges_satisfy_their_schema(document: str) -> None:
    assert check(document, EDGE) == []


@settings(max_examples=30)  # policies of edges are large
@given(edge_policies)
def test_any_whole_policy_of_an_edge_satisfies_the_schema(policy: EdgePolicy) -> None:
    assert check(json.dumps(policy.dump()), EDGE) == []


@pytest.mark.parametrize(
    ("document", "violation"),
    [
        ("{service: orders}", ".service: unknown"),
        ("{services: {a.B: {}}}", ".services.a.B.upstream: required"),
        ("{services: {a/B: {upstream: b}}}", ".services.a/B: unknown"),
        ("{services: {a.B: {upstream: b, authentication: [basic]}}}", ".services.a.B.authentication[0]: enum"),
        ("{services: {a.B: {upstream: b, methods: {/A: {}}}}}", ".services.a.B.methods./A: unknown"),
        ("{services: {a.B: {upstream: b, timeout: soon}}}", ".services.a.B.timeout: pattern"),
        ("{consumers: {a: {api_keys: [../key]}}}", ".consumers.a.api_keys[0]: pattern"),
        ("{cors: {origins: []}}", ".cors.origins: size"),
    ],
)
def test_an_editor_sees_what_is_wrong_with_the_policy_of_an_edge(document: str, violation: str) -> None:
    assert check(document, EDGE) == [violation]
    with pytest.raises(InvalidPolicyError):
        EdgePolicy.parse(yaml.safe_load(document))
