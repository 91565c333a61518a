"""What Kong 3.9 does with the files that it is given, as far as it decides what a request becomes.

Its grpc-gateway makes a regular expression of each path in a proto by replacing variables, and takes the first that
matches; its router takes the route with the highest regex_priority.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

_VARIABLE = re.compile(r"{([-_.~0-9a-zA-Z]+)=?((?:(?:\*|\*\*|[-_.~0-9a-zA-Z])/?)+)?}")
_METHOD = re.compile(
    r'  rpc (\w+)\(\S+\) returns \(.*\) {\n    option .*{\n      (\w+): "(.*)"\n(?:      body: "(.*)"\n)?'
)


@dataclass(frozen=True)
class Binding:
    method: str
    verb: str
    regex: str
    names: tuple[str, ...]
    body: str | None


def to_regex(path: str) -> tuple[str, tuple[str, ...]]:
    """The expression that Kong makes of a path, and the names of its groups."""
    names: list[str] = []

    def group(match: re.Match[str]) -> str:
        names.append(match[1])
        pattern = match[2]
        if not pattern or pattern == "*":
            return "([^/]+)"
        return "(" + pattern.replace("**", ".+").replace("*", "[^/]+") + ")"

    return _VARIABLE.sub(group, path), tuple(names)


def bindings(proto: str) -> list[Binding]:
    """The bindings of a rendered proto in the order in which Kong tries them."""
    return [
        Binding(method, verb.upper(), *to_regex(path), body or None)
        for method, verb, path, body in _METHOD.findall(proto)
    ]


def transcode(found: Sequence[Binding], verb: str, path: str) -> tuple[Binding, dict[str, str]] | None:
    """The first binding that matches, with what it takes from the path."""
    for binding in found:
        if binding.verb == verb and (match := re.fullmatch(binding.regex, path)):
            return binding, dict(zip(binding.names, match.groups(), strict=True))
    return None


@dataclass(frozen=True)
class KongRoute:
    name: str
    verbs: tuple[str, ...]
    pattern: str


def http_routes(declarative: str) -> list[KongRoute]:
    """Routes of a ``kong.yml`` for HTTP, in the order in which Kong tries them."""
    found = [
        route
        for service in yaml.safe_load(declarative)["services"]
        for route in service["routes"]
        if "http" in route["protocols"]
    ]
    found.sort(key=lambda route: -route["regex_priority"])
    return [KongRoute(item["name"], tuple(item["methods"]), item["paths"][0].removeprefix("~")) for item in found]


def take(routes: Sequence[KongRoute], verb: str, path: str) -> str | None:
    """Name of the route that a request takes."""
    return next((item.name for item in routes if verb in item.verbs and re.match(item.pattern, path)), None)
