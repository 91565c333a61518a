"""A running Kong, given the contract's configuration: which one is said by variables of the environment."""

from __future__ import annotations

import contextlib
import json
import os
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gateway.kong import KongConfiguration, render
from gateway.openapi import render as render_openapi
from gateway.routes import build
from gateway.settings import parse_settings
from mesh_client.core.edge_policy import EdgePolicy
from tests.edge import contract
from tests.edge.contract_rig import contract_api, contract_server

NEEDED = ("KONG_PROXY", "KONG_ADMIN", "KONG_PROTOS")


@dataclass(frozen=True)
class KongAddresses:
    """Where a Kong is, and where it is told things."""

    proxy: tuple[str, int]
    admin: str
    """URL of its admin API."""
    protos: Path
    """A directory here that the Kong has as `proto_directory`."""
    proto_directory: str
    upstream_host: str
    """This host, as the Kong reaches it."""

    @classmethod
    def from_environment(cls) -> KongAddresses | None:
        """None if no Kong is named.

        Raises:
            ValueError: one is named in part, or KONG_PROXY is no URL with a host.
        """
        given = {name: os.environ.get(name, "") for name in NEEDED}
        if not any(given.values()):
            return None
        if missing := [name for name, value in given.items() if not value]:
            raise ValueError(f"{', '.join(missing)} is not set")
        proxy = urlsplit(given["KONG_PROXY"])
        if proxy.hostname is None:
            raise ValueError(f"KONG_PROXY is {given['KONG_PROXY']!r}; expected http://host:port")
        return cls(
            (proxy.hostname, proxy.port or 80),
            given["KONG_ADMIN"].rstrip("/"),
            Path(given["KONG_PROTOS"]),
            os.environ.get("KONG_PROTO_DIRECTORY", "/usr/local/kong/protos"),
            os.environ.get("KONG_UPSTREAM_HOST", "127.0.0.1"),
        )


def kong_configuration(target: str, proto_directory: str = "/usr/local/kong/protos") -> KongConfiguration:
    """The contract's configuration, with API keys in place of references to a vault, which the test cannot fill."""
    policy = EdgePolicy.parse(contract.kong_policy())
    table = build(contract_api(), policy.services)
    settings = parse_settings(
        {
            "upstreams": {"contract": {"targets": [{"address": target}]}, "gone": {}},
            "proto_directory": proto_directory,
        }
    )
    document = json.dumps(render_openapi(table, title="Contract", version="1", policy=policy))
    made = render(table, policy, settings.upstreams, settings, document)
    declarative = made.declarative
    for name, value in contract.KEYS.items():
        declarative = declarative.replace(f"{{vault://env/{name}}}", value)
    return KongConfiguration(declarative, made.protos, made.warnings)


@contextlib.contextmanager
def kong_rig(kong: KongAddresses) -> Iterator[tuple[str, int]]:
    """Where a Kong serves the contract, for the length of the block."""
    listen = "127.0.0.1" if kong.upstream_host in {"127.0.0.1", "localhost"} else "0.0.0.0"
    with contract_server(listen) as port:
        made = kong_configuration(f"{kong.upstream_host}:{port}", kong.proto_directory)
        for proto in made.protos:
            fresh = kong.protos / f".{proto.file_name}"
            fresh.write_text(proto.text)
            fresh.chmod(0o644)
            fresh.replace(kong.protos / proto.file_name)
        request = urllib.request.Request(
            f"{kong.admin}/config?check_hash=1",
            data=json.dumps({"config": made.declarative}).encode(),
            headers={"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status in {200, 201}, answer.status
        yield kong.proxy
