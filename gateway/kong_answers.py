"""What Kong's admin API says, in words that may be logged: it repeats what it was sent, keys included. Pure."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Iterable, Iterator

from gateway.redaction import fit_for_logs

EMPTY_HASH = "0" * 32
"""Configuration hash of a Kong that has no configuration, as after a start."""


def refusal(body: bytes, secrets: Iterable[str] = ()) -> str:
    """Why Kong refused a configuration: each field with what is wrong with it, else Kong's message.

    Args:
        body: of the answer.
        secrets: what must not be repeated.
    """
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return fit_for_logs(body.decode(errors="replace").strip(), secrets) or "no reason given"
    if not isinstance(answer, dict):
        return fit_for_logs(json.dumps(answer), secrets)
    found = [f"{path}: {message}" for path, message in _messages(answer.get("fields"), "")]
    return fit_for_logs("; ".join(found) or str(answer.get("message") or "no reason given"), secrets)


def _messages(node: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _messages(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _messages(value, f"{path}[{index}]")
    elif node is not None:
        yield path, str(node)


def configuration_hash(body: bytes) -> str:
    """The hash of the configuration that Kong has, from ``GET /status``; empty when it says none."""
    try:
        found = json.loads(body)["configuration_hash"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""


def targets(body: bytes) -> tuple[frozenset[str], str]:
    """The targets of a page of ``GET /upstreams/{name}/targets``, as ``host:port``, and the path of the next page.

    Raises:
        ValueError: the answer has another form.
    """
    try:
        answer = json.loads(body)
        found = frozenset(same_target(str(item["target"])) for item in answer["data"] if item.get("weight") != 0)
        following = answer.get("next")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"targets are not of the expected form: {type(error).__name__}") from None
    return found, following if isinstance(following, str) else ""


def same_target(text: str) -> str:
    """A target as it is compared: Kong writes out IPv6 addresses in full."""
    host, _, port = text.rpartition(":")
    try:
        return f"{ipaddress.ip_address(host.strip('[]')).exploded}:{port}"
    except ValueError:
        return f"{host.lower()}:{port}"
