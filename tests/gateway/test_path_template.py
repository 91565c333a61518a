from __future__ import annotations

import re
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.path_template import PathTemplate, TemplateError, Variable, Wildcard, parse
from tests.gateway.templates import PATHS, naive_match, templates


def test_a_template_is_taken_apart() -> None:
    assert parse("/v1/{book.name=shelves/*/**}:burn") == PathTemplate(
        ("v1", "shelves", Wildcard.ONE, Wildcard.MANY), (Variable(("book", "name"), 1, 4),), "burn"
    )


@given(templates())
def test_what_is_written_is_read_again(template: PathTemplate) -> None:
    assert parse(str(template)) == template


@given(st.text("/{}=*:a.%", max_size=12))
def test_any_text_is_a_template_or_an_error_that_quotes_it(text: str) -> None:
    error = None
    try:
        template = parse(text)
    except TemplateError as raised:
        error = str(raised)
    else:
        assert parse(str(template)) == template
    assert error is None or repr(text) in error


@given(templates(), PATHS)
def test_matching_agrees_with_plain_words(template: PathTemplate, path: str) -> None:
    assert template.match(path) == naive_match(template, path)


@given(templates(), PATHS)
def test_the_regular_expression_matches_what_the_template_matches(template: PathTemplate, path: str) -> None:
    assert (re.fullmatch(template.regex(), path) is not None) == (template.match(path) is not None)


@given(templates(), st.data())
def test_paths_that_are_made_to_match_do(template: PathTemplate, data: st.DataObject) -> None:
    parts = []
    for segment in template.segments:
        if segment is Wildcard.MANY:
            parts += data.draw(st.lists(st.sampled_from(["a", "b:go"]), max_size=3))
        else:
            parts.append(data.draw(st.sampled_from(["a", "%2F", "a:go"])) if isinstance(segment, Wildcard) else segment)
    path = "/" + "/".join(parts) + (f":{template.verb}" if template.verb else "")
    found = template.match(path)
    assert found is not None
    assert re.fullmatch(template.regex(), path)
    assert set(found) == {variable.name for variable in template.variables}


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("/v1/a/b/c", {"name": "a", "rest": "b/c"}),
        ("/v1/a%2Fb", {"name": "a%2Fb", "rest": ""}),
        ("/v1/", None),
        ("/v1/a/", None),
        ("v1/a", None),
    ],
)
def test_values_are_parts_of_the_path_as_they_stand(path: str, values: dict[str, str] | None) -> None:
    assert parse("/v1/{name}/{rest=**}").match(path) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "character 1: must begin with a slash"),
        ("v1", "character 1: must begin with a slash"),
        ("/", "character 2: expected *, **, {field} or a literal"),
        ("/v1/", "character 5: expected *, **"),
        ("/v1//a", "character 5: expected *, **"),
        ("/{}", "character 3: expected a field's name"),
        ("/{a.}", "character 5: expected a field's name"),
        ("/{a", "character 4: expected }"),
        ("/{a={b}}", "character 6: a variable cannot hold another one"),
        ("/a:", "character 4: expected a verb"),
        ("/a:b/c", "character 5: expected a slash, a colon or the end"),
        ("/a?b", "character 3: expected a slash, a colon or the end"),
        ("/**/a", "** is only allowed as the last segment"),
        ("/{a=**}/b", "** is only allowed as the last segment"),
        ("/{a}/{a}", "{a} is there twice"),
        ("/a%2", "character 3: expected a slash"),
    ],
)
def test_a_bad_template_is_an_error_that_says_where(text: str, message: str) -> None:
    with pytest.raises(TemplateError) as caught:
        parse(text)
    assert message in str(caught.value)


def test_the_order_of_precedence() -> None:
    texts = ["/a/{b}:go", "/a/b", "/a/{b}", "/a/{b=**}", "/{a}/b", "/{a=**}"]
    declared = texts[::-1]
    assert sorted(declared, key=lambda text: parse(text).precedence) == texts


@given(st.lists(templates(), min_size=2, max_size=6), st.randoms())
def test_precedence_does_not_depend_on_the_order_of_declaration(declared: list[PathTemplate], random: Random) -> None:
    ordered = sorted(declared, key=lambda template: template.precedence)
    random.shuffle(declared)
    again = sorted(declared, key=lambda template: template.precedence)
    assert list(map(str, again)) == list(map(str, ordered))
