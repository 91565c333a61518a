"""Envoy's configuration as JSON: extensions with their types, and files of filesystem xDS with their versions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

Json = dict[str, object]

_TYPE = "type.googleapis.com/envoy."

LISTENER = "config.listener.v3.Listener"
ROUTES = "config.route.v3.RouteConfiguration"
CLUSTER = "config.cluster.v3.Cluster"
ENDPOINTS = "config.endpoint.v3.ClusterLoadAssignment"
SECRET = "extensions.transport_sockets.tls.v3.Secret"

ALWAYS: Json = {"default_value": {"numerator": 100, "denominator": "HUNDRED"}}
"""A fraction of requests: all of them."""


def typed(type_name: str, **config: object) -> Json:
    """Configuration of an extension, by the name of its type below ``envoy``."""
    return {"@type": _TYPE + type_name, **config}


def extension(name: str, type_name: str, **config: object) -> Json:
    """An extension with a name."""
    return {"name": name, "typed_config": typed(type_name, **config)}


@dataclass(frozen=True, slots=True)
class XdsFile:
    """One file of filesystem xDS."""

    text: str
    version: str
    """Changes with the resources, and with nothing else. Envoy shows it once it has applied them."""


def xds_file(type_name: str, resources: Iterable[Json]) -> XdsFile:
    """A discovery response with these resources, which are all of one type."""
    typed_resources = [typed(type_name, **resource) for resource in resources]
    version = hashlib.sha256(json.dumps(typed_resources, sort_keys=True).encode()).hexdigest()[:16]
    return XdsFile(
        write({"version_info": version, "type_url": _TYPE + type_name, "resources": typed_resources}), version
    )


def write(document: Json) -> str:
    """JSON as it is written to files, the same for the same document. In one line: indenting is ten times slower."""
    return json.dumps(document, ensure_ascii=False) + "\n"


def file_source(path: str) -> Json:
    """Where resources come from: a file, which is followed as it is replaced by renaming another one over it."""
    return {"path_config_source": {"path": path}, "resource_api_version": "V3"}


def cel_text(value: str) -> str:
    """A text in an expression of CEL that stands between ``%``: all that could mean something to either is escaped."""
    plain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-._~:/[], "
    return "'" + "".join(letter if letter in plain else f"\\U{ord(letter):08x}" for letter in value) + "'"


def socket_address(host: str, port: int) -> Json:
    """An address as Envoy has it."""
    return {"socket_address": {"address": host, "port_value": port}}
