"""Gathers the facts that checks decide on. Nothing is decided here, and nothing changed."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import platform
import re
import resource
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
from mesh.v1 import admin_pb2, authority_pb2, operations_pb2

from mesh_cli.check.facts import PRIVATE, WRITABLE, FileFact, HostFacts, OperatorFacts, PlaneFacts, PortFact
from mesh_cli.client import AdminClient, RefusedError
from mesh_cli.credentials import KEY_FILE, OperatorCredentials
from mesh_client.core.errors import ConfigError, MeshError

PAUSE = 1.0
"""Seconds after which those who were behind are looked at again: everybody is for a moment after a change."""

_RELEVANT = re.compile(r"(?i)(?:MESH|CONSUL|GRPC|PYTHON|PROTOCOL_BUFFERS)_?\w*|(?:http|https|all|no)_proxy")
_SECRET = re.compile(r"(?i)_TOKEN$|_KEY$|PASSWORD|SECRET")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*([^;]*)")
_SECRETS_OF_DATA = ("ca/authority.json", "identity.sqlite", "registry.sqlite", "operator-drains.json")

Answer = TypeVar("Answer")


def host_facts(
    addresses: Sequence[str],
    operator: Path | None,
    data_dir: Path,
    listen: Sequence[str] = (),
    environment: Mapping[str, str] = os.environ,
) -> HostFacts:
    """This host and process.

    Args:
        addresses: control planes that are named.
        operator: where the operator's credentials are; None where none are used.
        data_dir: of a control plane on this host, whether there is one or not.
        listen: addresses to look at whether they are free.
        environment: variables.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    bounds = dict(_requirements())
    return HostFacts(
        environment={
            name: "(set)" if _SECRET.search(name) and value else value
            for name, value in environment.items()
            if _RELEVANT.fullmatch(name)
        },
        files=tuple(_files(operator, data_dir, environment)),
        user=os.geteuid(),
        python=platform.python_version(),
        packages={name: _version(name) for name in bounds},
        bounds=bounds,
        version=importlib.metadata.version("grpc-mesh"),
        open_files=0 if soft == resource.RLIM_INFINITY else soft,
        open_files_hard=0 if hard == resource.RLIM_INFINITY else hard,
        ports=tuple(PortFact(address, _port_problem(address)) for address in listen),
        free_bytes=_free(data_dir),
        unresolved=dict(_unresolved(addresses)),
    )


def operator_facts(directory: Path, *, insecure: bool) -> tuple[OperatorFacts, OperatorCredentials | None]:
    """Who runs the command, and their credentials; None where there are none."""
    if insecure:
        return OperatorFacts(insecure=True), None
    try:
        credentials = OperatorCredentials.load(directory)
    except ConfigError as error:
        return OperatorFacts(problem=str(error)), None
    credential = credentials.credential
    validity = credential.validity
    return OperatorFacts(name=credential.principal.name, expires=validity.not_after, life=validity.life), credentials


def plane_facts(clients: Sequence[AdminClient]) -> tuple[PlaneFacts, ...]:
    """What each control plane says, all of them asked at once."""
    with ThreadPoolExecutor(max(1, len(clients))) as threads:
        return tuple(threads.map(_plane, clients))


def _plane(client: AdminClient) -> PlaneFacts:
    address = client.address
    try:
        status = client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest())
        asked = time.time()
        diagnosis = _unless(
            grpc.StatusCode.UNIMPLEMENTED,  # of a version that does not know it
            lambda: client.call(client.operations.GetDiagnosis, operations_pb2.GetDiagnosisRequest()),
        )
        answered = time.time()
        processes = _unless(
            grpc.StatusCode.UNIMPLEMENTED,  # of a version that does not know it
            lambda: client.call(client.operations.ListProcesses, operations_pb2.ListProcessesRequest()),
        )
        authority = None
        if status.trust_domain:
            question = authority_pb2.GetCertificateAuthorityRequest()
            authority = client.call(client.authority.GetCertificateAuthority, question)
        policies = _unless(
            grpc.StatusCode.UNAVAILABLE,  # the store, not the control plane
            lambda: client.call(client.stub.ListPolicies, admin_pb2.ListPoliciesRequest()),
        )
        later = None
        if _anybody_behind(status):
            time.sleep(PAUSE)
            later = client.call(client.stub.GetStatus, admin_pb2.GetStatusRequest())
    except MeshError as error:
        return PlaneFacts(address, problem=str(error))
    return PlaneFacts(
        address,
        status=status,
        later=later,
        diagnosis=diagnosis,
        authority=authority,
        policies=None if policies is None else tuple(policies.policies),
        processes=() if processes is None else tuple(processes.processes),
        asked=asked,
        answered=answered,
    )


def _unless(code: grpc.StatusCode, ask: Callable[[], Answer]) -> Answer | None:
    """The answer; None for a refusal with this code."""
    try:
        return ask()
    except RefusedError as error:
        if error.code is code:
            return None
        raise


def _anybody_behind(status: admin_pb2.GetStatusResponse) -> bool:
    return any(
        each.acknowledged_version != each.current_version for client in status.clients for each in client.subscriptions
    )


def _requirements() -> Iterator[tuple[str, str]]:
    """What grpc-mesh needs without any extra, as its metadata says it."""
    for requirement in importlib.metadata.requires("grpc-mesh") or ():
        match = _REQUIREMENT.match(requirement)
        if match is not None and "extra ==" not in requirement:
            yield match[1], match[2].strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _files(operator: Path | None, data_dir: Path, environment: Mapping[str, str]) -> Iterator[FileFact]:
    if operator is not None:
        yield _file(operator, "the directory of the operator's credentials", PRIVATE)
        yield _file(operator / KEY_FILE, "the operator's key", PRIVATE)
    for name, purpose, forbidden in (
        ("MESH_TOKEN_FILE", "the join token", PRIVATE),
        ("CONSUL_HTTP_TOKEN_FILE", "the Consul token", PRIVATE),
        ("MESH_TRUST_ROOTS", "the trust roots", WRITABLE),
    ):
        if environment.get(name):
            yield _file(Path(environment[name]).expanduser(), purpose, forbidden, required=True)
    if environment.get("MESH_IDENTITY_DIR"):
        directory = Path(environment["MESH_IDENTITY_DIR"]).expanduser()
        yield _file(directory, "the directory of the identity", PRIVATE)
        yield _file(directory / "identity.json", "the identity", PRIVATE)
    if environment.get("MESH_SECRETS_DIR"):
        with contextlib.suppress(OSError):
            for path in sorted(Path(environment["MESH_SECRETS_DIR"]).expanduser().iterdir()):
                if path.is_file():
                    yield _file(path, f"the edge's secret {path.name}", PRIVATE)
    yield _file(data_dir, "the data directory", WRITABLE)
    with contextlib.suppress(OSError):  # those who may not look in are told so above
        keys = sorted((data_dir / "ca").glob("*.key"))
        for path in [*keys, *(data_dir / name for name in _SECRETS_OF_DATA)]:
            if path.exists():
                yield _file(path, f"the control plane's {path.name}", PRIVATE)


def _file(path: Path, purpose: str, forbidden: int, *, required: bool = False) -> FileFact:
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return FileFact(str(path), purpose, forbidden, exists=False, required=required)
    except OSError as error:
        return FileFact(str(path), purpose, forbidden, required=required, problem=error.strerror or str(error))
    mode = found.st_mode & 0o7777
    return FileFact(str(path), purpose, forbidden, required=required, mode=mode, owner=found.st_uid)


def _port_problem(address: str) -> str:
    host, _, port = address.rpartition(":")
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As gRPC does, so that connections which ended a moment ago are no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
    except OSError as error:
        return "it is taken" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
    return ""


def _free(directory: Path) -> int | None:
    """Bytes that are free where the directory is, or would be made; None if it cannot be made."""
    for path in (directory, *directory.parents):
        if path.exists():
            return shutil.disk_usage(path).free if path.is_dir() and os.access(path, os.W_OK | os.X_OK) else None
    return None


def _unresolved(addresses: Sequence[str]) -> Iterator[tuple[str, str]]:
    for address in addresses:
        host, _, port = address.rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        except OSError as error:
            yield host, error.strerror or str(error)
