"""Whether a process traces and where its spans go, by the environment: OpenTelemetry's variables, and one of ours.

Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ and
https://opentelemetry.io/docs/specs/otel/protocol/exporter/.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from mesh_client.core.errors import ConfigError

SWITCH = "MESH_TRACING"
EXPORTERS = "OTEL_TRACES_EXPORTER"
DISABLED = "OTEL_SDK_DISABLED"
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SERVICE_NAME, RESOURCE = "OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES"
DELAY, QUEUE, BATCH = "OTEL_BSP_SCHEDULE_DELAY", "OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE"

DEFAULT_DELAY, DEFAULT_QUEUE, DEFAULT_BATCH = 1.0, 2_048, 256

_ON, _OFF = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})
_NONE, _OTLP, _MESH, _CONSOLE = "none", "otlp", "mesh", "console"


class Destination(enum.Enum):
    """Where spans go."""

    CONTROL_PLANE = "mesh"
    OTLP_GRPC = "otlp over gRPC"
    OTLP_HTTP = "otlp over HTTP"
    CONSOLE = "console"


@dataclass(frozen=True, slots=True)
class TracePlan:
    """What the environment asks for.

    Attributes:
        destinations: where spans go; at least one.
        by_name: tracing was asked for by `SWITCH`, and not by variables that may be there for other programs.
        names_service: the environment says what the service is called.
        names_instance: likewise, this process among those of its service.
        delay: seconds for which spans are gathered before they are sent to the control plane.
        queue: spans that wait to be sent to it at most.
        batch: spans of one request to it at most.
    """

    destinations: tuple[Destination, ...]
    by_name: bool = False
    names_service: bool = False
    names_instance: bool = False
    delay: float = DEFAULT_DELAY
    queue: int = DEFAULT_QUEUE
    batch: int = DEFAULT_BATCH


def plan_tracing(environ: Mapping[str, str], *, asked: bool = False) -> TracePlan | None:
    """What the environment asks for; None for no tracing, which is what an empty one asks for.

    Args:
        environ: the environment.
        asked: somebody asks for it who is not the environment.

    Raises:
        ConfigError: a variable is wrong; the message names it.
    """
    switch = _switch(environ)
    disabled = environ.get(DISABLED, "").strip().lower() == "true"
    named = [name for name in (each.strip().lower() for each in environ.get(EXPORTERS, "").split(",")) if name]
    endpoint = any(environ.get(name) for name in ENDPOINTS)
    if switch is False or disabled or named == [_NONE]:
        return None
    if not (asked or switch or named or endpoint):
        return None
    destinations = dict.fromkeys(_destination(name, environ, endpoint=endpoint) for name in named or [_OTLP])
    queue = _number(environ, QUEUE, DEFAULT_QUEUE, 1)
    batch = _number(environ, BATCH, min(DEFAULT_BATCH, queue), 1)
    return TracePlan(
        tuple(destinations),
        by_name=bool(asked or switch),
        names_service=bool(environ.get(SERVICE_NAME)) or "service.name=" in environ.get(RESOURCE, ""),
        names_instance="service.instance.id=" in environ.get(RESOURCE, ""),
        delay=_number(environ, DELAY, round(DEFAULT_DELAY * 1000), 0) / 1000,
        queue=queue,
        batch=min(batch, queue),
    )


def _destination(name: str, environ: Mapping[str, str], *, endpoint: bool) -> Destination:
    if name == _MESH or (name == _OTLP and not endpoint):
        return Destination.CONTROL_PLANE
    if name == _CONSOLE:
        return Destination.CONSOLE
    if name != _OTLP:
        raise ConfigError(f"{EXPORTERS}: {name!r} is not allowed; expected otlp, mesh, console or none")
    variable = next((each for each in PROTOCOLS if environ.get(each)), PROTOCOLS[0])
    protocol = environ.get(variable, "").strip() or "grpc"
    if protocol not in {"grpc", "http/protobuf"}:
        raise ConfigError(f"{variable}: {protocol!r} is not allowed; expected grpc or http/protobuf")
    return Destination.OTLP_GRPC if protocol == "grpc" else Destination.OTLP_HTTP


def _switch(environ: Mapping[str, str]) -> bool | None:
    text = environ.get(SWITCH, "").strip().lower()
    if text and text not in _ON | _OFF:
        raise ConfigError(f"{SWITCH}: {text!r} is not allowed; expected 1 or 0")
    return text in _ON if text else None


def _number(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise ConfigError(f"{name}: {text!r} is not allowed; expected a whole number, {least} or more")
    return int(text)
