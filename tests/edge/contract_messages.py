"""The rows of the contract about paths, queries and bodies: what becomes of them in messages."""

from __future__ import annotations

import json

from tests.edge.contract_rows import NO_405, UNMEASURED, Answer, Difference, Row, echo, refused

MAX_BODY = 4_096
"""Bytes."""
_REPEATED = "%s is set by the path; leave it out of the body"

PATHS = (
    Row("path", "GET", "/v1/echo/a", echo(name="a")),
    Row(
        "percent-encoding in the path",
        "GET",
        "/v1/echo/a%20%C3%BC",
        echo(name="a ü"),
        kong=Difference("percent-encoding in the path is not decoded", echo(name="a%20%C3%BC")),
    ),
    Row("literal before variable", "GET", "/v1/echo/latest", Answer(body={"latest": True})),
    Row("pattern in a variable", "GET", "/v1/deep/echoes/a/parts/b", echo(name="echoes/a/parts/b")),
    Row("many segments", "GET", "/v1/files/a/b/c", echo(name="a/b/c")),
    Row("many segments, none", "GET", "/v1/files", echo()),
    Row("custom verb", "GET", "/v1/echo/a:loud", echo(name="a")),
    Row("colon that is no verb", "GET", "/v1/echo/a:quiet", echo(name="a:quiet")),
    Row("verb of another path", "GET", "/v1/files/a:loud", echo(name="a:loud")),
    Row("custom verb without a body", "POST", "/v1/echo/a:remove", Answer(body={})),
    Row("additional binding with a body", "POST", "/v1/echo/a", echo(name="a", tags=["x"]), body='{"tags": ["x"]}'),
    Row("delete", "DELETE", "/v1/echo/a", Answer(body={})),
    Row(
        "variable within a message",
        "GET",
        "/v1/nested/a",
        echo(inner={"text": "a"}),
        kong=Difference("refused by `mesh gateway lint` (nested-path)"),
    ),
    Row("unknown path", "GET", "/v1/nowhere", refused(404, 5)),
    Row("unknown path below a known one", "GET", "/v1/echo/a/b", refused(404, 5)),
    Row("empty segment at the end", "GET", "/v1/echo/", refused(404, 5)),
    Row(
        "wrong method",
        "PATCH",
        "/v1/echo/a",
        refused(405, 12, "this path has the methods DELETE, GET, POST", allow="DELETE, GET, POST"),
        kong=Difference(NO_405, refused(404, 5)),
    ),
    Row(
        "slash in a variable, encoded",
        "GET",
        "/v1/echo/a%2Fb",
        refused(400, 3),
        kong=Difference(f"`%2F`, `%5C` and `%00` in paths are not refused; {UNMEASURED} what becomes of them"),
    ),
)
NO_TEXT = (
    *(
        Row(
            f"escapes that are no text, {path}",
            "GET",
            path,
            refused(400, 3, "what is escaped by % in the path or query is not UTF-8"),
            kong=Difference(f"escapes that are not UTF-8, or no escapes: {UNMEASURED}"),
        )
        for path in (
            *("/v1/echo/%ff", "/v1/echo/%C0%AF", "/v1/echo/a%zz", "/v1/echo/a%", "/v1/echo/%ed%a0%80"),
            *("/v1/echo/a?tags=%ff", "/v1/echo/a?tags=%", "/v1/echo/a?tags=x%2", "/v1/nowhere/%ff"),
        )
    ),
    Row(
        "escapes that are text",
        "GET",
        "/v1/echo/a?inner.text=%F0%9F%98%80%20%2525",
        echo(name="a", inner={"text": "😀 %25"}),
    ),
)
QUERIES = (
    Row("query", "GET", "/v1/echo/a?fraction=1.5", echo(name="a", fraction=1.5)),
    Row("repeated", "GET", "/v1/echo/a?tags=x&tags=y", echo(name="a", tags=["x", "y"])),
    Row(
        "repeated, once",
        "GET",
        "/v1/echo/a?tags=x",
        echo(name="a", tags=["x"]),
        kong=Difference("a repeated parameter that comes once is 400", refused(400, 3)),
    ),
    Row("enum", "GET", "/v1/echo/a?color=COLOR_RED", echo(name="a", color="COLOR_RED")),
    Row(
        "repeated enum",
        "GET",
        "/v1/echo/a?colors=COLOR_RED&colors=COLOR_GREEN",
        echo(name="a", colors=["COLOR_RED", "COLOR_GREEN"]),
    ),
    Row(
        "enum by number",
        "GET",
        "/v1/echo/a?color=2",
        echo(name="a", color="COLOR_GREEN"),
        kong=Difference(f"an enum by its number: {UNMEASURED}"),
    ),
    Row(
        "enum that is none",
        "GET",
        "/v1/echo/a?color=COLOR_BLUE",
        refused(400, 3),
        kong=Difference(f"an unknown name of an enum: {UNMEASURED}"),
    ),
    Row("nested", "GET", "/v1/echo/a?inner.text=t&inner.number=3", echo(name="a", inner={"text": "t", "number": 3})),
    Row("flag", "GET", "/v1/echo/a?flag=true", echo(name="a", flag=True)),
    Row(
        "single value, twice",
        "GET",
        "/v1/echo/a?inner.number=1&inner.number=2",
        echo(name="a", inner={"number": 2}),
        kong=Difference(f"a parameter of a single value that comes twice: {UNMEASURED}"),
    ),
    Row(
        "flag that is not set",
        "GET",
        "/v1/echo/a?flag=false",
        echo(name="a"),
        kong=Difference(f"`false` in the query may be taken for true; {UNMEASURED}"),
    ),
    Row(
        "number of 64 bits",
        "GET",
        "/v1/echo/a?big=5",
        echo(name="a", big="5"),
        kong=Difference("numbers of 64 bits are JSON numbers, and lose digits beyond 2^53", echo(name="a", big=5)),
    ),
    Row(
        "number of 64 bits with all its digits",
        "GET",
        "/v1/echo/a?big=9007199254740993",
        echo(name="a", big="9007199254740993"),
        kong=Difference("numbers of 64 bits are JSON numbers, and lose digits beyond 2^53"),
    ),
    Row(
        "timestamp",
        "GET",
        "/v1/echo/a?at=2024-01-02T03:04:05.5Z",
        echo(name="a", at="2024-01-02T03:04:05.500Z"),
        kong=Difference("timestamps in queries are not understood; answers have them without Z and fractions"),
    ),
    Row(
        "number that is none",
        "GET",
        "/v1/echo/a?inner.number=x",
        refused(400, 3),
        kong=Difference(f"text where a number belongs: {UNMEASURED}"),
    ),
    Row(
        "unknown parameter",
        "GET",
        "/v1/echo/a?colour=red",
        refused(400, 3),
        kong=Difference("unknown parameters are ignored", echo(name="a")),
    ),
    Row("parameter that the path has", "GET", "/v1/echo/a?name=b", refused(400, 3)),
    Row("parameter that the path has, after another", "GET", "/v1/echo/a?flag=true&name=b", refused(400, 3)),
    Row(
        "parameter that the path has, encoded",
        "GET",
        "/v1/echo/a?%6e%61me=b",
        refused(400, 3),
    ),
    Row(
        "parameter that the path has, beside a body",
        "POST",
        "/v1/echo/a?name=b",
        refused(400, 3),
        body="{}",
        kong=Difference("the query of a method with a body is ignored", echo(name="a")),
    ),
)
BODIES = (
    Row(
        "body",
        "POST",
        "/v1/echo/a",
        echo(
            name="a",
            color="COLOR_RED",
            inner={"text": "t", "color": "COLOR_GREEN", "words": ["x", "y"]},
            inners=[{"text": "1"}, {"number": 2}],
            labels={"k": "v"},
            flag=True,
            fraction=0.25,
        ),
        body=json.dumps(
            {
                "color": "COLOR_RED",
                "inner": {"text": "t", "color": "COLOR_GREEN", "words": ["x", "y"]},
                "inners": [{"text": "1"}, {"number": 2}],
                "labels": {"k": "v"},
                "flag": True,
                "fraction": 0.25,
            }
        ),
    ),
    Row("no body", "POST", "/v1/echo/a", echo(name="a")),
    Row(
        "body that is said to be no JSON",
        "POST",
        "/v1/echo/a",
        echo(name="a", tags=["x"]),
        body='{"tags": ["x"]}',
        headers={"content-type": "text/plain"},
        kong=Difference(f"JSON of another content type: {UNMEASURED}"),
    ),
    Row("body that is one field", "PUT", "/v1/echo/a/inner", echo(name="a", inner={"text": "t"}), body='{"text": "t"}'),
    Row(
        "query beside a body",
        "PUT",
        "/v1/echo/a/inner?color=COLOR_RED",
        echo(name="a", color="COLOR_RED", inner={"text": "t"}),
        body='{"text": "t"}',
        kong=Difference("the query of a method with a body is ignored", echo(name="a", inner={"text": "t"})),
    ),
    Row(
        "query beside a whole body",
        "POST",
        "/v1/echo/a?color=COLOR_RED",
        echo(name="a", color="COLOR_RED"),
        body="{}",
        kong=Difference("the query of a method with a body is ignored", echo(name="a")),
    ),
    Row("field that is unknown", "POST", "/v1/echo/a", echo(name="a"), body='{"unknown": 1}'),
    Row(
        "body that contradicts a path within a message",
        "POST",
        "/v1/nested/a",
        refused(400, 3),
        body='{"inner": {"text": "b"}}',
        kong=Difference("refused by `mesh gateway lint` (nested-path)"),
    ),
    Row(
        "number of 64 bits in a body",
        "POST",
        "/v1/echo/a",
        echo(name="a", big="9007199254740993"),
        body='{"big": "9007199254740993"}',
        kong=Difference("numbers of 64 bits are JSON numbers, and lose digits beyond 2^53"),
    ),
    Row(
        "timestamp in a body",
        "POST",
        "/v1/echo/a",
        echo(name="a", at="2024-01-02T03:04:05Z"),
        body='{"at": "2024-01-02T03:04:05Z"}',
        kong=Difference("timestamps in requests are objects with seconds, by Kong's code; not measured"),
    ),
    Row(
        "null",
        "POST",
        "/v1/echo/a",
        echo(name="a"),
        body='{"color": null}',
        kong=Difference("null in a body is 400", refused(400, 3)),
    ),
    Row("bad JSON", "POST", "/v1/echo/a", refused(400, 3), body='{"tags": ['),
    Row("JSON that is no object", "POST", "/v1/echo/a", refused(400, 3), body='["x"]'),
    *(
        Row(f"body that {what}", "POST", "/v1/echo/a", refused(400, 3, _REPEATED % "name"), body=body)
        for what, body in (
            ("contradicts the path", '{"name": "b"}'),
            ("repeats the path", '{"tags": ["x"], "name": "a"}'),
            ("repeats the path, then contradicts it", '{"name": "a", "name": "b"}'),
            ("contradicts the path, by an escaped name", r'{"\u006eame": "b"}'),
            ("says null where the path says something", '{"name": null}'),
        )
    ),
    *(
        Row(f"body that {what}", "POST", "/v1/long/a", refused(400, 3, _REPEATED % "long_name"), body=body)
        for what, body in (
            ("contradicts the path, by the name in JSON", '{"longName": "b"}'),
            ("contradicts the path, by the name in the proto", '{"long_name": "b"}'),
            ("repeats the path, then contradicts it by its other name", '{"long_name": "a", "longName": "b"}'),
        )
    ),
    Row(
        "body that repeats a path within a message, then contradicts it",
        "POST",
        "/v1/nested/a",
        refused(400, 3),
        body='{"inner": {"text": "a"}, "inner": {"text": "b"}}',
        kong=Difference("refused by `mesh gateway lint` (nested-path)"),
    ),
    Row(
        "body that has the name of what the path says elsewhere",
        "POST",
        "/v1/echo/a",
        echo(name="a", inner={"text": "t"}, labels={"name": "b"}, tags=["name"]),
        body='{"inner": {"name": "b", "text": "t"}, "labels": {"name": "b"}, "tags": ["name"]}',
    ),
    Row("names without quotes", "POST", "/v1/echo/a", refused(400, 3), body='{name: "b"}'),
    Row("names in single quotes", "POST", "/v1/echo/a", refused(400, 3), body="{'name': 'b'}"),
    *(
        Row(f"body where there is none, {verb} {path}", verb, path, refused(413, 3), body=body)
        for verb, path, body in (
            ("GET", "/v1/echo/a", '{"name": "a", "name": "b"}'),
            ("DELETE", "/v1/echo/a", '{"name": "a", "name": "b"}'),
            ("GET", "/v1/count/1", '{"to": 3}'),
            ("GET", "/v1/metadata", "{}"),
        )
    ),
    Row("oversized body", "POST", "/v1/echo/a", refused(413, 3), body=json.dumps({"tags": ["x" * MAX_BODY]})),
    Row(
        "many requests",
        "POST",
        "/v1/sum",
        Answer(body={"number": 3}),
        body='[{"to": 1}, {"to": 2}]',
        kong=Difference("refused by `mesh gateway lint` (client-streaming)"),
    ),
)
