from __future__ import annotations

from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import allowed_methods as module
from gateway.allowed_methods import allowed_methods
from gateway.descriptors import Api, Method
from gateway.path_template import PathTemplate
from gateway.routes import Route, RouteTable, build
from tests.gateway.compiling import with_rules
from tests.gateway.templates import PATHS, templates

VERBS = st.sampled_from(["GET", "POST", "PUT"])


def table(bindings: list[tuple[str, PathTemplate]]) -> RouteTable:
    """As `gateway.routes.build` makes it, without an API."""
    method, api = cast("Method", None), cast("Api", None)
    routes = [Route(method, 0, verb, template, "", "") for verb, template in bindings]
    return RouteTable(api, tuple(sorted(routes, key=lambda route: (route.template.precedence, route.verb))))


def allowed(table: RouteTable, path: str) -> tuple[str, ...]:
    """By the first template of the list that matches."""
    return next((item.verbs for item in allowed_methods(table) if item.template.match(path) is not None), ())


@given(st.lists(st.tuples(VERBS, templates()), min_size=1, max_size=5), st.lists(PATHS, max_size=8))
def test_a_path_has_the_methods_by_which_the_table_matches_it(
    bindings: list[tuple[str, PathTemplate]], paths: list[str]
) -> None:
    made = table(bindings)
    for path in paths:
        if not path.startswith("/:"):  # a verb on nothing: what `**:go` and `*` both match, no template can say
            assert allowed(made, path) == tuple(
                sorted({verb for verb in ("GET", "POST", "PUT") if made.match(verb, path)})
            )


def test_templates_that_overlap_are_intersected() -> None:
    made = build(with_rules('get: "/a/{id}/c"', 'post: "/a/b/{id}"', 'put: "/a/{id=**}"', 'delete: "/a/{id}/c:go"'))
    assert allowed(made, "/a/b/c") == ("GET", "POST", "PUT")
    assert allowed(made, "/a/b/x") == ("POST", "PUT")
    assert allowed(made, "/a/x/c") == ("GET", "PUT")
    assert allowed(made, "/a/x/c:go") == ("DELETE", "PUT")
    assert allowed(made, "/a/b/c:go") == ("DELETE", "POST", "PUT")
    assert allowed(made, "/b") == ()


def test_intersections_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_SHAPES", 2)
    made = build(with_rules('get: "/a/{id}/c"', 'post: "/a/b/{id}"'))
    assert len(allowed_methods(made)) == 2
