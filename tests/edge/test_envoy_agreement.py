"""Envoy and the route table mean the same method by each path, and find the same values in it."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.descriptors import read
from gateway.envoy import EnvoyConfiguration, EnvoyRenderer
from gateway.path_template import PathTemplate
from gateway.routes import RouteTable, build
from mesh_client.core.edge_policy import EdgePolicy
from mesh_client.core.model import Endpoint
from tests.edge.envoy_process import EnvoyProcess, short_directory
from tests.gateway.compiling import HEADER, ROOT, compile_text
from tests.gateway.templates import templates

MESSAGES = """
message M { string f0 = 1; string f1 = 2; N m = 5; string method = 15; }
message N { string _f0 = 1; string _f1 = 2; }
"""
SEGMENTS = st.sampled_from(
    ["a", "b", "a.b", "axb", "v1", "$", "(a)", "a+b", "a:go", ":go", "", "%C3%BC", "a%20b", "..."]
)
PATHS = st.builds(
    lambda parts, verb: "/" + "/".join(parts) + verb,
    st.lists(SEGMENTS, max_size=5),
    st.sampled_from(["", ":go", ":b.c", "?"]),
)
VERBS = st.sampled_from(["GET", "DELETE"])
POLICY = EdgePolicy.parse({"services": {"t.v1.S": {"upstream": "methods"}}})


def has_no_escapes(template: PathTemplate) -> bool:
    """Envoy decodes paths: such literals are refused."""
    return not any("%" in segment for segment in template.segments if isinstance(segment, str))


def table_of(bindings: list[tuple[str, PathTemplate]]) -> RouteTable:
    known = {(verb, template.shape): (verb, template) for verb, template in bindings}
    methods = " ".join(
        f'rpc M{index}(M) returns (M) {{ option (google.api.http) = {{{verb.lower()}: "{template}"}}; }}'
        for index, (verb, template) in enumerate(known.values())
    )
    return build(read([compile_text({"t.proto": f"{HEADER} service S {{ {methods} }} {MESSAGES}"})]))


@dataclass(frozen=True)
class Rig:
    envoy: EnvoyProcess
    endpoint: Endpoint

    def render(self, table: RouteTable) -> EnvoyConfiguration:
        endpoints = {"methods": [self.endpoint]}
        return EnvoyRenderer(table, POLICY, self.envoy.settings, api_keys={}, openapi="{}").render(endpoints)


@pytest.fixture(scope="module")
def methods() -> Iterator[Rig]:
    command = [sys.executable, "-m", "tests.edge.method_server"]
    with (
        short_directory() as directory,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        envoy = EnvoyProcess(directory)
        with contextlib.ExitStack() as stack:
            stack.callback(process.stdin.close)
            stack.callback(envoy.stop)
            rig = Rig(envoy, Endpoint("one", "127.0.0.1", int(process.stdout.readline())))
            envoy.start(rig.render(table_of([])))
            yield rig


def expected(table: RouteTable, verb: str, path: str) -> tuple[int, object]:
    """Status, and the method with the values in the path, or the methods that are allowed."""
    clean = re.sub("/+", "/", path.removesuffix("?"))
    match = table.match(verb, clean)
    if match is None:
        allowed = sorted({route.verb for route in table.routes if route.template.match(clean) is not None})
        return (405, ", ".join(allowed)) if allowed else (404, None)
    route, values = match
    message: dict[str, object] = {}
    for name, value in values.items():
        field, _, inner = name.partition(".")
        if value:
            text = unquote(value)
            message |= {"m": {inner.replace("_f", "F"): text}} if inner else {field: text}
    return 200, {**message, "method": route.method.name}


def asked(connection: http.client.HTTPConnection, verb: str, path: str) -> tuple[int, object]:
    connection.request(verb, path)
    response = connection.getresponse()
    body = _without_empty(json.loads(response.read()))
    return response.status, {200: body, 405: response.getheader("allow")}.get(response.status)


def _without_empty(value: object) -> object:
    """The transcoder says some strings although they are empty, and this server says them back."""
    if not isinstance(value, dict):
        return value
    pruned = {name: _without_empty(inner) for name, inner in value.items()}
    return {name: inner for name, inner in pruned.items() if inner not in ("", {})}


@settings(max_examples=25)
@given(
    bindings=st.lists(st.tuples(VERBS, templates().filter(has_no_escapes)), min_size=1, max_size=12),
    paths=st.lists(st.tuples(VERBS, PATHS), min_size=20, max_size=40),
)
def test_envoy_and_the_table_agree(
    methods: Rig, bindings: list[tuple[str, PathTemplate]], paths: list[tuple[str, str]]
) -> None:
    table = table_of(bindings)
    methods.envoy.apply(methods.render(table))
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", methods.envoy.port, timeout=10)) as connection:
        for verb, path in paths:
            routes = [f"{route} {route.method.name}" for route in table.routes]
            assert asked(connection, verb, path) == expected(table, verb, path), (verb, path, routes)
